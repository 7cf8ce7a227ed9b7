"""Solving one block of the gap ILP, from an incumbent, to a bound in whole bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from ...compiler.pipeline import Budget
from .._solver.highs import Solution, solve, whole_units
from .formulation import Block
from .model import build, objective_unit

__all__ = ["BlockResult", "repair", "search_block"]

MAX_NODES = 10_000  # the search tree of one block in deterministic mode, where no clock may decide
MAX_ROUNDS = 5  # how often a model is tightened because the solver's tolerances let a row be missed

#: Called with the bytes moved by a block's incumbent and its bound.
Teller = Callable[[int, int], None]


@dataclass(frozen=True)
class BlockResult:
    """The best choice found for a block, bytes proven to move under any choice, and whether the search was complete."""

    dropped: frozenset[int]
    bound_bytes: int
    complete: bool


def search_block(
    block: Block, incumbent: frozenset[int], budget: Budget, *, relax: bool = False, tell: Teller | None = None
) -> BlockResult:
    """The best choice for ``block`` at least as good as ``incumbent``, which must satisfy every constraint.

    Whether a solution frees enough is checked in exact integers. What the solver's tolerances let through is repaired
    for the incumbent, and forbidden before solving once more. ``relax`` asks for the LP relaxation's bound only.
    """
    best, bound, tightened = incumbent, 0, block
    for _ in range(MAX_ROUNDS):
        if budget.remaining_s <= 0:
            break
        solution = _solve(tightened, best, budget, relax=relax, tell=tell)
        bound = max(bound, _bound_bytes(solution.bound, block))
        if relax or not solution.values:
            break
        chosen = frozenset(i for i in block.cost if solution.values[f"drop_{i}"] > 0.5)
        best = min(best, repair(block, chosen), key=block.moved_bytes)
        covers = _missed_covers(block, chosen)
        if not covers or solution.status != "optimal":
            break
        tightened = replace(tightened, cuts=tightened.cuts + covers)
    value = block.moved_bytes(best)
    return BlockResult(best, min(bound, value), bound >= value)


def repair(block: Block, dropped: Collection[int]) -> frozenset[int]:
    """``dropped`` and what else it takes to satisfy every constraint, less whatever none needs."""
    chosen = set(dropped)
    for cut in block.cuts:
        if chosen.isdisjoint(cut):
            chosen.add(min(cut, key=lambda i: (block.cost[i], i)))
    freed = [capacity.freed(chosen) for capacity in block.capacities]
    for d, capacity in enumerate(block.capacities):
        members = capacity.members() if (freed[d] < capacity.need).any() else []
        for r in np.flatnonzero(freed[d] < capacity.need):
            candidates = sorted(set(members[r]) - chosen, key=lambda i: (block.cost[i] / capacity.spans[i][2], i))
            for i in candidates:
                if freed[d][r] < capacity.need[r]:
                    chosen.add(i)
                    _change(block, freed, i, 1)
    for i in sorted(chosen, key=lambda i: (-block.cost[i], i)):
        _change(block, freed, i, -1)
        if _frees_enough(block, freed, i) and all(i not in cut or len(chosen & cut) > 1 for cut in block.cuts):
            chosen.remove(i)
        else:
            _change(block, freed, i, 1)
    return frozenset(chosen)


def _change(block: Block, freed: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]], i: int, sign: int) -> None:
    for d, capacity in enumerate(block.capacities):
        if i in capacity.spans:
            first, behind, size = capacity.spans[i]
            freed[d][first:behind] += sign * size


def _frees_enough(block: Block, freed: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]], i: int) -> bool:
    """Whether the rows that ``i`` spans have enough freed."""
    for d, capacity in enumerate(block.capacities):
        first, behind, _ = capacity.spans.get(i, (0, 0, 0))
        if (freed[d][first:behind] < capacity.need[first:behind]).any():
            return False
    return True


def _missed_covers(block: Block, chosen: frozenset[int]) -> tuple[frozenset[int], ...]:
    """For each row that ``chosen`` frees too little of, the intervals it keeps there: one of them must go."""
    covers: list[frozenset[int]] = []
    for capacity in block.capacities:
        missed = np.flatnonzero(capacity.freed(chosen) < capacity.need)
        members = capacity.members() if len(missed) else []
        covers.extend(frozenset(members[r]) - chosen for r in missed)
    return tuple(covers)


def _solve(block: Block, incumbent: frozenset[int], budget: Budget, *, relax: bool, tell: Teller | None) -> Solution:
    unit = objective_unit(block)
    start = {f"drop_{i}": float(i in incumbent) for i in block.cost}
    for v, (_, sharers) in enumerate(block.shared):
        start[f"store_{v}"] = float(any(i in incumbent for i in sharers))
    value = block.moved_bytes(incumbent)

    def listen(objective: float | None, bound: float | None) -> None:
        if tell is not None:
            found = value if objective is None else min(value, unit * round(objective))
            tell(found, 0 if bound is None else min(found, _bound_bytes(bound, block)))

    return solve(
        build(block),
        budget,
        start={} if relax else start,
        relax=relax,
        absolute_gap=0.99,  # objectives are whole units: less than one apart is no distance
        max_nodes=MAX_NODES if budget.deterministic else None,
        listen=listen,
    )


def _bound_bytes(bound: float, block: Block) -> int:
    """The least bytes a whole number of units can move that is not below ``bound``."""
    return objective_unit(block) * whole_units(bound, len(block.cost) + len(block.shared))
