"""What each scratchpad costs: the additional traffic of one graph over a range of capacities, falling all the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from ..compiler.pipeline import Budget
from ..compiler.plan import Certificate, Plan, relative_gap
from .planner import Planner
from .registry import make
from .residency.workset import aligned_bytes, least_capacity

__all__ = ["FitPoint", "traffic_by_capacity"]


@dataclass(frozen=True)
class FitPoint:
    """One capacity: the additional traffic of its plan, and the bound proven for that plan's own order."""

    capacity_bytes: int
    additional_bytes: int
    bound_bytes: int

    @property
    def gap(self) -> float:
        """``(additional - bound) / additional``; 0 is optimal for the order."""
        return relative_gap(self.additional_bytes, self.bound_bytes)


def traffic_by_capacity(plan: Plan, planner: Planner, budget: Budget, points: int) -> Iterator[FitPoint]:
    """Plan ``plan``'s graph for ``points`` capacities, from the least that works to the peak of its order.

    Capacities are spaced evenly on a logarithmic scale. The curve never rises: each capacity also tries the order of
    the one before it, and what fits a smaller scratchpad fits a larger one. Setting ``budget.stop`` ends it early.
    """
    capacities = _capacities(plan, planner, budget, points)
    best: FitPoint | None = None
    order: tuple[int, ...] | None = None
    for number, capacity in enumerate(capacities):
        if budget.stop.is_set():
            return
        share = budget.share(1 / (len(capacities) - number))
        sized = msgspec.structs.replace(plan, machine=plan.machine.with_scratchpad(capacity))
        point, found = _point(planner.plan(sized, share.share(0.6 if order else 1.0)), capacity)
        if best is not None and order is not None and found != order:
            again = replace(planner, order="order/given").plan(sized.with_order(order), share)
            point, found = min((point, found), _point(again, capacity), key=lambda p: p[0].additional_bytes)
        if best is not None and point.additional_bytes > best.additional_bytes:
            bound = min(point.bound_bytes, best.additional_bytes) if found == order else 0
            point = FitPoint(capacity, best.additional_bytes, bound)
        else:
            order = found
        best = point
        yield point


def _capacities(plan: Plan, planner: Planner, budget: Budget, points: int) -> list[int]:
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    least = least_capacity(plan)
    sized = msgspec.structs.replace(plan, machine=plan.machine.with_scratchpad(least))
    ordered = make(planner.order).apply(sized, budget.share(0.1)).plan
    most = max(least, _aligned_peak(ordered, alignment))
    steps = (least * (most / least) ** (i / (points - 1)) for i in range(points))
    return sorted({least, most, *(min(most, aligned_bytes(round(step), alignment)) for step in steps)})


def _aligned_peak(plan: Plan, alignment: int) -> int:
    """Capacity that holds every buffer from its first to its last use, each size rounded up to ``alignment``."""
    graph, streamed = plan.graph, set(plan.streamed)
    uses: dict[str, list[int]] = {}
    for position, op in enumerate(plan.order):
        for buffer in graph.touches[op]:
            if buffer not in streamed:
                uses.setdefault(buffer, []).append(position)
    change = [0] * (len(graph.ops) + 1)
    for buffer, positions in uses.items():
        size = aligned_bytes(graph.buffers[buffer].nbytes, alignment)
        change[positions[0]] += size
        change[positions[-1] + 1] -= size
    live = peak = 0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak


def _point(plan: Plan, capacity: int) -> tuple[FitPoint, tuple[int, ...]]:
    traffic: list[Certificate] = [c for c in plan.certificates if c.objective == "additional_traffic_bytes"]
    return FitPoint(capacity, traffic[-1].value, traffic[-1].bound), plan.order
