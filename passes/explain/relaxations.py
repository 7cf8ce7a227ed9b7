"""What would help: the plan's order planned again with one thing given way, a bound beside each figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from ...compiler.pipeline import Budget, Pass
from ...compiler.plan import Certificate, Plan, Recompute
from ...compiler.verify import verify
from ...hw_models.model import HardwareModel, aligned_bytes
from ..residency.gaps import GapProblem
from ..residency.ilp import IlpResidency
from ..residency.recompute import RecomputeResidency
from ..residency.workset import least_capacity, streamable_buffers
from .facts import Relaxation

__all__ = ["Findings", "relax", "shortage_relaxations"]

STREAMED = "weights streamed instead of resident"
GROWTHS = (5, 10, 25)  # percent of the capacity


@dataclass(frozen=True)
class Findings:
    """``order_bound`` holds for every residency of the plan's order without recomputation, ``graph_bound`` for every
    order; ``optimum_bound`` is the highest bound that holds for the plan's own choices, recomputation included.
    """

    relaxations: tuple[Relaxation, ...]
    order_bound: int
    graph_bound: int
    optimum_bound: int
    untried: tuple[str, ...]


def relax(plan: Plan, problem: GapProblem, budget: Budget) -> Findings:
    """Give way in each respect in turn; the relaxations that pay come first, those that cannot pay are left out."""
    value = verify(plan).additional_bytes
    recomputes = any(isinstance(instruction, Recompute) for instruction in plan.instructions)
    graph_bound = max([problem.base_bytes, *(c.bound for c in _traffic(plan) if c.scope == "order")])
    certified = [c.bound for c in _traffic(plan)[-1:] if c.scope == "residency" and c.value == value]
    ordered = Plan.of_order(
        plan.graph, plan.machine, plan.order, streamed=plan.streamed, source=plan.source, pins=plan.pins
    )
    least = Relaxation("residency", "the least residency of this order, addresses aside", None, value - graph_bound)
    tasks = [_Task(least, IlpResidency(), ordered), *_tasks(ordered, problem)]
    results, untried = _run(tasks, value, budget, recomputes=recomputes)
    proven = [certificate.bound for _, certificate in results[:1]]
    order_bound = max([graph_bound, *proven, *([] if recomputes else certified)])
    found = [relaxation for relaxation, _ in results]
    found.append(Relaxation("order", "another order, none tried", None, value - graph_bound))
    peak = plan.machine.scratchpad_memory.capacity_bytes + max(0, int(-problem.slack(()).min(initial=0)))
    everything = value - problem.base_bytes
    found.append(Relaxation("capacity", "room for everything at once", everything, everything, peak))
    optimum = max([graph_bound, *certified] if recomputes else [order_bound])
    return Findings(tuple(_ranked(found)), order_bound, graph_bound, optimum, tuple(untried))


@dataclass(frozen=True)
class _Task:
    """A plan to be made by ``step``, and the relaxation it is an example of, with figures still open."""

    relaxation: Relaxation
    step: Pass
    plan: Plan


def _run(
    tasks: Sequence[_Task], value: int, budget: Budget, *, recomputes: bool
) -> tuple[list[tuple[Relaxation, Certificate]], list[str]]:
    """Relaxations with what they save of ``value``, and those for which there was no time.

    A plan that recomputes may save more than bounds without recomputation allow: nothing is proven then.
    """
    results: list[tuple[Relaxation, Certificate]] = []
    least = value
    for number, task in enumerate(tasks):
        if budget.halted():
            return results, [task.relaxation.what for task in tasks[number:]]
        certificate = task.step.apply(task.plan, budget.share(1 / (len(tasks) - number))).certificate
        assert certificate is not None  # both residency passes certify what they return
        reached = certificate.value
        if task.relaxation.kind in ("residency", "capacity"):  # in the order of capacity: what fits less fits more
            reached = least = min(least, reached)
        bound = 0 if recomputes and isinstance(task.step, IlpResidency) else min(reached, certificate.bound)
        saved, limit = max(0, value - reached), max(0, value - bound)
        results.append((msgspec.structs.replace(task.relaxation, saved_bytes=saved, limit_bytes=limit), certificate))
    return results, []


def _tasks(ordered: Plan, problem: GapProblem) -> list[_Task]:
    """What is planned again besides the plan as it is."""
    tasks = []
    for what, capacity in _growths(ordered, problem):
        larger = msgspec.structs.replace(ordered, machine=with_capacity(ordered.machine, capacity))
        tasks.append(_Task(Relaxation("capacity", what, None, 0, capacity), IlpResidency(), larger))
    again = Relaxation("recompute", "dropped tensors computed again", None, 0)
    tasks.append(_Task(again, RecomputeResidency(), ordered))
    if any(pin.resident for pin in ordered.pins):
        free = msgspec.structs.replace(ordered, pins=())
        tasks.append(_Task(Relaxation("pins", "nothing pinned as resident", None, 0), IlpResidency(), free))
    streamed = tuple(sorted({*ordered.streamed, *streamable_buffers(ordered.graph)}))
    if streamed != ordered.streamed:
        plan = msgspec.structs.replace(ordered, streamed=streamed)
        tasks.append(_Task(Relaxation("weights", STREAMED, None, 0), IlpResidency(), plan))
    plan = msgspec.structs.replace(ordered, streamed=())
    fits = least_capacity(plan) <= plan.machine.scratchpad_memory.capacity_bytes
    if ordered.streamed and problem.base_bytes and fits:  # streaming costs only what is read again
        tasks.append(
            _Task(Relaxation("weights", "weights resident instead of streamed", None, 0), IlpResidency(), plan)
        )
    return tasks


def _growths(plan: Plan, problem: GapProblem) -> list[tuple[str, int]]:
    """Capacities to try: a little more each, as long as not everything fits."""
    memory = plan.machine.scratchpad_memory
    peak = memory.capacity_bytes - int(problem.slack(()).min(initial=0))
    sizes = ((p, aligned_bytes(memory.capacity_bytes * (100 + p) // 100, memory.alignment_bytes)) for p in GROWTHS)
    return [(f"{percent} % more room", size) for percent, size in sizes if memory.capacity_bytes < size < peak]


def with_capacity(machine: HardwareModel, capacity_bytes: int) -> HardwareModel:
    """The machine with a larger scratchpad; of several banks, the last one grows."""
    memory = machine.scratchpad_memory
    if not memory.banks_bytes:
        return machine.with_scratchpad(capacity_bytes)
    *others, last = memory.banks_bytes
    return machine.with_banks(*others, last + capacity_bytes - memory.capacity_bytes)


def _traffic(plan: Plan) -> list[Certificate]:
    return [c for c in plan.certificates if c.objective == "additional_traffic_bytes"]


def _ranked(found: Iterable[Relaxation]) -> list[Relaxation]:
    """The most bytes saved first; what was not planned goes by its limit, behind what was."""
    paying = [r for r in found if r.limit_bytes > 0 and (r.saved_bytes is None or r.saved_bytes > 0)]
    return sorted(
        paying, key=lambda r: (r.saved_bytes is None, -(r.saved_bytes or r.limit_bytes), r.capacity_bytes or 0)
    )


def shortage_relaxations(plan: Plan) -> tuple[Relaxation, ...]:
    """What would help a model some operator of which does not fit alone, in bytes of the shortage."""
    capacity, least = plan.machine.scratchpad_memory.capacity_bytes, least_capacity(plan)
    short = least - capacity
    found = [Relaxation("capacity", "room for the largest operator", short, short, least)]
    streamed = tuple(sorted({*plan.streamed, *streamable_buffers(plan.graph)}))
    saved = min(short, least - least_capacity(msgspec.structs.replace(plan, streamed=streamed)))
    if saved > 0:
        found.append(Relaxation("weights", STREAMED, saved, saved))
    return tuple(found)
