"""From kept and dropped gaps to instructions and residences: the one place where a residency is written down."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from ...compiler.plan import Instruction, Load, Plan, Recompute, Residence, Run, Store
from .gaps import Gap, GapProblem, Lifetime

__all__ = ["emit", "write"]


def emit(plan: Plan, problem: GapProblem, dropped: Collection[int]) -> Plan:
    """``plan``'s order with the intervals ``dropped`` of ``problem`` dropped and all others kept."""
    runs = [Run(plan.graph.ops[op].name) for op in plan.order]
    return write(plan, runs, problem.lifetimes, {problem.intervals[i].gap for i in dropped})


def write(
    plan: Plan,
    executions: Sequence[Run | Recompute],
    lifetimes: Iterable[Lifetime],
    dropped: Collection[Gap],
    recomputed: Collection[Gap] = (),
) -> Plan:
    """``executions`` in sequence, with the gaps ``dropped`` and ``recomputed`` between uses at them, and others kept.

    Around each operator come first the loads of what it lacks, then its run, then the stores of what must reach
    backing memory: a value just before it is dropped for the first time, an output as soon as it is final. Stores come
    before the next operator's loads, so no step holds more than one of the two operators around it does. What is
    dropped and ``recomputed`` needs neither: the execution at the gap's end makes it again.
    """
    arrivals, departures = _transfers(len(executions), lifetimes, dropped, recomputed)
    instructions: list[Instruction] = []
    residences: list[Residence] = []
    begin: dict[str, int] = {}
    for position, execution in enumerate(executions):
        created = {lifetime.buffer: loaded for lifetime, loaded in arrivals[position]}
        for buffer in sorted(b for b, loaded in created.items() if loaded):
            begin[buffer] = len(instructions)
            instructions.append(Load(buffer))
        begin.update({buffer: len(instructions) for buffer, loaded in created.items() if not loaded})
        instructions.append(execution)
        end = {lifetime.buffer: len(instructions) for lifetime, _, ends in departures[position] if ends}
        for lifetime, stored, _ in departures[position]:
            if stored:
                instructions.append(Store(lifetime.buffer))
                if lifetime.buffer in end:
                    end[lifetime.buffer] = len(instructions)
        for buffer, step in end.items():
            residences.append(Residence(buffer, plan.machine.scratchpad, begin.pop(buffer), step))
    residences.sort(key=lambda residence: (residence.begin, residence.buffer))
    return msgspec.structs.replace(
        plan.with_order(plan.order),
        instructions=tuple(instructions),
        residences=tuple(residences),
    )


Arrival = tuple[Lifetime, bool]  # whether it is loaded; otherwise the operator itself makes it
Departure = tuple[Lifetime, bool, bool]  # whether it is stored after the operator, and whether its residence ends


def _transfers(
    positions: int, lifetimes: Iterable[Lifetime], dropped: Collection[Gap], recomputed: Collection[Gap]
) -> tuple[list[list[Arrival]], list[list[Departure]]]:
    """What begins a residence before, and what is stored or ends its residence after, each position."""
    arrivals: list[list[Arrival]] = [[] for _ in range(positions)]
    departures: list[list[Departure]] = [[] for _ in range(positions)]
    for lifetime in sorted(lifetimes, key=lambda lifetime: lifetime.buffer):
        backed = {0} if lifetime.is_source else set()
        arrives, made = True, not lifetime.is_source
        for use, position in enumerate(lifetime.positions):
            if arrives:
                arrivals[position].append((lifetime, not made))
            last, gap = use == len(lifetime.positions) - 1, Gap(lifetime.buffer, use)
            fetched, made = gap in dropped, gap in recomputed
            ends = last or fetched or made
            version = lifetime.versions[use]
            stored = version not in backed and (use == lifetime.stored_after or fetched)
            if stored:
                backed.add(version)
            if stored or ends:
                departures[position].append((lifetime, stored, ends))
            arrives = ends
    return arrivals, departures
