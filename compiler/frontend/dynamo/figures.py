"""The figures of a planned graph that its report states."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec

from ...plan import Plan, Run
from ...runtime.device.host import HostPlan
from ...runtime.device.layout import DevicePlan, allocated_bytes, lifetimes, live_bytes
from ...runtime.device.program import Program
from ...simulate import latency_ns
from .report import GraphReport

__all__ = ["figured", "predicted_seconds", "program_order_peak"]


def figured(report: GraphReport, program: Program, plan: DevicePlan, planning_s: float) -> GraphReport:
    """``report`` with what there is to say of ``program``, all of whose sizes are integers, and of its plan."""
    kernels = Counter(call.target for call in program.calls if call.target in program.kernels)
    operators = Counter(call.target for call in program.calls if call.target not in program.kernels)
    proven = next((c for c in plan.plan.certificates if c.objective == "peak_bytes"), None)
    engines = {i.engine for i in plan.plan.instructions if isinstance(i, Run)}
    live = max(live_bytes(plan.plan), default=0)
    if isinstance(plan, HostPlan):
        report = dataclasses.replace(
            report, resident_bytes=plan.resident_bytes, loaded_bytes=plan.loaded_bytes, bound_s=plan.bound_s
        )
    return dataclasses.replace(
        report,
        kernels=dict(kernels),
        operators=dict(operators),
        peak_before_bytes=program_order_peak(plan.plan),
        peak_bytes=live,
        bound_bytes=min(live, proven.bound) if proven else 0,
        rounding_bytes=live - proven.value if proven else 0,
        allocated_bytes=max(allocated_bytes(plan), default=plan.arena_bytes),
        arena_bytes=plan.arena_bytes,
        held_bytes=program.held_bytes,
        streams=max(1, len(engines)),
        predicted_s=predicted_seconds(plan.plan),
        planning_s=planning_s,
        waits=plan.waits,
        status=""
        if proven is None
        else f"{'optimal' if proven.gap == 0 else f'gap {proven.gap:.1%}'} ({proven.proved_by})",
        plan=plan.plan,
    )


def predicted_seconds(plan: Plan) -> float:
    """When the last step is done: by the plan's own times, which know of interference, or as simulated."""
    finished = [i.finish_s for i in plan.instructions]
    if finished and None not in finished:
        return max(time for time in finished if time is not None)
    return latency_ns(plan) / 1e9


def program_order_peak(plan: Plan) -> int:
    """Bytes live at once when operators run in program order, each buffer from its first to its last use."""
    start = Plan.of_order(plan.graph, plan.machine)
    resident = lifetimes(start, plan.graph, plan.graph.buffers)
    return max(live_bytes(msgspec.structs.replace(start, residences=resident)), default=0)
