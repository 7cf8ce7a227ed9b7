"""The independent judge of plans: recounts everything a plan claims.

Knows no solver and shares no helper with a pass. Slow and plain on purpose, yet never more than a sort away from
linear, so that plans of 100,000 instructions can be judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..plan import Plan, Residence
from .address import check_capacity, check_regions, peak_of_order, peak_of_residences
from .claims import check_claims
from .facts import Facts, count_facts
from .faults import Fault, Finding
from .order import check_names, check_order, check_whole
from .pins import check_pins
from .ranks import verify_ranks
from .residency import check_residences, replay
from .timing import check_times, is_timed
from .traffic import BufferTraffic, count_traffic

__all__ = ["BufferTraffic", "Fault", "Finding", "Level", "Verification", "verify", "verify_ranks"]

Level = Literal["order", "residency", "address", "timed"]


@dataclass(frozen=True)
class Verification:
    """What the verifier counted; ``faults`` is empty for a plan that is right as far as it is decided.

    ``compulsory_bytes`` is what every plan of the graph moves, ``total_bytes`` what this one moves. ``peak_bytes`` is
    the largest sum of resident bytes, for an order the least that needs no additional traffic. ``arena_bytes`` is the
    end of the highest region, 0 without offsets. ``level`` is the last decision the plan has taken.
    """

    faults: tuple[Finding, ...]
    compulsory_bytes: int
    additional_bytes: int
    total_bytes: int
    peak_bytes: int
    arena_bytes: int
    traffic: tuple[BufferTraffic, ...]
    level: Level

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


def verify(plan: Plan) -> Verification:
    """Judge ``plan`` at the level it has reached; raises nothing."""
    facts = count_facts(plan)
    traffic = count_traffic(plan, facts)
    known = _within_steps(plan, tuple(r for r in plan.residences or () if r.buffer in facts.nbytes))
    placed = tuple(r for r in known if r.memory == plan.machine.scratchpad)
    peak = peak_of_order(plan, facts) if plan.residences is None else peak_of_residences(facts, placed)[0]
    compulsory = sum(row.compulsory_bytes for row in traffic)
    total = sum(row.total_bytes for row in traffic)
    arena = max((r.offset + facts.nbytes[r.buffer] for r in placed if r.offset is not None), default=0)
    claims = check_claims(plan, total - compulsory, arena)
    return Verification(
        faults=(*_findings(plan, facts, known, placed), *claims),
        compulsory_bytes=compulsory,
        additional_bytes=total - compulsory,
        total_bytes=total,
        peak_bytes=peak,
        arena_bytes=arena,
        traffic=traffic,
        level=_level(plan),
    )


def _findings(
    plan: Plan, facts: Facts, known: tuple[Residence, ...], placed: tuple[Residence, ...]
) -> Iterator[Finding]:
    yield from check_whole(plan)
    yield from check_names(plan, facts)
    yield from check_order(plan, facts)
    if plan.residences is not None:
        unclipped = tuple(r for r in plan.residences if r.buffer in facts.nbytes)
        yield from check_residences(plan, facts, unclipped)
        yield from replay(plan, facts, known)
        yield from check_capacity(plan, facts, placed)
        yield from check_regions(plan, facts, placed)
        yield from check_pins(plan, facts, placed)
    if is_timed(plan):
        yield from check_times(plan, facts, placed)


def _within_steps(plan: Plan, residences: tuple[Residence, ...]) -> tuple[Residence, ...]:
    """The part of each residence that lies within the plan's steps."""
    steps = len(plan.instructions)
    clipped = (
        Residence(r.buffer, r.memory, max(0, r.begin), min(steps, r.end), r.offset)
        if r.begin < 0 or r.end > steps
        else r
        for r in residences
    )
    return tuple(r for r in clipped if r.begin < r.end)


def _level(plan: Plan) -> Level:
    """How far the decisions go without a gap; an order may be simulated, but its bytes have no place yet."""
    if plan.residences is None:
        return "order"
    if any(r.offset is None for r in plan.residences):
        return "residency"
    return "timed" if is_timed(plan) else "address"
