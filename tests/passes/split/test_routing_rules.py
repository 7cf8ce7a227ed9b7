"""Choosing, sorting, gathering and scattering in parts: the same numbers, joined where tokens choose among tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from opweave.passes.split import dispatch
from opweave.passes.split.orders import Counts, Shuffled
from opweave.passes.split.rule import Call, Divided, Outcome, Rule
from opweave.passes.split.rules import routing
from opweave.passes.split.split import Split, split
from opweave.passes.split.state import Along
from tests.passes.split.kernels import REPLACED, graph_of
from tests.passes.split.mixtures import Mixture
from tests.passes.split.traced import difference, fake_group, fed, state, trace

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


# --- sorted by expert ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Two ranks, of which this process is the first."""
    with fake_group(2):
        yield


def mixture(form: str, training: bool) -> tuple[fx.GraphModule, list[list[Tensor]], dict[str, int]]:
    """A mixture's graph, the inputs of two ranks, and the axes of its batch of 7."""
    modules = [Mixture(form, rank) for rank in range(2)]
    x = numbers(TOKENS, 3, 8).requires_grad_()
    traced = trace(modules[0], [x], training=training)
    graph = traced.joint if training else traced.inference
    assert graph is not None
    tangents = [node.name for node in graph.graph.find_nodes(op="placeholder") if "tangents" in node.name]
    return (
        graph,
        [fed(graph, [*state(each), x.detach()]) for each in modules],
        dict.fromkeys([*traced.names, *tangents], 0),
    )


def grouped(module: fx.GraphModule) -> int:
    """How many grouped products there are."""
    return sum("_grouped_mm" in str(node.target) for node in module.graph.nodes)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", ["sorted", "added", "inverse"])
def test_rows_sorted_by_expert_need_no_join(form: str, training: bool) -> None:
    """Each part sorts, multiplies and brings back its own rows; gradients of the experts are summands."""
    graph, inputs, axes = mixture(form, training)
    made = split(graph, axes, SIZES)
    assert not made.joined
    assert grouped(made.module) == 3 * grouped(graph)
    assert difference(graph, made.module, inputs, REPLACED) < EXACT


def dispatched(x: Tensor, router: Tensor, weights: Tensor, last: Callable[..., Any]) -> Any:
    """Rows through two experts each, and what ``last`` makes of the rows, their order and their slots."""
    _, experts = aten.topk(x @ router, 2)
    ids = experts.view(-1)
    _, order = aten.sort(ids)
    counts = aten.histc(ids.to(torch.float32), 4, 0, 4)
    ends = aten.cumsum(counts, 0).to(torch.int32)
    rows = aten._grouped_mm(x[order // 2].to(torch.bfloat16), weights.to(torch.bfloat16), ends).to(torch.float64)
    return (last(rows, order, ends),)


def onto_others(rows: Tensor, order: Tensor) -> Tensor:
    """Rows in the tokens' order, added at their places to rows that are none of theirs."""
    places = aten.sort(order)[1]
    others = torch.arange(2 * TOKENS)[:, None].expand(-1, 8).to(torch.float64)
    result: Tensor = aten.index_put(others, [places], rows[places], True)
    return result


#: What follows the experts, and whether parts can take it.
LAST: dict[str, tuple[Callable[..., Any], bool]] = {
    "places": (lambda rows, order, ends: rows[aten.sort(order)[1]], True),
    "added": (lambda rows, order, ends: rows.new_zeros(TOKENS, 8).index_add(0, order // 2, rows.sin()), True),
    "scattered": (
        lambda rows, order, ends: rows.new_zeros(TOKENS, 8).scatter_add(
            0, (order // 2)[:, None].expand(-1, 8), rows.softmax(-1)
        ),
        True,
    ),
    "a sum": (lambda rows, order, ends: (rows * rows).sum(0), True),
    "products": (lambda rows, order, ends: rows.t() @ rows, True),
    "ends": (lambda rows, order, ends: ends, True),
    "rows themselves": (lambda rows, order, ends: rows, False),
    "order itself": (lambda rows, order, ends: order, False),
    "first row": (lambda rows, order, ends: rows[0], False),
    "running sum": (lambda rows, order, ends: rows.cumsum(0), False),
    "two at a time": (lambda rows, order, ends: rows.view(TOKENS, 16).sum(1), False),
    "softmax of rows": (lambda rows, order, ends: rows.softmax(0), False),
    "whole weights by row": (lambda rows, order, ends: rows * torch.arange(2 * TOKENS)[:, None], False),
    "order as numbers": (
        lambda rows, order, ends: rows.new_zeros(TOKENS, 8).index_add(0, order // 2, rows * order[:, None]),
        False,
    ),
    "other numbers": (
        lambda rows, order, ends: rows.new_zeros(TOKENS, 8).index_add(0, order * 0 // 2, rows),
        False,
    ),
    "onto other rows": (
        lambda rows, order, ends: rows.new_zeros(TOKENS, 8).index_add(0, order // 2, onto_others(rows, order)),
        False,
    ),
    "uneven division": (lambda rows, order, ends: rows.new_zeros(5, 8).index_add(0, order // 3, rows), False),
    "written twice": (
        lambda rows, order, ends: rows.new_zeros(TOKENS, 8).index_put((order // 2,), rows * 0),
        False,
    ),
}


@pytest.mark.parametrize("name", list(LAST))
def test_rows_sorted_by_expert_are_followed_or_computed_again(name: str) -> None:
    """Where rows are read by token, in parts; where they are read in the whole's order, on joined operands."""
    last, followed = LAST[name]
    inputs = (numbers(TOKENS, 8), numbers(8, 4), numbers(4, 8, 8))
    graph = graph_of(lambda x, router, weights: dispatched(x, router, weights, last), *inputs)
    first = graph.graph.find_nodes(op="placeholder")[0].name
    made = split(graph, {first: 0}, SIZES)
    assert difference(graph, made.module, [inputs], REPLACED) < EXACT
    assert bool(made.joined) != followed
    exceptions = ("ends", "onto other rows")  # without products; joined where rows are in the tokens' order again
    assert (grouped(made.module) == len(SIZES)) == (followed != (name in exceptions))


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_any_routing_in_any_parts(sizes: list[int], seed: int) -> None:
    """Experts without a token, and parts of a single one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(sizes)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((tokens, 8), (8, 4), (4, 8, 8))
    ]

    def last(rows: Tensor, order: Tensor, _: Tensor) -> Any:
        return rows.new_zeros(tokens, 8).index_add(0, order // 2, rows)

    graph = graph_of(lambda x, router, weights: dispatched(x, router, weights, last), *inputs)
    first = graph.graph.find_nodes(op="placeholder")[0].name
    made = split(graph, {first: 0}, sizes)
    assert not made.joined
    assert difference(graph, made.module, [inputs], REPLACED) < EXACT


def test_counts_of_other_numbers_are_not_taken_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends must count what was sorted: of anything else, the rows are computed again."""

    def run(x: Tensor, y: Tensor, router: Tensor, weights: Tensor) -> Any:
        ids, others = (aten.topk(each @ router, 2)[1].view(-1) for each in (x, y))
        _, order = aten.sort(ids)
        ends = aten.cumsum(aten.histc(others.to(torch.float32), 4, 0, 4), 0).to(torch.int32)
        rows = aten._grouped_mm(x[order // 2].to(torch.bfloat16), weights.to(torch.bfloat16), ends).to(torch.float64)
        return (rows.new_zeros(TOKENS, 8).index_add(0, order // 2, rows),)

    inputs = (numbers(TOKENS, 8), numbers(TOKENS, 8).flip(0), numbers(8, 4), numbers(4, 8, 8))
    graph = graph_of(run, *inputs)
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    made = split(graph, dict.fromkeys(names[:2], 0), SIZES)
    assert made.joined
    assert difference(graph, made.module, [inputs], REPLACED) < EXACT

    def trusting(call: Call) -> Outcome | None:  # the control: a rule that does not ask whose counts they are
        rows, ends = call.operand("self"), call.operand("offs")
        assert rows is not None
        assert ends is not None
        return Divided(rows.state, call.states()) if isinstance(ends.state, Counts) else None

    monkeypatch.setitem(dispatch._SPECIAL, "aten::_grouped_mm", trusting)
    made = split(graph, dict.fromkeys(names[:2], 0), SIZES)
    assert difference(graph, made.module, [inputs], REPLACED) > 1e-3


def test_a_sort_claimed_to_be_in_the_order_of_tokens_is_caught() -> None:
    """The control of the comparison: parts of a sort are not slices of it."""

    def naive(call: Call) -> Outcome:
        outcome = routing.RULES["aten::sort"].divide(call)
        assert isinstance(outcome, Divided)
        assert isinstance(outcome.result, tuple)
        plain = tuple(item.plain if isinstance(item, Shuffled) else Along(0, 2) for item in outcome.result)
        return replace(outcome, result=plain)

    inputs = (numbers(TOKENS, 8), numbers(8, 4), numbers(4, 8, 8))
    graph = graph_of(lambda x, router, weights: dispatched(x, router, weights, LAST["added"][0]), *inputs)
    first = graph.graph.find_nodes(op="placeholder")[0].name
    made = split(graph, {first: 0}, SIZES, rules={"aten::sort": Rule(naive)})
    assert difference(graph, made.module, [inputs], REPLACED) > 1e-3
