"""Solving one block of the gap ILP, from an incumbent, to a bound in whole bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from ...compiler.pipeline import Budget
from .._solver.highs import Solution, solve
from .formulation import Block, Row, build, objective_unit

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
    """The best choice for ``block`` at least as good as ``incumbent``, which must satisfy every row.

    Whether a solution frees enough is checked in exact integers. A row missed by the solver's tolerances is repaired
    for the incumbent, and forbidden before solving once more. ``relax`` asks for the bound of the LP relaxation only.
    """
    unit = objective_unit(block)
    best, bound = incumbent, 0
    extra: tuple[Row, ...] = ()
    for _ in range(MAX_ROUNDS):
        solution = _solve(replace(block, rows=block.rows + extra), unit, best, budget, relax=relax, tell=tell)
        bound = max(bound, _bound_bytes(solution, unit, block))
        if relax:
            return BlockResult(best, bound, solution.status == "optimal")
        chosen = {i for i in block.cost if solution.values.get(f"drop_{i}", 0.0) > 0.5}
        missed = [row for row in block.rows if not row.satisfied_by(chosen)] if solution.values else []
        if solution.values:
            best = min(best, repair(block, chosen), key=block.moved_bytes)
        if not missed or solution.status != "optimal":
            break
        extra += tuple(_cover(row, chosen) for row in missed)
    value = block.moved_bytes(best)
    return BlockResult(best, min(bound, value), bound >= value)


def repair(block: Block, dropped: Collection[int]) -> frozenset[int]:
    """``dropped`` and what else it takes to satisfy every row, less whatever no row needs."""
    chosen = set(dropped)
    for row in block.rows:
        cheapest = sorted(row.terms, key=lambda term: (block.cost[term[0]] / term[1], term[0]))
        for i, _ in cheapest:
            if row.satisfied_by(chosen):
                break
            chosen.add(i)
    rows_of: dict[int, list[Row]] = {i: [] for i in block.cost}
    for row in block.rows:
        for i, _ in row.terms:
            rows_of[i].append(row)
    for i in sorted(chosen, key=lambda i: (-block.cost[i], i)):
        rest = chosen - {i}
        if all(row.satisfied_by(rest) for row in rows_of[i]):
            chosen = rest
    return frozenset(chosen)


def _solve(
    block: Block, unit: int, incumbent: frozenset[int], budget: Budget, *, relax: bool, tell: Teller | None
) -> Solution:
    start = {f"drop_{i}": float(i in incumbent) for i in block.cost}
    for v, (_, sharers) in enumerate(block.shared):
        start[f"store_{v}"] = float(any(i in incumbent for i in sharers))
    value = block.moved_bytes(incumbent)

    def listen(objective: float | None, bound: float | None) -> None:
        if tell is not None:
            found = value if objective is None else min(value, unit * round(objective))
            tell(found, 0 if bound is None else min(found, unit * _sound_ceil(bound, block)))

    return solve(
        build(block, unit),
        budget,
        start={} if relax else start,
        relax=relax,
        absolute_gap=0.99,  # objectives are whole units: less than one apart is no distance
        max_nodes=MAX_NODES if budget.deterministic else None,
        listen=listen,
    )


def _bound_bytes(solution: Solution, unit: int, block: Block) -> int:
    return unit * _sound_ceil(solution.bound, block) if math.isfinite(solution.bound) else 0


def _sound_ceil(bound: float, block: Block) -> int:
    """The least whole number of units not below ``bound``, after taking off what tolerances may have added.

    Each reduced cost may be off by the dual tolerance, 1e-7, over a range of 1; sums by a few units in the last place.
    """
    columns = len(block.cost) + len(block.shared)
    return max(0, math.ceil(bound - 1e-6 - 1e-7 * columns - 1e-9 * abs(bound)))


def _cover(row: Row, dropped: Collection[int]) -> Row:
    """At least one of the row's intervals that are kept must be dropped: those it has dropped do not free enough."""
    return Row(tuple((i, 1) for i, _ in row.terms if i not in dropped), 1)
