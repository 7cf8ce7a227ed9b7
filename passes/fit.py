"""What each scratchpad costs: the additional traffic of one graph over a range of capacities, falling all the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from ..compiler.pipeline import Budget
from ..compiler.plan import Certificate, Plan, relative_gap
from ..compiler.verify import verify
from ..hw_models.model import HardwareModel, aligned_bytes
from .order._peak_search import aligned_peak
from .order.least_peak import LeastPeakOrder
from .order.problem import OrderProblem
from .planner import Planner
from .registry import make
from .residency.workset import least_capacity

__all__ = ["FitPoint", "traffic_by_capacity"]


@dataclass(frozen=True)
class FitPoint:
    """One capacity: the additional traffic of its plan, and what is proven of it.

    ``scope`` says what the bound ranges over, as in a ``Certificate``: every order, or every residency of the plan's.
    """

    capacity_bytes: int
    additional_bytes: int
    bound_bytes: int
    scope: Literal["order", "residency"]

    @property
    def gap(self) -> float:
        """``(additional - bound) / additional``; 0 is optimal."""
        return relative_gap(self.additional_bytes, self.bound_bytes)


def traffic_by_capacity(plan: Plan, planner: Planner, budget: Budget, points: int) -> list[FitPoint]:
    """Plan ``plan``'s graph for ``points`` capacities, from the least that works to the peak of an order.

    Capacities are spaced evenly on a logarithmic scale. The curve never rises: a plan for one capacity is a plan for
    every larger one, so the best so far stays until a better one is found, and its order is where the next search
    starts. Nor do bounds over every order rise: what must move through a scratchpad must move through a smaller one.
    Setting ``budget.stop`` ends it early, after one point at least.

    Raises:
        Infeasible: as ``Planner.plan``.
    """
    roomy = _roomy_order(plan, planner, budget)
    capacities = _capacities(roomy, points)
    found: list[FitPoint] = []
    start = plan
    for number, capacity in enumerate(capacities):
        if found and budget.stop.is_set():
            break
        if capacity == capacities[-1] and planner.order != "order/given":
            start = roomy
        share = budget.share(1 / (len(capacities) - number))
        sized = msgspec.structs.replace(start.with_order(start.order), machine=_machine(plan, capacity), passes=())
        planned = planner.plan(sized, share)
        point = _point(planned, capacity)
        if found and found[-1].additional_bytes < point.additional_bytes:
            point = _kept(planned, found[-1], capacity)
        else:
            start = planned
        found.append(point)
    return _lifted(found)


def _roomy_order(plan: Plan, planner: Planner, budget: Budget) -> Plan:
    """``plan`` in the order that tells which capacity is ample: the planner's, or for joint ones that of least peak."""
    least = msgspec.structs.replace(plan, machine=_machine(plan, least_capacity(plan)))
    order = LeastPeakOrder() if planner.order.startswith("joint/") else make(planner.order)
    return order.apply(least, budget.share(0.1)).plan


def _machine(plan: Plan, capacity_bytes: int) -> HardwareModel:
    return plan.machine.with_scratchpad(capacity_bytes)


def _capacities(roomy: Plan, points: int) -> list[int]:
    alignment = roomy.machine.scratchpad_memory.alignment_bytes
    least = least_capacity(roomy)
    most = max(least, aligned_peak(OrderProblem.of(roomy), roomy.order))
    steps = (least * (most / least) ** (i / (points - 1)) for i in range(points))
    return sorted({least, most, *(min(most, aligned_bytes(round(step), alignment)) for step in steps)})


def _point(planned: Plan, capacity: int) -> FitPoint:
    """What ``planned`` moves, beside the highest bound its passes have proven of it."""
    value = verify(msgspec.structs.replace(planned, passes=())).additional_bytes
    proven = _proven(planned)
    best = max(proven, key=lambda c: (c.bound, c.scope == "order"), default=None)
    if best is None:
        return FitPoint(capacity, value, 0, "order")
    return FitPoint(capacity, value, min(best.bound, value), "order" if best.scope == "order" else "residency")


def _kept(planned: Plan, before: FitPoint, capacity: int) -> FitPoint:
    """The plan of the point before in a larger scratchpad, beside what ``planned`` has proven there of every order."""
    bound = max((c.bound for c in _proven(planned) if c.scope == "order"), default=0)
    return FitPoint(capacity, before.additional_bytes, min(bound, before.additional_bytes), "order")


def _proven(planned: Plan) -> list[Certificate]:
    """What is proven of the plan's traffic; of its order, only what is proven of the residency it has."""
    traffic = [c for c in planned.certificates if c.objective == "additional_traffic_bytes"]
    return [c for c in traffic[:-1] if c.scope == "order"] + traffic[-1:]


def _lifted(points: list[FitPoint]) -> list[FitPoint]:
    """Bounds over every order carried down to smaller capacities."""
    lifted: list[FitPoint] = []
    highest = 0
    for point in reversed(points):
        if highest >= point.bound_bytes:
            point = replace(point, bound_bytes=min(highest, point.additional_bytes), scope="order")
        if point.scope == "order":
            highest = max(highest, point.bound_bytes)
        lifted.append(point)
    return lifted[::-1]
