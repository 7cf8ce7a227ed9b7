"""An explanation of a plan, put together: what binds, what is dropped for it, what would help."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ...compiler.pipeline import Budget
from ...compiler.plan import Load, Plan, Residence, Run
from ...compiler.verify import verify
from ...hw_models.model import aligned_bytes
from ..residency.gaps import Gap, GapProblem
from ..residency.ilp import IlpResidency
from ..residency.workset import least_capacity
from .facts import BindingStep, DroppedGap, Explanation, Launched, LiveBuffer, Verdict
from .pressure import Force, forces
from .relaxations import Findings, relax, shortage_relaxations

__all__ = ["explain"]


def explain(plan: Plan, budget: Budget) -> Explanation:
    """Say why ``plan`` moves what it moves, and what would help: the more time, the sharper.

    A plan that has decided only its order is given a residency first. If some operator does not fit the scratchpad
    alone, the explanation is of that; nothing is raised for it.

    Raises:
        Infeasible: what is pinned as resident leaves some operator too little room.
    """
    if least_capacity(plan) > plan.machine.scratchpad_memory.capacity_bytes:
        return _infeasible(plan)
    if plan.residences is None:
        plan = IlpResidency().apply(plan, budget.share(0.3)).plan
    problem = GapProblem.of(plan)
    proven = forces(problem)
    findings = relax(plan, problem, budget)
    value = verify(plan).additional_bytes
    gaps = _Gaps(plan, problem)
    return Explanation(
        _verdict(value, findings),
        plan.graph.name,
        len(plan.graph.ops),
        plan.machine.scratchpad_memory.capacity_bytes,
        value,
        problem.base_bytes,
        max(findings.order_bound, problem.base_bytes + sum(force.nbytes for force in proven)),
        findings.graph_bound,
        tuple(_step(plan, problem, force, gaps) for force in proven),
        gaps.dropped(),
        findings.relaxations,
        findings.untried,
        Launched.of(plan.graph),
    )


def _verdict(value: int, findings: Findings) -> Verdict:
    if value == 0:
        return "nothing to explain"
    if value <= findings.graph_bound:
        return "optimal"
    return "optimal for its order" if value <= findings.optimum_bound else "above its bound"


def _step(plan: Plan, problem: GapProblem, force: Force, gaps: _Gaps) -> BindingStep:
    memory = plan.machine.scratchpad_memory
    op = plan.order[force.position]
    unit = memory.alignment_bytes if force.dimension == 0 else 1
    touched = set(plan.graph.touches[op])
    live = []
    for lifetime in problem.lifetimes:
        if lifetime.buffer in touched:
            live.append(_live(plan, lifetime.buffer, "operand"))
        elif lifetime.positions[0] < force.position < lifetime.positions[-1]:
            after = bisect_left(lifetime.positions, force.position) - 1
            kept = problem.index.get(Gap(lifetime.buffer, after)) not in gaps.gone
            live.append(_live(plan, lifetime.buffer, "kept" if kept else "dropped"))
    needed = sum(aligned_bytes(buffer.nbytes, unit) for buffer in live)
    return BindingStep(
        force.position,
        plan.graph.ops[op].name,
        needed,
        memory.capacity_bytes,
        needed - aligned_bytes(memory.capacity_bytes, unit),
        force.nbytes,
        tuple(sorted(live, key=lambda buffer: (-buffer.nbytes, buffer.buffer))),
    )


def _live(plan: Plan, buffer: str, state: str) -> LiveBuffer:
    base = plan.graph.buffers[buffer]
    return LiveBuffer(buffer, base.nbytes, base.role.value, state)  # type: ignore[arg-type]  # one of the three


class _Gaps:
    """Which gaps a plan keeps, read off its residences, and how the others come back."""

    def __init__(self, plan: Plan, problem: GapProblem) -> None:
        self.plan, self.problem = plan, problem
        runs = [step for step, instruction in enumerate(plan.instructions) if isinstance(instruction, Run)]
        positions = {lifetime.buffer: lifetime.positions for lifetime in problem.lifetimes}
        residences: dict[str, list[Residence]] = {}
        for residence in plan.residences or ():
            residences.setdefault(residence.buffer, []).append(residence)
        self.arrival: list[int | None] = []  # where a dropped gap's residence begins again; None for kept ones
        for interval in problem.intervals:
            uses = positions[interval.gap.buffer][interval.gap.after : interval.gap.after + 2]
            before, behind = (_covering(residences[interval.gap.buffer], runs[use]) for use in uses)
            self.arrival.append(None if before == behind else behind.begin)
        self.gone = {i for i, begin in enumerate(self.arrival) if begin is not None}

    def dropped(self) -> tuple[DroppedGap, ...]:
        """Dropped gaps, the most bytes moved first."""
        ops, order = self.plan.graph.ops, self.plan.order
        stored: set[tuple[str, int] | None] = {None}
        found = []
        for interval, begin in zip(self.problem.intervals, self.arrival, strict=True):
            if begin is None:
                continue
            fetched = isinstance(self.plan.instructions[begin], Load)
            moved = 0
            if fetched:
                moved = interval.nbytes * (1 if interval.version in stored else 2)
                stored.add(interval.version)
            after, before = (ops[order[p]].name for p in (interval.begin - 1, interval.end))
            returns = "fetched" if fetched else "recomputed"
            found.append(DroppedGap(interval.gap.buffer, interval.nbytes, after, before, moved, returns))  # type: ignore[arg-type]  # one of the two
        return tuple(sorted(found, key=lambda gap: (-gap.moved_bytes, gap.buffer)))


def _covering(residences: Sequence[Residence], step: int) -> Residence:
    return next(residence for residence in residences if residence.begin <= step < residence.end)


def _infeasible(plan: Plan) -> Explanation:
    """Operators that do not fit alone, the largest first."""
    memory = plan.machine.scratchpad_memory
    streamed = set(plan.streamed)
    steps = []
    for position, op in enumerate(plan.order):
        touched = [b for b in plan.graph.touches[op] if b not in streamed and plan.graph.buffers[b].nbytes]
        live = sorted((_live(plan, b, "operand") for b in touched), key=lambda b: (-b.nbytes, b.buffer))
        padded = [aligned_bytes(b.nbytes, memory.alignment_bytes) for b in live]
        saved = max((p - b.nbytes for p, b in zip(padded, live, strict=True)), default=0)
        needed = sum(padded) - saved  # only what is laid last needs no padding behind it
        if needed > memory.capacity_bytes:
            short = needed - memory.capacity_bytes
            name = plan.graph.ops[op].name
            steps.append(BindingStep(position, name, needed, memory.capacity_bytes, short, 0, tuple(live)))
    steps.sort(key=lambda step: (-step.short_bytes, step.position))
    found = shortage_relaxations(plan)
    launches = Launched.of(plan.graph)
    count = len(plan.graph.ops)
    return Explanation(
        "infeasible",
        plan.graph.name,
        count,
        memory.capacity_bytes,
        0,
        0,
        0,
        0,
        tuple(steps),
        (),
        found,
        launches=launches,
    )
