"""Order and addresses together, for the least arena that holds a graph without anything ever leaving it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from ..compiler.pipeline import Budget, run_pass
from ..compiler.plan import Certificate, PassRecord, Plan
from ..errors import Infeasible
from .address.exact import ExactPlacement
from .address.placement import PlacementError
from .objective.neighbours import one_moved
from .order._peak_search import aligned_peak
from .order.least_peak import LeastPeakOrder
from .order.problem import OrderProblem
from .residency.least_cost import LeastCostResidency

__all__ = ["least_arena", "orders_alike"]

ORDERS = 8  # orders of the same peak that are tried
MOVES = 200  # attempts to move one operator between one order and the next


def least_arena(plan: Plan, budget: Budget) -> Plan:
    """``plan`` in an order of least peak, its buffers kept from first to last use, placed in the least arena found.

    No placement undercuts the peak of its order, so the bound of ``order/least_peak`` is one on the arena of every
    order, as long as nothing is spilled. Where the placements of an order do not reach its peak, others of the same
    peak are tried. The last certificate of the result states arena and bound.

    Raises:
        Infeasible: the scratchpad is smaller than the peak, or no placement was found within it.
    """
    begin = time.monotonic()
    ordered = run_pass(LeastPeakOrder(), plan, budget.share(0.5))
    problem = OrderProblem.of(ordered)
    peak = aligned_peak(problem, ordered.order)
    capacity = ordered.machine.scratchpad_memory.capacity_bytes
    if peak > capacity:
        raise Infeasible(
            f"the graph needs {peak:,} bytes at once in the best order found, the scratchpad has {capacity:,}",
            required_bytes=peak,
            available_bytes=capacity,
            hint="a planner with residencies spills what does not fit",
        )
    proven = ordered.certificates[-1]
    best: Plan | None = None
    failure: PlacementError | None = None
    for tried, order in enumerate(orders_alike(problem, ordered.order, budget), 1):
        try:
            placed = _placed(ordered, order, budget.share(0.4))
        except PlacementError as error:
            failure = error
        else:
            best = placed if best is None or _arena(placed) < _arena(best) else best
        if tried == ORDERS or not budget.remaining_s or (best is not None and _arena(best) <= peak):
            break
    if best is None:
        assert failure is not None  # the first order is always tried
        raise failure
    bound = min(proven.bound, _arena(best))
    certificate = Certificate("arena_bytes", _arena(best), bound, proven.proved_by, "order")
    note = f"{tried} orders of least peak tried, nothing spilled"
    return best.with_record(PassRecord("arena", time.monotonic() - begin, certificate, note))


def _placed(ordered: Plan, order: Sequence[int], budget: Budget) -> Plan:
    """``ordered`` in ``order``, with residences for whole lifetimes, placed. Raises PlacementError."""
    plan = ordered if tuple(order) == ordered.order else ordered.with_order(order)
    resident = run_pass(LeastCostResidency(), plan, budget)
    return run_pass(ExactPlacement(minimize=True), resident, budget)


def _arena(plan: Plan) -> int:
    return plan.certificates[-1].value


def orders_alike(problem: OrderProblem, order: Sequence[int], budget: Budget) -> Iterator[tuple[int, ...]]:
    """``order``, then without end others with a peak as low, each some random moves of one operator from the last."""
    current = list(order)
    peak = aligned_peak(problem, current)
    draw = random.Random(budget.seed)  # seeded: variety, not secrecy
    while True:
        yield tuple(current)
        for _ in range(MOVES if len(current) > 1 else 0):
            moved = one_moved(problem, current, draw)
            if moved != current and aligned_peak(problem, moved) <= peak:
                current = moved
