"""Choosing, sorting, gathering and scattering in parts: the same numbers, joined where tokens choose among tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from opweave.passes.split.rule import Rule
from opweave.passes.split.split import Split, split
from tests.passes.split.kernels import REPLACED, graph_of
from tests.passes.split.traced import difference

aten = torch.ops.aten

SIZES = (1, 4, 2)
TOKENS = sum(SIZES)
EXACT = 1e-10


def numbers(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def whole(below: int, *shape: int) -> Tensor:
    """Whole numbers below ``below``."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(below))


@dataclass(frozen=True)
class Case:
    """A function, its inputs, the dimension of tokens of each, and what is said of a join, if there is one."""

    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    axes: tuple[int | None, ...]
    joined: str = ""


def twice() -> Tensor:
    """Each token's number twice, computed of numbers alone."""
    return torch.arange(TOKENS)[:, None].expand(-1, 2).reshape(-1)


X, TABLE, PLACES = numbers(TOKENS, 6), numbers(9, 6), whole(9, TOKENS)
CASES = {
    "topk of each token": Case(lambda x: aten.topk(x, 2), (X,), (0,)),
    "topk of tokens": Case(lambda x: aten.topk(x, 2, 0), (X,), (0,), "an order among all tokens"),
    "sort of each token": Case(lambda x: aten.sort(x, 1), (X,), (0,)),
    "sort of tokens": Case(lambda x: aten.sort(x, 0), (X,), (0,), "an order among all tokens"),
    "running sum of each token": Case(lambda x: (aten.cumsum(x, 1),), (X,), (0,)),
    "running sum over tokens": Case(lambda x: (aten.cumsum(x, 0),), (X,), (0,)),
    "running sum over two rows of tokens": Case(
        lambda x: (aten.cumsum(x.view(2 * TOKENS, 3), 0),), (numbers(2, TOKENS, 3),), (1,), "lie together"
    ),
    "running product over tokens": Case(lambda x: (aten.cumprod(x, 0),), (X,), (0,), "an order among all tokens"),
    "histogram": Case(lambda x: (aten.histc(x, 4, -1, 1),), (numbers(TOKENS),), (0,)),
    "histogram of an own range": Case(lambda x: (aten.histc(x, 4),), (numbers(TOKENS),), (0,), "a histogram"),
    "places in a sorted row": Case(
        lambda row, x: (aten.searchsorted(row, x),), (numbers(5).sort().values, X), (None, 0)
    ),
    "rows of a table": Case(lambda table, i: (aten.index(table, [i]),), (TABLE, PLACES), (None, 0)),
    "rows of a table by two": Case(
        lambda table, i, j: (aten.index(table, [i, j]),), (TABLE, PLACES, whole(6, 3, 1)), (None, 0, None)
    ),
    "columns of tokens": Case(lambda x, i: (aten.index(x, [None, i]),), (X, whole(6, 4)), (0, None)),
    "tokens by a table": Case(lambda x, i: (aten.index(x, [i]),), (X, whole(7, 3)), (0, None), "rows chosen"),
    "tokens by tokens": Case(lambda x, i: (aten.index(x, [i]),), (X, whole(7, TOKENS)), (0, 0), "rows chosen"),
    "each token twice": Case(lambda x: (aten.index(x, [twice()]),), (X,), (0,)),
    "added to each token twice": Case(
        lambda x: (aten.index_put(aten.zeros([TOKENS, 6], dtype=torch.float64), [twice()], x, True),),
        (numbers(2 * TOKENS, 6),),
        (0,),
    ),
    "neighbours by numbers": Case(
        lambda x: (aten.index(x, [aten.remainder(aten.arange(TOKENS) + 1, TOKENS)]),), (X,), (0,), "rows chosen"
    ),
    "index_select of columns": Case(lambda x, i: (aten.index_select(x, 1, i),), (X, whole(6, 4)), (0, None)),
    "index_select of a table": Case(lambda table, i: (aten.index_select(table, 0, i),), (TABLE, PLACES), (None, 0)),
    "index_select of tokens": Case(lambda x, i: (aten.index_select(x, 0, i),), (X, PLACES % 7), (0, 0), "rows chosen"),
    "added to a table": Case(
        lambda table, i, x: (aten.index_put(table, [i], x, True),), (TABLE, PLACES, X), (None, 0, 0)
    ),
    "a number added to a table": Case(
        lambda table, i, x: (aten.index_put(table, [i], x, True),), (TABLE, PLACES, numbers()), (None, 0, None)
    ),
    "written to a table": Case(
        lambda table, i, x: (aten.index_put(table, [i], x),), (TABLE, torch.randperm(9)[:7], X), (None, 0, 0), "writing"
    ),
    "written to columns": Case(
        lambda x, i, v: (aten.index_put(x, [None, i], v),), (X, torch.tensor([4, 1]), numbers(TOKENS, 2)), (0, None, 0)
    ),
    "added to columns of zeros": Case(
        lambda i, v: (aten.index_put(aten.zeros([TOKENS, 6], dtype=torch.float64), [None, i], v, True),),
        (whole(6, 4), numbers(TOKENS, 4)),
        (None, 0),
    ),
    "index_add to columns": Case(
        lambda x, i, v: (aten.index_add(x, 1, i, v),), (X, whole(6, 4), numbers(TOKENS, 4)), (0, None, 0)
    ),
    "index_add to a table": Case(
        lambda table, i, x: (aten.index_add(table, 0, i, x),), (TABLE, PLACES, X), (None, 0, 0)
    ),
    "index_add to tokens": Case(
        lambda x, i, v: (aten.index_add(x, 0, i, v),), (X, whole(7, 3), numbers(3, 6)), (0, None, None), "rows chosen"
    ),
    "gather of each token": Case(lambda x, i: (aten.gather(x, 1, i),), (X, whole(6, TOKENS, 2)), (0, 0)),
    "gather of a table": Case(lambda table, i: (aten.gather(table, 0, i),), (TABLE, whole(9, TOKENS, 3)), (None, 0)),
    "gather of tokens": Case(lambda x, i: (aten.gather(x, 0, i),), (X, whole(7, TOKENS, 3)), (0, 0), "rows chosen"),
    "scatter in each token": Case(
        lambda x, i, v: (aten.scatter(x, 1, i, v),), (X, whole(6, TOKENS, 1), numbers(TOKENS, 1)), (0, 0, 0)
    ),
    "scatter of a number": Case(lambda x, i: (aten.scatter(x, 1, i, 3.0),), (X, whole(6, TOKENS, 1)), (0, 0)),
    "scatter to a table": Case(
        lambda table, i, v: (aten.scatter(table, 0, i, v),),
        (TABLE, torch.randperm(9)[:7, None], numbers(TOKENS, 1)),
        (None, 0, 0),
        "writing",
    ),
    "scatter_add to a table": Case(
        lambda table, i, v: (aten.scatter_add(table, 0, i, v),), (TABLE, whole(9, TOKENS, 6), X), (None, 0, 0)
    ),
    "scatter_reduce to a table": Case(
        lambda table, i, v: (aten.scatter_reduce(table, 0, i, v, "amax"),),
        (TABLE, whole(9, TOKENS, 6), X),
        (None, 0, 0),
        "writing",
    ),
    "key-value cache": Case(
        lambda cache, at, k: (aten.index_put(cache, [None, at], k),),
        (numbers(2, 12, 3), torch.arange(3, 10), numbers(2, TOKENS, 3)),
        (None, 0, 1),
        "writing",
    ),
    "key-value cache by a slice": Case(
        lambda cache, k: (aten.slice_scatter(cache, k, 1, 3, 3 + TOKENS),),
        (numbers(2, 12, 3), numbers(2, TOKENS, 3)),
        (None, 1),
        "writing",
    ),
}


def divided(case: Case, rules: dict[str, Rule] | None = None) -> tuple[fx.GraphModule, Split]:
    """The graph of a case, and its split."""
    graph = graph_of(case.run, *case.inputs)
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    axes = {name: dim for name, dim in zip(names, case.axes, strict=True) if dim is not None}
    return graph, split(graph, axes, SIZES, rules=rules)


@pytest.mark.parametrize("name", list(CASES))
def test_each_operator_in_parts(name: str) -> None:
    """The same numbers; joined where it must be, for the reason given, and nowhere else."""
    graph, made = divided(CASES[name])
    assert difference(graph, made.module, [CASES[name].inputs], REPLACED) < EXACT
    reasons = {entry.reason for entry in made.joined}
    assert all(CASES[name].joined in reason for reason in reasons)
    assert bool(reasons) == bool(CASES[name].joined)


def test_as_many_rows_as_values_say_are_joined() -> None:
    """Rows found by ``nonzero``: how many there are depends on the tokens."""

    def run(x: Tensor, weight: Tensor) -> Any:
        found = aten.nonzero(x[:, 0] > 0).squeeze(1)
        return (aten.index_add(aten.zeros_like(x), 0, found, x.sin()[found] @ weight).cos(),)

    inputs = (X, numbers(6, 6))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        graph = make_fx(run)(*(mode.from_tensor(value, static_shapes=True) for value in inputs))
    first = graph.graph.find_nodes(op="placeholder")[0].name
    made = split(graph, {first: 0}, SIZES)
    assert {entry.reason for entry in made.joined} == {"a size depends on values"}
    assert difference(graph, made.module, [inputs]) < EXACT
