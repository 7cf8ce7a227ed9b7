"""The search for canonical placements: complete on small instances, and sound about what it has not finished."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.passes.address.no_overlap import Verdict, fit_by_constraints
from opweave.passes.address.packing import Packing
from opweave.passes.address.restarts import _luby, _sections, fit_by_search

from .packings import Box, boxes, least_arena, plan_of

AMPLE = Budget.of_seconds(86_400.0)


def packing_of(items: list[Box], capacity: int, alignment: int = 1) -> Packing:
    return Packing.of(plan_of(items, capacity, alignment), "address/test")


@settings(deadline=None, max_examples=150)
@given(boxes(), st.sampled_from([1, 4]), st.integers(0, 3))
def test_places_exactly_from_the_least_arena_on(items: list[Box], alignment: int, short: int) -> None:
    """One byte less than the least arena is proven impossible; the least arena and more are placed."""
    capacity = max(1, least_arena(items, alignment) + 1 - short)
    packing = packing_of(items, capacity, alignment)
    answer = fit_by_search(packing, list(packing.items), capacity, AMPLE, seconds=60.0)
    if capacity < least_arena(items, alignment):
        assert answer.verdict is Verdict.IMPOSSIBLE
        return
    assert answer.verdict is Verdict.PLACED
    assert packing.arena_bytes(packing.items, answer.offsets) <= capacity
    _check_disjoint(packing, answer.offsets)


def _check_disjoint(packing: Packing, offsets: tuple[int, ...]) -> None:
    for i in packing.items:
        for j in range(i):
            apart = offsets[i] + packing.units[i] <= offsets[j] or offsets[j] + packing.units[j] <= offsets[i]
            assert apart or not packing.overlap(i, j)


@settings(deadline=None, max_examples=25)
@given(boxes(max_size=14, max_bytes=9), st.integers(0, 4))
def test_agrees_with_constraint_programming(items: list[Box], extra: int) -> None:
    packing = packing_of(items, 1000)
    capacity = packing.fullest_step()[0] + extra
    found = fit_by_search(packing, list(packing.items), capacity, AMPLE, seconds=60.0)
    assert found.verdict is not Verdict.UNKNOWN
    assert found.verdict is fit_by_constraints(packing, packing.items, capacity, AMPLE, seconds=60.0).verdict


@given(boxes(max_size=10))
def test_sections_keep_who_overlaps_whom(items: list[Box]) -> None:
    packing = packing_of(items, 1000)
    first, behind = _sections(packing, packing.items)
    for i in packing.items:
        assert first[i] < behind[i]
        for j in range(i):
            assert packing.overlap(i, j) == (first[i] < behind[j] and first[j] < behind[i])


def crowd() -> list[Box]:
    """Lifetimes that leave no byte to spare and no quick answer."""
    return [(k % 17, k % 17 + 3 + k % 5, 1 + (7 * k) % 11) for k in range(120)]


def test_without_time_nothing_is_claimed() -> None:
    packing = packing_of(crowd(), 1000)
    capacity = packing.fullest_step()[0]
    items = list(packing.items)
    assert fit_by_search(packing, items, capacity, AMPLE, seconds=0.0).verdict is Verdict.UNKNOWN
    stopped = Budget.of_seconds(86_400.0)
    stopped.stop.set()
    assert fit_by_search(packing, items, capacity, stopped, seconds=60.0).verdict is Verdict.UNKNOWN


def test_deterministic_searches_end_by_nodes_and_agree() -> None:
    packing = packing_of(crowd(), 1000)
    capacity = packing.fullest_step()[0] + 4
    budget = Budget.of_seconds(86_400.0, deterministic=True)
    answers = [fit_by_search(packing, list(packing.items), capacity, budget, seconds=0.3) for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("number", "expected"), list(enumerate([1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8], start=1))
)
def test_luby(number: int, expected: int) -> None:
    assert _luby(number) == expected
