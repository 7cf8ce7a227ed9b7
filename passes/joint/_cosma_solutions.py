"""From a solution of COSMA's model to a plan and back: exact in integers, whatever the solver's tolerances let through.

A model's solution is an order and, for each version, the steps at which it is retrieved. The gap between two uses is
kept if the version is not retrieved in between or at the second one, and dropped otherwise. Writing that down with
``residency/emit`` moves no more bytes: every dropped gap has a retrieval of its own in the solution, and every version
not backed that has one was spilled; and at each step the emitted plan holds the operator's working set and the kept
gaps across it, all of which the solution holds as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.plan import Plan
from ...compiler.verify import verify
from ..address.exact import ExactPlacement
from ..address.placement import PlacementError
from ..residency.belady import furthest_next_use
from ..residency.emit import emit
from ..residency.eviction import evict, refill
from ..residency.formulation import reduce
from ..residency.gaps import GapProblem, gaps_of_residences
from ..residency.least_cost import least_cost
from ..residency.search import repair
from ._cosma_addresses import Heights, restacked
from ._cosma_model import Decided, Key
from ._cosma_problem import CosmaProblem
from .linear import LinearAllocation

__all__ = [
    "Found",
    "decided_of",
    "dropped_of",
    "first_fetches",
    "heuristic",
    "placed_heuristic",
    "polished",
    "written",
    "written_placed",
]

RESERVES = (64, 16, 8, 4)  # the capacity's n-th parts held back so that addresses find room, one after the other
PLACING_EFFORT = 2.0  # deterministic seconds of each question to address/exact


@dataclass(frozen=True)
class Found:
    """A plan with its additional traffic in bytes, and what was dropped of its order's gaps."""

    plan: Plan
    value: int
    dropped: frozenset[int]


def dropped_of(of: CosmaProblem, gaps: GapProblem, decided: Decided) -> frozenset[int]:
    """The gaps of the decided order during which, or at whose end, their version is retrieved."""
    lifetimes = {lifetime.buffer: lifetime for lifetime in gaps.lifetimes}
    dropped = set()
    for i, interval in enumerate(gaps.intervals):
        buffer, after = interval.gap
        v = of.index[buffer, lifetimes[buffer].versions[after]]
        if any((v, step) in decided[1] for step in range(interval.begin, interval.end + 1)):
            dropped.add(i)
    return frozenset(dropped)


def first_fetches(of: CosmaProblem, order: Sequence[int]) -> frozenset[Key]:
    """Each source's version and the step of its first use."""
    position = {op: step for step, op in enumerate(order)}
    return frozenset(
        (v, min(position[user] for user in version.users))
        for v, version in enumerate(of.versions)
        if version.creator is None
    )


def decided_of(of: CosmaProblem, order: tuple[int, ...], gaps: GapProblem, dropped: Collection[int]) -> Decided:
    """The order, and a retrieval at the end of every dropped gap and at each source's first use."""
    lifetimes = {lifetime.buffer: lifetime for lifetime in gaps.lifetimes}
    fetched = set()
    for i in dropped:
        buffer, after = gaps.intervals[i].gap
        fetched.add((of.index[buffer, lifetimes[buffer].versions[after]], gaps.intervals[i].end))
    return order, first_fetches(of, order) | fetched


def polished(gaps: GapProblem, dropped: Collection[int]) -> frozenset[int]:
    """``dropped`` and what else it takes to fit, less what none needs: never worse than a choice that fits."""
    reduction = reduce(gaps)
    chosen = set(reduction.dropped)
    for block in reduction.blocks:
        chosen |= repair(block, block.cost.keys() & set(dropped))
    return frozenset(chosen)


def written(plan: Plan, gaps: GapProblem, dropped: Collection[int]) -> Found:
    """``plan``'s order with this residency; no addresses."""
    return Found(emit(plan, gaps, dropped), gaps.additional_bytes(dropped), frozenset(dropped))


def written_placed(
    plan: Plan, gaps: GapProblem, dropped: Collection[int], budget: Budget, heights: Heights | None = None
) -> Found | None:
    """The same with addresses: by ``heights`` if that ends within the capacity, else by ``address/exact``.

    ``None`` where no placement was found, in time or at all.
    """
    found = written(plan, gaps, dropped)
    if heights is not None:
        stacked = restacked(found.plan, heights)
        if verify(msgspec.structs.replace(stacked, passes=())).ok:  # what passes before claimed is decided again
            return Found(stacked, found.value, found.dropped)
    try:
        placed = _placed(found.plan, budget)
    except PlacementError:
        return None
    return Found(placed, found.value, found.dropped)


def _placed(plan: Plan, budget: Budget) -> Plan:
    quiet = replace(budget, listen=lambda _: None)  # the progress of placing is about arenas, not about traffic
    return ExactPlacement(effort=PLACING_EFFORT).apply(plan, quiet).plan


def heuristic(plan: Plan, reserve_bytes: int = 0) -> tuple[GapProblem, frozenset[int]]:
    """The plan's order with the cheaper of the two replacement rules."""
    gaps = GapProblem.of(plan, reserve_bytes=reserve_bytes)
    walks = (refill(gaps, evict(gaps, choose)) for choose in (least_cost, furthest_next_use))
    return gaps, frozenset(min(walks, key=gaps.additional_bytes))


def placed_heuristic(plan: Plan, budget: Budget) -> Found:
    """The same, placed: with more and more of the capacity held back, else by linear allocation, which always places.

    Raises:
        PlacementError: there are pins or banks, and not even the operators' working sets were placed one by one.
    """
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    fallback = None if plan.pins or plan.machine.scratchpad_memory.banks_bytes else _linear(plan, budget)
    for reserve in (0, *(capacity // part for part in RESERVES)):
        if reserve and not budget.remaining_s:
            break
        gaps, dropped = heuristic(plan, reserve)
        if fallback is not None and gaps.additional_bytes(dropped) >= fallback.value:
            break
        found = written_placed(plan, gaps, dropped, budget.share(0.3 if reserve else 0.6))
        if found is not None:
            return found
    if fallback is not None:
        return fallback
    gaps = GapProblem.of(plan)
    everything = range(len(gaps.intervals))
    placed = _placed(emit(plan, gaps, everything), budget)
    return Found(placed, gaps.additional_bytes(everything), frozenset(everything))


def _linear(plan: Plan, budget: Budget) -> Found:
    """The better of the two baselines of ``joint/linear``."""
    gaps = GapProblem.of(plan)
    found = []
    for method in (LinearAllocation("belady"), LinearAllocation("greedy")):
        placed = method.apply(plan, budget).plan
        kept = gaps_of_residences(placed, range(len(placed.residences or ()))).gaps
        dropped = frozenset(i for i, interval in enumerate(gaps.intervals) if interval.gap not in kept)
        found.append(Found(placed, gaps.additional_bytes(dropped), dropped))
    return min(found, key=lambda one: one.value)
