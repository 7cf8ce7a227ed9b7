"""A latency no plan of the graph goes below, whatever its order, residency and placement."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...compiler.plan import Certificate, Plan
from ...compiler.simulate import latency_ns, simulate, timeline_summary
from ...hw_models.cost import transfer_seconds
from ...hw_models.model import Direction, EngineKind

__all__ = ["latency_bound_of_order_s", "latency_bound_s", "latency_certificate"]


def latency_certificate(plan: Plan, scope: Literal["order", "residency"]) -> Certificate:
    """The simulated latency of ``plan``, in nanoseconds, against the bound for every order or for its own."""
    value = latency_ns(plan)
    bound_s = latency_bound_s(plan) if scope == "order" else latency_bound_of_order_s(plan)
    # Sums of floats taken in another order differ in their last digits, so the bound may round past the value.
    return Certificate("latency_ns", value, min(value, math.floor(bound_s * 1e9)), "analytic", scope)


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


def latency_bound_of_order_s(plan: Plan) -> float:
    """Seconds that every plan with ``plan``'s order takes, whatever its residency, placement and issue.

    At least ``latency_bound_s``. With one compute engine, operator ``k`` starts after ``finish[j]`` of each ``j``
    before it, and after what must be loaded in between, of the sources first used behind ``j`` and by ``k`` at the
    latest:

    * all bytes beyond ``room[j]``, what the working set of ``j`` leaves of the scratchpad until ``j`` is done;
    * every buffer that is larger than ``room[i]`` for some ``i >= j`` ahead of its first use.
    """
    order, machine = plan.order, plan.machine
    least = latency_bound_s(plan)
    if len(machine.engines_of(EngineKind.COMPUTE)) > 1 or not order:
        return least
    loaders = [engine for engine in machine.engines if engine.copies(Direction.LOAD)]
    bandwidth = sum(engine.bandwidth_bytes_per_s or 0.0 for engine in loaders)
    ordered = simulate(Plan.of_order(plan.graph, machine, order, streamed=plan.streamed)).instructions
    fresh, room = _first_uses(plan), _rooms(plan)
    finish = np.zeros(len(order) + 1)  # of position k - 1 at index k; index 0 is before everything
    indivisible = np.zeros(len(order) + 1)  # seconds of loads that come after each of these
    loaded = np.zeros(len(order) + 1)  # bytes of sources first used up to there
    for k, run in enumerate(ordered):
        loaded[k + 1] = loaded[k] + sum(plan.graph.buffers[b].nbytes for b in fresh[k])
        for buffer in fresh[k]:
            too_small = np.flatnonzero(room[: k + 1] < plan.graph.buffers[buffer].nbytes)
            indivisible[: too_small[-1] + 1] += _fastest(plan, buffer, Direction.LOAD) / len(loaders)
        beyond = np.maximum(loaded[k + 1] - loaded[: k + 1] - room[: k + 1], 0)
        after = np.maximum(beyond / bandwidth, indivisible[: k + 1])
        finish[k + 1] = float(np.max(finish[: k + 1] + after)) + (run.finish_s or 0.0) - (run.start_s or 0.0)
    last = [b for b in plan.graph.writes[order[-1]] if b in plan.graph.output_buffers and plan.graph.buffers[b].nbytes]
    storing = sum(engine.copies(Direction.STORE) for engine in machine.engines)
    return max(least, float(finish[-1]) + sum(_fastest(plan, b, Direction.STORE) for b in last) / storing)


def _first_uses(plan: Plan) -> list[list[str]]:
    """The sources each position is the first to touch, and reads, so that they are loaded before it."""
    streamed, seen = frozenset(plan.streamed), set[str]()
    found: list[list[str]] = []
    for op in plan.order:
        reads = plan.graph.reads[op]
        found.append([b for b in reads if b not in seen and _is_loaded(plan, streamed, b)])
        seen.update(plan.graph.touches[op])
    return found


def _rooms(plan: Plan) -> NDArray[np.float64]:
    """Bytes the scratchpad has before everything, none of them to be loaded, and beside each working set."""
    streamed, capacity = frozenset(plan.streamed), plan.machine.scratchpad_memory.capacity_bytes
    needs = (
        sum(plan.graph.buffers[b].nbytes for b in plan.graph.touches[op] if b not in streamed) for op in plan.order
    )
    return np.array([0.0, *(float(capacity - need) for need in needs)])
