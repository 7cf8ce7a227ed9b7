"""Placements in banks and around pins equal those that trying every offset finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget, Pass
from opweave.compiler.plan import Pin, Plan, Residence
from opweave.compiler.verify.address import check_regions
from opweave.compiler.verify.facts import count_facts
from opweave.compiler.verify.pins import check_pins
from opweave.passes.address.best_fit import BestFit
from opweave.passes.address.exact import ExactPlacement
from opweave.passes.address.first_fit import FirstFit
from opweave.passes.address.no_overlap import Verdict, fit_by_constraints
from opweave.passes.address.packing import Packing
from opweave.passes.address.placement import PlacementError
from opweave.passes.address.restarts import fit_by_search

from .packings import Box, arena, boxes, plan_of

AMPLE = Budget.of_seconds(86_400.0, deterministic=True)
STEADY = Budget.of_seconds(86_400.0)


def banked(items: Sequence[Box], banks: Sequence[int], alignment: int, pins: Sequence[Pin] = ()) -> Plan:
    plan = plan_of(items, 1, alignment)
    return msgspec.structs.replace(plan, machine=plan.machine.with_banks(*banks), pins=tuple(pins))


def findings(plan: Plan) -> list[str]:
    """What the verifier, which shares no code with the passes, has against the regions."""
    facts, residences = count_facts(plan), cast(tuple[Residence, ...], plan.residences)
    assert all(r.offset is not None for r in residences)
    return [str(f) for check in (check_regions, check_pins) for f in check(plan, facts, residences)]


def least_by_trying(plan: Plan) -> int | None:
    """The least arena, by trying every offset of every residence; ``None`` if there is no placement."""
    memory = plan.machine.scratchpad_memory
    boxes = [(r.begin, r.end, plan.graph.buffers[r.buffer].nbytes) for r in plan.residences or ()]
    pins = {pin.buffer: pin for pin in plan.pins}
    choices: list[list[int]] = []
    for residence, (_, _, size) in zip(plan.residences or (), boxes, strict=True):
        pin = pins.get(residence.buffer, Pin(residence.buffer))
        allowed = [
            offset
            for bank, (first, behind) in enumerate(memory.banks)
            for offset in range(first, behind - size + 1)
            if offset % memory.alignment_bytes == 0 and pin.bank in (None, bank) and pin.offset in (None, offset)
        ]
        choices.append(allowed)
    return _least(boxes, choices, [], memory.capacity_bytes + 1)


def _least(boxes: Sequence[Box], choices: Sequence[list[int]], placed: list[int], limit: int) -> int | None:
    """The least arena below ``limit`` of those that go on from ``placed``."""
    if len(placed) == len(boxes):
        return max(offset + box[2] for offset, box in zip(placed, boxes, strict=True))
    begin, end, size = boxes[len(placed)]
    rivals = [(o, o + b[2]) for o, b in zip(placed, boxes, strict=False) if begin < b[1] and b[0] < end]
    best: int | None = None
    for offset in choices[len(placed)]:
        if offset + size < limit and all(offset + size <= low or high <= offset for low, high in rivals):
            found = _least(boxes, choices, [*placed, offset], limit)
            if found is not None:
                best = limit = found
    return best


@st.composite
def problems(draw: st.DrawFn, max_size: int = 6) -> Plan:
    """Up to six residences in one to three banks, some of their buffers pinned to offsets or to banks."""
    items = draw(boxes(max_size=max_size, max_bytes=6))
    alignment = draw(st.sampled_from([1, 2]))
    banks = [alignment * size for size in draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))]
    pins = []
    for number in draw(st.sets(st.integers(0, len(items) - 1), max_size=3)):
        offset = alignment * draw(st.integers(0, sum(banks) // alignment - 1)) if draw(st.booleans()) else None
        bank = draw(st.integers(0, len(banks) - 1)) if offset is None else None
        pins.append(Pin(f"b{number}", offset, bank))
    return banked(items, banks, alignment, pins)


def check_against_trying(plan: Plan) -> None:
    """A proven conflict where nothing can be placed; else a placement, and the least arena with its proof."""
    least = least_by_trying(plan)
    if least is None:
        with pytest.raises(PlacementError) as caught:
            ExactPlacement().apply(plan, AMPLE)
        assert caught.value.proven
        residences = tuple((plan.residences or ())[i] for i in caught.value.conflict)
        assert least_by_trying(msgspec.structs.replace(plan, residences=residences)) is None
        return
    assert findings(ExactPlacement().apply(plan, AMPLE).plan) == []
    decision = ExactPlacement(minimize=True).apply(plan, AMPLE)
    assert findings(decision.plan) == []
    assert decision.certificate is not None
    assert (decision.certificate.value, decision.certificate.bound) == (least, least)
    assert arena(decision.plan) == least


@given(problems())
@settings(max_examples=150, deadline=None)
def test_the_verdict_is_that_of_trying_everything(plan: Plan) -> None:
    check_against_trying(plan)


@pytest.mark.slow
@given(problems(max_size=7))
@settings(max_examples=4000, deadline=None)
def test_the_verdict_is_that_of_trying_everything_at_length(plan: Plan) -> None:
    check_against_trying(plan)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_search_and_constraints_agree(plan: Plan) -> None:
    """Each method by itself, whatever first fit would have found."""
    packing = Packing.of(plan, "test")
    expected = Verdict.IMPOSSIBLE if least_by_trying(plan) is None else Verdict.PLACED
    for ask in (fit_by_search, fit_by_constraints):
        answer = ask(packing, list(packing.items), packing.capacity, STEADY, seconds=60.0)
        assert answer.verdict is expected
        if answer.offsets:
            assert all(packing.lies_within(i, o, packing.capacity) for i, o in enumerate(answer.offsets))


@given(problems(max_size=10), st.sampled_from([FirstFit(), BestFit(), FirstFit(order="begin"), BestFit(order="size")]))
@settings(max_examples=150, deadline=None)
def test_constructive_methods_keep_to_banks_and_pins(plan: Plan, method: Pass) -> None:
    """Or say that they found no place, without claiming that there is none unless one step shows it."""
    try:
        decision = method.apply(plan, AMPLE)
    except PlacementError as error:
        if error.proven:
            assert least_by_trying(plan) is None
        return
    assert findings(decision.plan) == []
    assert decision.certificate is not None
    assert decision.certificate.bound <= decision.certificate.value == arena(decision.plan)


def test_a_sum_of_banks_is_not_a_bank() -> None:
    """Three residences of 2 bytes fit 6 bytes, but not two banks of 3; the message says that there are banks."""
    items: list[Box] = [(0, 1, 2)] * 3
    assert findings(ExactPlacement().apply(banked(items, [6], 1), AMPLE).plan) == []
    with pytest.raises(PlacementError, match="in 6 bytes, banks of 3 and 3") as caught:
        ExactPlacement().apply(banked(items, [3, 3], 1), AMPLE)
    assert caught.value.proven
    assert len(caught.value.conflict) == 3


def test_a_component_may_end_below_the_bound() -> None:
    """A pin ends at 19; all else in units of 2 may then end at 18, which the search has to ask for."""
    items: list[Box] = [(0, 1, 1), (1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 6)]
    pin = Pin("b0", offset=18)
    certificates = [
        ExactPlacement(minimize=True).apply(banked(items, banks, 2, (pin,)), AMPLE).certificate
        for banks in ([4, 12, 4], [20])
    ]
    assert [(c.value, c.bound) for c in certificates if c is not None] == [(20, 20), (19, 19)]


def test_pins_in_each_others_way() -> None:
    """Both pinned buffers are the conflict, and nothing else."""
    items: list[Box] = [(0, 3, 4), (1, 4, 4), (2, 4, 1)]
    plan = banked(items, [16], 1, (Pin("b0", offset=0), Pin("b1", offset=2)))
    with pytest.raises(PlacementError) as caught:
        ExactPlacement().apply(plan, AMPLE)
    assert (caught.value.conflict, caught.value.proven) == ((0, 1), True)


def test_first_fit_goes_around_a_pin() -> None:
    """The pinned buffer is placed first, though it begins last."""
    plan = banked([(0, 4, 4), (0, 4, 4), (2, 4, 4)], [12], 1, (Pin("b2", offset=4),))
    placed = FirstFit(order="begin").apply(plan, AMPLE).plan
    assert sorted(r.offset or 0 for r in placed.residences or ()) == [0, 4, 8]
    assert findings(placed) == []
