"""Writes in place: new versions of one buffer, in program order, with sources left as eager leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from opweave.compiler.frontend.fx import from_exported
from opweave.compiler.frontend.program import ImportedGraph
from tests.compiler.frontend.eager_check import check

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own


def functionalized(module: nn.Module, args: Any, kwargs: Any) -> ImportedGraph:
    """By way of a program whose updates are results, as ``run_decompositions`` makes it."""
    return from_exported(torch.export.export(module, args, kwargs).run_decompositions({}))


def decomposed(module: nn.Module, args: Any, kwargs: Any) -> ImportedGraph:
    """By way of core ATen."""
    return from_exported(torch.export.export(module, args, kwargs).run_decompositions())


def cache(m: Any, key: torch.Tensor, position: torch.Tensor) -> Any:
    m.c[:, :1] = key
    m.c.index_put_((torch.arange(2)[:, None], position[None]), key.expand(2, 2, 3))
    return m.c.mT @ m.c


def write_input(m: Any, x: torch.Tensor) -> Any:
    y, before = x + 1, x.clone()
    x.mul_(2)
    y[0].add_(x[0])
    return y, x.mT, before


def swap(m: Any) -> Any:
    before = m.a.clone()
    m.a.copy_(m.b)
    m.b.copy_(before)
    return m.a - 2 * m.b


def return_updated(m: Any, x: torch.Tensor) -> Any:
    m.a.add_(x)
    return m.a, m.a[1:]


def write_views(m: Any, x: torch.Tensor) -> Any:
    y = torch.zeros(3, 4)
    y[:, 1].copy_(x[:, 0])
    y.t()[2].fill_(7).mul_(y[:, 1])
    y[0, 0] = 3
    return y


CASES: dict[str, tuple[Any, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]] = {
    "batch norm": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True)), (torch.randn(2, 3, 6, 6),), {}),
    "cache": (cache, (torch.randn(2, 1, 3), torch.tensor([1, 3])), {"c": torch.zeros(2, 4, 3)}),
    "input": (write_input, (torch.randn(2, 3),), {}),
    "swap": (swap, (), {"a": torch.ones(3), "b": torch.zeros(3)}),
    "returned": (return_updated, (torch.ones(3),), {"a": torch.arange(3.0)}),
    "views": (write_views, (torch.randn(3, 1),), {}),
    "counter": (lambda m, x: x + m.n.add_(1), (torch.ones(2),), {"n": torch.tensor(3)}),
    "promotion": (lambda m, x: x.half().add_(x * 1.5), (torch.randn(3),), {}),
    "dropout": (lambda m, x: nn.functional.dropout(x + 1, 0.5, False, True), (torch.randn(3),), {}),
    "masked": (lambda m, x: (x + 0).masked_fill_(x > 0, -1.0).clamp_(min=-0.5), (torch.randn(9),), {}),
    "shape": (lambda m, x: (x + 0).unsqueeze_(0).transpose_(1, 2).squeeze_(), (torch.randn(2, 3),), {}),
    "logical": (lambda m, x: (x > 0).logical_not_().__iand__(x < 1), (torch.randn(9),), {}),
}


@pytest.mark.parametrize("load", [None, functionalized, decomposed])
@pytest.mark.parametrize("case", CASES)
def test_updates_leave_what_eager_leaves(case: str, load: Any) -> None:
    torch.manual_seed(0)
    model, args, sources = CASES[case]
    args = tuple(value.clone() for value in args)
    sources = {name: value.clone() for name, value in sources.items()}
    check(model, *args, sources=sources, **({} if load is None else {"load": load}))


def test_training_batch_norm_moves_its_statistics() -> None:
    graph = check(nn.BatchNorm1d(3), torch.randn(5, 3))
    assert graph.output_buffers == {"b_running_mean", "b_running_var", "b_num_batches_tracked", "batch_norm"}
    assert [op.target for op in graph.ops] == ["aten.add.Tensor", "aten._native_batch_norm_legit_functional.default"]


def test_an_update_in_place_takes_no_second_buffer() -> None:
    graph = check(lambda m, x: (x + 1).relu_().mul_(2), torch.randn(4))
    assert set(graph.buffers) == {"args_0", "add"}
    assert graph.writes == (("add",), ("add",), ("add",))
    assert graph.predecessors == ((), (0,), (1,))


def test_readers_of_the_old_version_come_first() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        old = m.s + x
        m.s.add_(x)
        return old, m.s * 2

    graph = check(forward, torch.ones(2), sources={"s": torch.ones(2)})
    assert graph.predecessors == ((), (0,), (1,))
