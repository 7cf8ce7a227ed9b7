"""The gap ILP: the least additional traffic of a fixed order, with a certificate."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from ...errors import OptionError
from .belady import furthest_next_use
from .emit import emit
from .eviction import evict, refill
from .formulation import Block, Reduction, reduce
from .gaps import Cut, Gap, GapProblem, gaps_of_residences
from .least_cost import least_cost
from .search import BlockResult, repair, search_block
from .workset import require_fit

__all__ = ["Cut", "Gap", "IlpResidency", "gaps_of_residences"]


@dataclass(frozen=True)
class IlpResidency:
    """Keep or drop every gap between two uses of a buffer so that the fewest bytes move.

    *Given* a plan with an order. *Result*: loads, stores and residences, never worse than ``residency/belady`` and
    ``residency/least_cost``, with a bound over every residency of that order; equal to it unless time runs out.

    Minimise ``sum(nbytes[i] * drop[i]) + sum(nbytes[v] * store[v])`` subject to, at each position ``p``,
    ``sum(size[i] * drop[i] for i across p) >= need[p]``, to ``store[v] >= drop[i]`` for each gap ``i`` of version
    ``v``, and to ``sum(drop[i] for i in cut) >= 1`` for each of ``cuts``, gaps that address assignment proved
    impossible to keep together. ``reserve_bytes`` of the capacity are left free, except where an operator needs them,
    so that addresses find room; the bound, then from the LP relaxation, is one for the full capacity all the same. In
    deterministic mode the search is limited by nodes; if the deadline comes first nevertheless, the note says so.
    """

    cuts: tuple[Cut, ...] = field(default=(), metadata={"internal": True})  # the planner's, for one order
    reserve_bytes: int = 0

    def __post_init__(self) -> None:
        if self.reserve_bytes < 0:
            raise OptionError(f"option 'reserve_bytes' of pass {self.name!r} is {self.reserve_bytes}, not 0 or more")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "residency/ilp"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide residency. Raises Infeasible as ``require_fit``, OptionError for cuts of another order."""
        require_fit(plan)
        problem = GapProblem.of(plan, reserve_bytes=self.reserve_bytes)
        reduction = reduce(problem, self.cuts)
        starts = _starts(problem, reduction.blocks)
        base = problem.additional_bytes(reduction.dropped)
        results = _search(self.name, base, reduction.blocks, starts, budget.share(0.7 if self.reserve_bytes else 1.0))
        dropped = reduction.dropped.union(*(result.dropped for result in results))
        value = problem.additional_bytes(dropped)
        bound = base + sum(result.bound_bytes for result in results)
        if self.reserve_bytes:
            bound = min(value, _relaxed_bound(plan, self.cuts, budget))
        certificate = Certificate(
            "additional_traffic_bytes", value, bound, "lp" if self.reserve_bytes else "ilp", "residency"
        )
        return Decision(emit(plan, problem, dropped), certificate, _note(problem, reduction, results, budget))


def _starts(problem: GapProblem, blocks: tuple[Block, ...]) -> list[frozenset[int]]:
    """For each block, the cheapest of the heuristics' choices, made to satisfy its rows."""
    walks = [refill(problem, evict(problem, choose)) for choose in (furthest_next_use, least_cost)]
    return [
        min((repair(block, walk.intersection(block.cost)) for walk in walks), key=block.moved_bytes) for block in blocks
    ]


def _search(
    name: str, base: int, blocks: tuple[Block, ...], starts: list[frozenset[int]], budget: Budget
) -> list[BlockResult]:
    """Search block by block, the small ones first, each with a share of the time left that grows with its size."""
    begin = time.monotonic()
    values = [block.moved_bytes(start) for block, start in zip(blocks, starts, strict=True)]
    bounds = [0] * len(blocks)

    def tell(b: int, value: int, bound: int) -> None:
        values[b], bounds[b] = value, max(bounds[b], bound)
        budget.listen(Progress(name, time.monotonic() - begin, base + sum(values), base + sum(bounds)))

    results = [BlockResult(start, 0, complete=False) for start in starts]
    queue = sorted(range(len(blocks)), key=lambda b: len(blocks[b].cost))
    total = list(accumulate(len(blocks[b].cost) for b in queue))
    for b, until in zip(queue, total, strict=True):
        share = len(blocks[b].cost) / (total[-1] - until + len(blocks[b].cost))
        results[b] = search_block(blocks[b], starts[b], budget.share(share), tell=partial(tell, b))
        tell(b, blocks[b].moved_bytes(results[b].dropped), results[b].bound_bytes)
    return results


def _relaxed_bound(plan: Plan, cuts: Iterable[Cut], budget: Budget) -> int:
    """Additional traffic that no residency in the full capacity avoids, by the LP relaxation."""
    problem = GapProblem.of(plan)
    reduction = reduce(problem, cuts)
    starts = _starts(problem, reduction.blocks)
    return problem.additional_bytes(reduction.dropped) + sum(
        search_block(block, start, budget, relax=True).bound_bytes
        for block, start in zip(reduction.blocks, starts, strict=True)
    )


def _note(problem: GapProblem, reduction: Reduction, results: list[BlockResult], budget: Budget) -> str:
    open_count = sum(len(block.cost) for block in reduction.blocks)
    note = f"{open_count} of {len(problem.intervals)} gaps open, in {len(reduction.blocks)} blocks"
    if all(result.complete for result in results):
        return note
    if budget.deterministic and budget.remaining_s > 0:
        return f"{note}; the search limit came first"
    return f"{note}; the time limit came first" + (", so another run may differ" if budget.deterministic else "")
