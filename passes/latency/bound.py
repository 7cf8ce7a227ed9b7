"""A latency no plan of the graph goes below, whatever its order, residency and placement."""

from __future__ import annotations

import math

from ...compiler.plan import Certificate, Plan
from ...compiler.simulate import latency_ns, simulate, timeline_summary
from ...hw_models.cost import transfer_seconds
from ...hw_models.model import Direction

__all__ = ["latency_bound_s", "latency_certificate"]


def latency_certificate(plan: Plan) -> Certificate:
    """The latency ``plan`` has when simulated, in nanoseconds, against ``latency_bound_s``."""
    value = latency_ns(plan)
    # Sums of floats taken in another order differ in their last digits, so the bound may round past the value.
    return Certificate("latency_ns", value, min(value, math.floor(latency_bound_s(plan) * 1e9)), "analytic", "order")


def latency_bound_s(plan: Plan) -> float:
    """Seconds that every plan of ``plan``'s graph takes on its machine with the same buffers streamed.

    The larger of two: all operators one after another, shared among the compute engines, between the loads of the
    operands of some operator that can run first and the stores of the results of one that can run last; and the
    compulsory transfers one after another, shared among the engines that take them.
    """
    graph, machine = plan.graph, plan.machine
    streamed = frozenset(plan.streamed)
    seconds = {
        direction: {b: _fastest(plan, b, direction) for b, base in graph.buffers.items() if base.nbytes}
        for direction in (Direction.LOAD, Direction.STORE)
    }
    loads = {b: seconds[Direction.LOAD][b] for reads in graph.reads for b in reads if _is_loaded(plan, streamed, b)}
    stores = {b: seconds[Direction.STORE][b] for b in graph.output_buffers if graph.buffers[b].nbytes}
    takers = {d: sum(e.copies(d) for e in machine.engines) for d in (Direction.LOAD, Direction.STORE)}
    copying = sum(e.copies(Direction.LOAD) or e.copies(Direction.STORE) for e in machine.engines)
    head = min(
        (sum(loads.get(b, 0.0) for b in graph.reads[i]) for i, before in enumerate(graph.predecessors) if not before),
        default=0.0,
    )
    tail = min(
        (sum(stores.get(b, 0.0) for b in graph.writes[i]) for i, behind in enumerate(graph.successors) if not behind),
        default=0.0,
    )
    ordered = Plan.of_order(graph, machine, streamed=plan.streamed)
    compute = timeline_summary(simulate(ordered)).compute_bound_s
    return max(
        head / takers[Direction.LOAD] + compute + tail / takers[Direction.STORE],
        sum(loads.values()) / takers[Direction.LOAD],
        sum(stores.values()) / takers[Direction.STORE],
        (sum(loads.values()) + sum(stores.values())) / copying,
    )


def _is_loaded(plan: Plan, streamed: frozenset[str], buffer: str) -> bool:
    base = plan.graph.buffers[buffer]
    return base.role.is_source and base.nbytes > 0 and buffer not in streamed


def _fastest(plan: Plan, buffer: str, direction: Direction) -> float:
    nbytes = plan.graph.buffers[buffer].nbytes
    return min(transfer_seconds(nbytes, engine) for engine in plan.machine.engines if engine.copies(direction))
