"""Rows sorted by expert: followed in parts where they are read by token, and computed again where they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from opweave.passes.split import dispatch
from opweave.passes.split.orders import Counts, Shuffled
from opweave.passes.split.rule import Call, Divided, Outcome, Rule
from opweave.passes.split.rules import routing
from opweave.passes.split.split import split
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
