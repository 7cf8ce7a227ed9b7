"""Whether the plans of several ranks can be executed together: one order of collectives a group, and no deadlock.

A rank hands collectives over in its plan's order and goes on; it stops at a wait, and at a ``Run`` of a collective,
until all ranks of the group have handed that collective over. Within a group the n-th collective of one rank meets the
n-th of every other, whatever it is: another kind or size there is a wrong result, or a hang.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ..graph import Collective
from ..plan import CollectiveStart, CollectiveWait, Plan, Run
from .faults import Fault, Finding

__all__ = ["verify_ranks"]

_Events = list[tuple[str, int, Collective, int]]  # "start" or "wait", number within the group, what, step


def verify_ranks(plans: Mapping[int, Plan]) -> tuple[Finding, ...]:
    """Judge the plans of ranks, by global rank, against each other; each alone is ``verify``'s to judge.

    A group may reach beyond the ranks given: those that are not are taken to do what the others do.
    """
    events = {rank: _events(plan) for rank, plan in sorted(plans.items())}
    return (*_different_orders(events), *_deadlocks(events), *_ends_too_early(plans, events))


def _events(plan: Plan) -> _Events:
    collectives = {op.name: op.collective for op in plan.graph.ops if op.collective is not None}
    count: dict[str, int] = {}
    number: dict[str, int] = {}
    events: _Events = []
    for step, instruction in enumerate(plan.instructions):
        if not isinstance(instruction, Run | CollectiveStart | CollectiveWait) or instruction.op not in collectives:
            continue
        collective = collectives[instruction.op]
        if not isinstance(instruction, CollectiveWait):
            number[instruction.op] = count.get(collective.group, 0)
            count[collective.group] = number[instruction.op] + 1
            events.append(("start", number[instruction.op], collective, step))
        if not isinstance(instruction, CollectiveStart) and instruction.op in number:
            events.append(("wait", number[instruction.op], collective, step))
    return events


def _different_orders(events: Mapping[int, _Events]) -> Iterator[Finding]:
    """Each group's collectives are the same, one after the other, on all of its ranks."""
    said: dict[str, tuple[int, list[Collective]]] = {}
    for rank, own in events.items():
        groups = {collective.group for _, _, collective, _ in own}
        groups |= {c.group for other in events.values() for _, _, c, _ in other if rank in c.ranks}
        for group in sorted(groups):
            mine = [(c, step) for what, _, c, step in own if what == "start" and c.group == group]
            if group not in said:
                said[group] = (rank, [c for c, _ in mine])
                continue
            first, theirs = said[group]
            for number in range(max(len(mine), len(theirs))):
                here = mine[number][0] if number < len(mine) else None
                there = theirs[number] if number < len(theirs) else None
                if here != there:
                    message = (
                        f"collective {number} of group {group!r} is {_named(here)} on rank {rank}, "
                        f"{_named(there)} on rank {first}"
                    )
                    step = mine[number][1] if number < len(mine) else None
                    yield Finding(Fault.COLLECTIVE_ORDER_DIFFERS, message, step)
                    break


def _ends_too_early(plans: Mapping[int, Plan], events: Mapping[int, _Events]) -> Iterator[Finding]:
    """No rank is done with a collective before the last one has handed it over; of plans without times nothing."""
    started: dict[tuple[str, int], tuple[float, int]] = {}
    for rank, own in events.items():
        for what, number, collective, step in own:
            start = plans[rank].instructions[step].start_s
            if what == "start" and start is not None:
                key = (collective.group, number)
                started[key] = max(started.get(key, (start, rank)), (start, rank))
    for rank, own in events.items():
        for what, number, collective, step in own:
            finish = plans[rank].instructions[step].finish_s
            latest, other = started.get((collective.group, number), (-math.inf, rank))
            if what == "start" and finish is not None and finish < latest:
                message = (
                    f"collective {number} of group {collective.group!r} ends at {finish} s on rank {rank}, "
                    f"rank {other} starts it at {latest} s"
                )
                yield Finding(Fault.ENDS_BEFORE_RANKS_START, message, step)


def _named(collective: Collective | None) -> str:
    if collective is None:
        return "none"
    return f"{collective.kind.value} of {collective.nbytes} bytes" + (f" ({collective.tag})" if collective.tag else "")


def _deadlocks(events: Mapping[int, _Events]) -> Iterator[Finding]:
    """Let all ranks go on as far as they can; who has not come to the end waits for ever."""
    position = dict.fromkeys(events, 0)
    started: dict[str, dict[int, int]] = {}  # by group and rank: how many were handed over
    moved = True
    while moved:
        moved = False
        for rank, own in events.items():
            while position[rank] < len(own) and _passes(own[position[rank]], rank, events, started):
                position[rank] += 1
                moved = True
    for rank, own in events.items():
        if position[rank] < len(own):
            _, number, collective, step = own[position[rank]]
            message = f"rank {rank} waits for collective {number} of group {collective.group!r}, which cannot come"
            yield Finding(Fault.RANKS_WAIT_FOR_EACH_OTHER, message, step)


def _passes(
    event: tuple[str, int, Collective, int],
    rank: int,
    events: Mapping[int, _Events],
    started: dict[str, dict[int, int]],
) -> bool:
    what, number, collective, _ = event
    counts = started.setdefault(collective.group, {})
    if what == "start":
        counts[rank] = number + 1
        return True
    return all(counts.get(other, 0) > number for other in collective.ranks if other in events)
