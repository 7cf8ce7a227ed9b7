"""From kept and dropped gaps to instructions and residences: the one place where a residency is written down."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from ...compiler.plan import Instruction, Load, Plan, Residence, Run, Store
from .gaps import Gap, GapProblem, Lifetime

__all__ = ["emit"]


def emit(plan: Plan, problem: GapProblem, dropped: Collection[int]) -> Plan:
    """``plan``'s order with the intervals ``dropped`` of ``problem`` dropped and all others kept.

    Around each operator come first the loads of what it lacks, then its run, then the stores of what must reach
    backing memory: a value just before it is dropped for the first time, an output as soon as it is final. Stores come
    before the next operator's loads, so no step holds more than one of the two operators around it does.
    """
    gone = {problem.intervals[i].gap for i in dropped}
    arrivals, departures = _transfers(plan, problem, gone)
    instructions: list[Instruction] = []
    residences: list[Residence] = []
    begin: dict[str, int] = {}
    for position, op in enumerate(plan.order):
        created = {lifetime.buffer: loaded for lifetime, loaded in arrivals[position]}
        for buffer in sorted(b for b, loaded in created.items() if loaded):
            begin[buffer] = len(instructions)
            instructions.append(Load(buffer))
        begin.update({buffer: len(instructions) for buffer, loaded in created.items() if not loaded})
        instructions.append(Run(plan.graph.ops[op].name))
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


Arrival = tuple[Lifetime, bool]  # whether it is loaded; otherwise the operator itself creates it
Departure = tuple[Lifetime, bool, bool]  # whether it is stored after the operator, and whether its residence ends


def _transfers(
    plan: Plan, problem: GapProblem, gone: Collection[Gap]
) -> tuple[list[list[Arrival]], list[list[Departure]]]:
    """What begins a residence before, and what is stored or ends its residence after, each position."""
    arrivals: list[list[Arrival]] = [[] for _ in plan.graph.ops]
    departures: list[list[Departure]] = [[] for _ in plan.graph.ops]
    for lifetime in sorted(problem.lifetimes, key=lambda lifetime: lifetime.buffer):
        backed = {0} if lifetime.is_source else set()
        arrives = True
        for use, position in enumerate(lifetime.positions):
            if arrives:
                arrivals[position].append((lifetime, use > 0 or lifetime.is_source))
            last = use == len(lifetime.positions) - 1
            ends = last or Gap(lifetime.buffer, use) in gone
            version = lifetime.versions[use]
            stored = version not in backed and (use == lifetime.stored_after or (ends and not last))
            if stored:
                backed.add(version)
            if stored or ends:
                departures[position].append((lifetime, stored, ends))
            arrives = ends
    return arrivals, departures
