"""Windows of an order partition it, and what they bound adds up to less than any order moves."""

from __future__ import annotations

import msgspec
import pytest
from benchmarks.networks import layered

from opweave.compiler.plan import Plan
from opweave.passes.joint.milestones import prefixes
from opweave.passes.joint.search import BestFirst
from opweave.passes.joint.states import StateSpace
from opweave.passes.joint.windows import stretches, windows_bounds
from opweave.passes.order.problem import OrderProblem
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import machine


@pytest.fixture(scope="module")
def problem() -> OrderProblem:
    plan = Plan.of_order(layered(120, 2, 0), machine(1 << 40))
    return OrderProblem.of(msgspec.structs.replace(plan, machine=machine(least_capacity(plan))))


def windows_of(problem: OrderProblem, size: int) -> list[list[int]]:
    order = range(len(problem.touches))
    return stretches(prefixes(problem, order, size), (1 << len(order)) - 1)


def least(problem: OrderProblem) -> int:
    """Bytes that the best order moves, by a search of the whole graph."""
    space = StateSpace(problem, problem.capacity)
    search = BestFirst(space, space.root(), 1 << 62)
    search.run(lambda: False)
    return search.bound


def test_stretches_are_the_order_in_parts(problem: OrderProblem) -> None:
    parts = windows_of(problem, 24)
    assert len(parts) == 5
    assert [op for part in parts for op in part] == list(range(len(problem.touches)))


def test_stretches_of_an_order_that_is_not_program_order() -> None:
    assert stretches([0b0101, 0b1101], 0b11111) == [[0, 2], [3], [1, 4]]


def test_longer_searches_raise_what_is_known_of_each_window(problem: OrderProblem) -> None:
    windows = windows_of(problem, 24)
    few = windows_bounds(problem, problem.capacity, windows, 10, lambda: False, [0] * len(windows))
    many = windows_bounds(problem, problem.capacity, windows, 200, lambda: False, few)
    assert all(one <= other for one, other in zip(few, many, strict=True))
    assert 0 < sum(few) < sum(many) <= least(problem)


def test_a_round_cut_short_keeps_what_is_known(problem: OrderProblem) -> None:
    windows = windows_of(problem, 24)
    few = windows_bounds(problem, problem.capacity, windows, 10, lambda: False, [0] * len(windows))
    assert sum(few) > 0
    assert windows_bounds(problem, problem.capacity, windows, 200, lambda: True, few) == few
