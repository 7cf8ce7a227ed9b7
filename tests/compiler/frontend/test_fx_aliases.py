"""What eager aliases is an alias in the graph, what it copies is an operator, and both compute what eager computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opweave.compiler.graph import Graph, Role
from tests.compiler.frontend.eager_check import check


def targets(graph: Graph) -> list[str]:
    """What the operators call; a ``!`` marks those that write in place."""
    fresh = {t.name for t in graph.buffers.values()}
    return [op.target + ("" if set(op.outputs) <= fresh else "!") for op in graph.ops]


VIEWS: dict[str, Callable[..., Any]] = {
    "transpose, slice, expand": lambda m, x: x.transpose(0, 1)[1:, :1].unsqueeze(-1).expand(2, 1, 4, 5),
    "view of a view": lambda m, x: x.view(6, 4)[2:].view(2, 2, 4)[:, 1].t(),
    "split": lambda m, x: x.split([1, 3], -1),
    "chunk": lambda m, x: x.chunk(2, -1)[1],
    "unbind": lambda m, x: x.unbind(1),
    "select and diagonal": lambda m, x: x.select(0, 1).diagonal(),
    "as_strided": lambda m, x: x.as_strided((2, 2), (5, 1), 3),
    "permute and squeeze": lambda m, x: x[:1].permute(2, 0, 1).squeeze(),
    "reshape that is a view": lambda m, x: x.reshape(6, 4),
    "flatten": lambda m, x: x.flatten(1),
    "contiguous of a contiguous": lambda m, x: x.contiguous(),
    "to its own dtype": lambda m, x: x.to(torch.float32),
    "dropout in evaluation": lambda m, x: nn.functional.dropout(x, 0.5, training=False),
    "detach": lambda m, x: x.detach(),
    "other dtype": lambda m, x: x.view(torch.int16),
    "real and imaginary part": lambda m, x: torch.view_as_complex(x.view(12, 2)).real,
    "empty slice": lambda m, x: x[2:, :, 4:],
    "unfold": lambda m, x: x.unfold(2, 2, 1),
    "movedim": lambda m, x: x.movedim(0, 2),
    "unsafe split": lambda m, x: torch.ops.aten.unsafe_split.Tensor(x, 1, 0),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_make_no_operator(view: Callable[..., Any]) -> None:
    """As the only calls, on an input and on an activation."""
    assert targets(check(view, torch.randn(2, 3, 4))) == []
    graph = check(lambda m, x: view(m, x + 1), torch.randn(2, 3, 4))
    assert targets(graph) == ["aten.add.Tensor"]
    assert {graph.tensor[t].buffer for t in graph.outputs} == {"add"}


COPIES: dict[str, tuple[Callable[..., Any], str]] = {
    "reshape across strides": (lambda m, x: x.mT.reshape(6, 4), "aten.reshape.default"),
    "contiguous of a transposed": (lambda m, x: x.mT.contiguous(), "aten.contiguous.default"),
    "clone": (lambda m, x: x.clone(), "aten.clone.default"),
    "to another dtype": (lambda m, x: x.to(torch.float16), "aten.to.dtype"),
    "flatten across strides": (lambda m, x: x.mT.flatten(), "aten.flatten.using_ints"),
    "cat": (lambda m, x: torch.cat([x[:1], x[1:]], 0), "aten.cat.default"),
    "repeat": (lambda m, x: x.repeat(2, 1, 1), "aten.repeat.default"),
    "channels last": (
        lambda m, x: x[None].to(memory_format=torch.channels_last),
        "aten.to.dtype_layout",
    ),
}


@pytest.mark.parametrize(("copy", "target"), COPIES.values(), ids=COPIES.keys())
def test_copies_are_operators(copy: Callable[..., Any], target: str) -> None:
    graph = check(copy, torch.randn(2, 3, 4))
    assert len(graph.ops) == 1
    assert target.rpartition(".")[0] in targets(graph)[0]


def test_one_layout_is_one_tensor() -> None:
    """Views that read the same bytes in the same way are not told apart."""
    graph = check(lambda m, x: x.mT.exp() + x.transpose(1, 2).detach().sin(), torch.randn(2, 3, 4))
    assert len([t for t in graph.tensors if t.buffer == graph.tensors[0].buffer]) == 2  # the input and its transpose


def test_results_with_gaps_are_stored_without() -> None:
    """``lstm`` returns views of its own temporaries; what views them again must follow their new layout."""
    graph = check(nn.LSTM(3, 4, num_layers=2, batch_first=True).eval(), torch.randn(2, 5, 3))
    assert targets(graph)[-1] == "aten.lstm.input"
    assert all(t.end_bytes == t.nbytes for t in graph.buffers.values())
    gru = nn.GRU(3, 4, batch_first=True).eval()
    check(lambda m, x: gru(x)[0][:, 1:].mT.reshape(2, -1) + gru(x)[1].sum(), torch.randn(2, 5, 3))


def test_dense_results_keep_their_strides() -> None:
    """Convolution in channels-last order returns channels-last order."""
    weight = nn.Parameter(torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last))
    image = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    graph = check(lambda m, x: nn.functional.conv2d(x, m.w), image, sources={"w": weight})
    assert graph.tensor[graph.outputs[0]].strides == (288, 1, 48, 8)


def test_multi_output_operators_list_every_tensor() -> None:
    graph = check(lambda m, x: (x.topk(2)[1], x.max(1).values, torch.var_mean(x, 0)), torch.randn(2, 3, 4))
    assert [len(op.outputs) for op in graph.ops] == [2, 2, 2]
    assert len(graph.outputs) == 4


def test_dead_code_is_left_out() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        unused = x.exp()
        unused.add_(1)
        torch._assert(x.shape[0] == 2, "two")  # type: ignore[no-untyped-call]
        return x + 1

    assert targets(check(forward, torch.randn(2))) == ["aten.add.Tensor"]


def test_unread_sources_stay_only_if_the_user_gives_or_gets_them() -> None:
    weights = {"read": torch.ones(2), "unread": torch.ones(2), "returned": nn.Parameter(torch.ones(2))}
    graph = check(lambda m, x, y: (x + m.read, m.returned), torch.ones(2), torch.ones(3), sources=weights)
    assert {t.name: t.role for t in graph.tensors} == {
        "args_0": Role.INPUT,
        "args_1": Role.INPUT,
        "b_read": Role.WEIGHT,
        "p_returned": Role.WEIGHT,
        "add": Role.OUTPUT,
    }


def test_results_of_every_kind() -> None:
    """Inputs, views, repetitions, ``None`` and plain values among the results; nested structures."""

    def forward(m: nn.Module, x: torch.Tensor) -> Any:
        y = x + 1
        return x, y, {"again": y, "view": y.mT, "nothing": None}, [3, "three", x.mT, x.shape[0]]

    graph = check(forward, torch.randn(2, 3))
    assert graph.outputs == ("args_0", "add", "add", graph.outputs[3], graph.outputs[4])
    assert graph.output_buffers == {"add"}
    assert graph.tensor["add"].role is Role.OUTPUT


def test_no_operator_at_all() -> None:
    assert check(lambda m, x: x, torch.randn(2)).ops == ()


def test_keyword_arguments_and_nested_inputs() -> None:
    def forward(m: nn.Module, x: torch.Tensor, *, scale: dict[str, Any], flag: bool) -> Any:
        return {"y": x * scale["a"][0] + scale["b"] if flag else x}

    a, b = torch.randn(3), torch.randn(2, 3)
    check(forward, torch.randn(2, 3), kwargs={"scale": {"a": [a, 2], "b": b}, "flag": True})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    graph = check(lambda m, x: torch.where(x > 0, x, x[:1]).mT[1:], torch.randint(0, 2, (3, 4)).to(dtype))
    assert graph.tensor[graph.outputs[0]].dtype == str(dtype).removeprefix("torch.")


def test_operators_carry_the_path_of_their_module() -> None:
    graph = check(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU())), torch.randn(2, 3))
    assert [op.origin for op in graph.ops] == ["0", "1.0"]


def test_gradient_regions_are_seen_through() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = x * 2
        with torch.no_grad():
            z = y * 3
        return z + y

    assert targets(check(forward, torch.randn(2))) == ["aten.mul.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own
def test_casts_of_autocast_regions_are_spelled_out() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.linear(x, m.w)

    graph = check(forward, torch.randn(2, 4), sources={"w": nn.Parameter(torch.randn(5, 4))})
    assert targets(graph) == ["aten._to_copy.default", "aten._to_copy.default", "aten.linear.default"]


def test_same_program_same_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    assert check(model, torch.ones(2, 3)) == check(model, torch.ones(2, 3))
