"""Bytes over steps: capacity and peak; regions inside the scratchpad and one of its banks, aligned and disjoint."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate

from ..plan import CollectiveStart, CollectiveWait, Plan, Residence, Run
from .facts import Facts
from .faults import Fault, Finding

__all__ = ["check_capacity", "check_regions", "peak_of_order", "peak_of_residences"]


def _peak(spans: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """Largest sum of bytes over ``(begin, end, nbytes)``, and the first step that has it."""
    change: dict[int, int] = {}
    for begin, end, nbytes in spans:
        if begin < end:
            change[begin] = change.get(begin, 0) + nbytes
            change[end] = change.get(end, 0) - nbytes
    peak = where = live = 0
    for step in sorted(change):
        live += change[step]
        if live > peak:
            peak, where = live, step
    return peak, where


def peak_of_residences(facts: Facts, residences: tuple[Residence, ...]) -> tuple[int, int]:
    """Largest sum of resident bytes, and the first step that has it."""
    return _peak((r.begin, r.end, facts.nbytes[r.buffer]) for r in residences)


def peak_of_order(plan: Plan, facts: Facts) -> int:
    """Largest sum of bytes when every buffer is resident from its first to its last use in this order.

    A collective uses its buffers from its start to its wait.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Run | CollectiveStart | CollectiveWait) and instruction.op in facts.op_index:
            index = facts.op_index[instruction.op]
            for buffer in (*facts.reads[index], *facts.writes[index]):
                first.setdefault(buffer, step)
                last[buffer] = step + 1
    peak, _ = _peak((first[b], last[b], facts.nbytes[b]) for b in first if b not in facts.streamed)
    return peak


def check_capacity(plan: Plan, facts: Facts, residences: tuple[Residence, ...]) -> Iterator[Finding]:
    """The resident bytes fit at every step."""
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    peak, where = peak_of_residences(facts, residences)
    if peak > capacity:
        message = (
            f"{peak} bytes are resident, {peak - capacity} more than the {capacity} of {plan.machine.scratchpad!r}"
        )
        yield Finding(Fault.CAPACITY_EXCEEDED, message, where)


def check_regions(plan: Plan, facts: Facts, residences: tuple[Residence, ...]) -> Iterator[Finding]:
    """Regions lie inside the scratchpad and one bank, are aligned, and are disjoint while both are resident."""
    memory = plan.machine.scratchpad_memory
    boundaries = list(accumulate(memory.banks_bytes))[:-1]
    placed: list[tuple[int, int, Residence]] = []
    for residence in residences:
        if residence.offset is None:
            continue
        begin, end = residence.offset, residence.offset + facts.nbytes[residence.buffer]
        placed.append((begin, end, residence))
        if begin < 0 or end > memory.capacity_bytes:
            message = f"buffer {residence.buffer!r} has bytes [{begin}, {end}) of {memory.capacity_bytes}"
            yield Finding(Fault.OUT_OF_BOUNDS, message, residence.begin)
        for boundary in boundaries:
            if begin < boundary < end:
                message = f"buffer {residence.buffer!r} has bytes [{begin}, {end}); a bank begins at {boundary}"
                yield Finding(Fault.BANK_CROSSED, message, residence.begin)
        if begin % memory.alignment_bytes:
            message = f"buffer {residence.buffer!r} has offset {begin}, not a multiple of {memory.alignment_bytes}"
            yield Finding(Fault.MISALIGNED, message, residence.begin)
    yield from _check_disjoint(placed)


def _check_disjoint(placed: list[tuple[int, int, Residence]]) -> Iterator[Finding]:
    """Sweep over steps with the live regions sorted by offset: in a disjoint set, only neighbours can meet.

    One finding for each region that meets an older one; once two regions overlap, further overlaps with the same
    bytes may go unnamed.
    """
    events: list[tuple[int, int, int]] = []  # step, 0 ends before 1 begins, index
    for index, (begin, end, residence) in enumerate(placed):
        if begin < end:
            events += [(residence.begin, 1, index), (residence.end, 0, index)]
    live: list[tuple[int, int, int]] = []  # first byte, end, index
    for step, begins, index in sorted(events):
        begin, end, residence = placed[index]
        position = bisect.bisect_left(live, (begin, end, index))
        if not begins:
            live.pop(position)
            continue
        for other in live[max(0, position - 1) : position + 1]:
            if other[0] < end and begin < other[1]:
                name = placed[other[2]][2].buffer
                message = (
                    f"buffer {residence.buffer!r} has bytes [{begin}, {end}) while buffer {name!r} "
                    f"has [{other[0]}, {other[1]})"
                )
                yield Finding(Fault.REGIONS_OVERLAP, message, step)
                break
        live.insert(position, (begin, end, index))
