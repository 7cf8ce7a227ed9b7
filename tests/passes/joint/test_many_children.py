"""States from which very many buffers, or very many sets of them, can be dropped for one operator."""

from __future__ import annotations

import pytest

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.plan import Plan
from opweave.passes.joint.search import BestFirst
from opweave.passes.joint.states import StateSpace
from opweave.passes.order.problem import OrderProblem
from tests.graphs.build import machine


def crossed(sizes: list[int], room: int) -> StateSpace:
    """Weights of ``sizes`` that one operator reads, and another again behind one that leaves ``room`` for them."""
    weights = tuple(f"w{i}" for i in range(len(sizes)))
    large = sum(sizes)
    tensors = (
        Tensor("x", (1,), "int8", Role.INPUT),
        *(Tensor(name, (size,), "int8", Role.WEIGHT) for name, size in zip(weights, sizes, strict=True)),
        *(Tensor(name, (size,), "int8") for name, size in (("a", 1), ("b", large), ("c", 1), ("y", 1))),
    )
    ops = (
        Op("before", ("x", *weights), ("a",)),
        Op("grow", ("a",), ("b",)),
        Op("shrink", ("b",), ("c",)),
        Op("after", ("c", *weights), ("y",)),
    )
    problem = OrderProblem.of(Plan.of_order(Graph("crossed", tensors, ops, ("y",)), machine(large + room + 2, 1)))
    return StateSpace(problem, problem.capacity)


def test_more_buffers_dropped_at_once_than_calls_nest() -> None:
    space = crossed([10] * 1300, 100)
    search = BestFirst(space, space.root(), 1 << 60)
    search.run(lambda: False)
    assert search.found is not None
    assert search.bound == 1290 * 10  # ten stay beside what grew and what it grew from, of 1 byte


@pytest.mark.parametrize("ceiling", [1 << 60, 30_500])
def test_very_many_ways_to_make_room_are_work(ceiling: int) -> None:
    """A limit on states ends a search in the middle of one state, also where nothing it tries is below the ceiling."""
    space = crossed([1000 + 37 * i % 101 for i in range(60)], 30_000)
    search = BestFirst(space, space.root(), ceiling)
    search.run(lambda: search.expanded >= 5)
    assert search.expanded == 5
    assert search.found is None
    assert search.size < 5_000
    before = search.bound
    search.run(lambda: search.expanded >= 10)
    assert before <= search.bound <= ceiling
