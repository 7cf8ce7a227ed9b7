"""Times: well-formed, no faster than the machine, one instruction an engine at a time, nothing before what it needs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

from ...errors import MachineError
from ...hw_models.cost import op_seconds, transfer_seconds
from ...hw_models.model import Engine, EngineKind, Link
from ..graph import DTYPE_BYTES, OpKind
from ..plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Residence, Run, Store
from .facts import Facts
from .faults import Fault, Finding

__all__ = ["check_times", "is_timed"]

_NO_TIME_S = 1e-20  # far below what any machine tells apart; at time 0 there is no rounding to allow for

_Spans = list[tuple[float, float]]


def is_timed(plan: Plan) -> bool:
    """Whether every instruction has a start and a finish; a plan without instructions has no times."""
    moments = [moment for i in plan.instructions for moment in (i.start_s, i.finish_s)]
    return bool(moments) and None not in moments


def check_times(plan: Plan, facts: Facts, residences: tuple[Residence, ...]) -> Iterator[Finding]:
    """Check a plan for which ``is_timed`` holds."""
    spans: _Spans = []
    for step, instruction in enumerate(plan.instructions):
        start, finish = instruction.start_s, instruction.finish_s
        is_moment = isinstance(instruction, CollectiveWait)
        if start is None or finish is None or not 0 <= start <= finish < math.inf or (is_moment and start < finish):
            expected = "0 <= start == finish" if is_moment else "0 <= start <= finish"
            message = f"{_subject(instruction)!r} goes from {start} to {finish} s; expected {expected}, both finite"
            yield Finding(Fault.TIME_MALFORMED, message, step)
            spans.append((math.inf, -math.inf))  # waits for nothing, and nothing waits for it
        else:
            spans.append((start, finish))
    yield from _check_durations(plan, facts, spans)
    yield from _check_engines(plan, spans)
    yield from _check_operands(plan, facts, spans)
    yield from _check_regions(plan, facts, residences, spans)


def _check_durations(plan: Plan, facts: Facts, spans: _Spans) -> Iterator[Finding]:
    """No instruction takes less time than the machine needs for it; a difference of two moments is rounded."""
    engines: dict[str, Engine | Link] = {engine.name: engine for engine in plan.machine.engines}
    engines |= {link.name: link for link in plan.machine.links}
    for step, ((start, finish), instruction) in enumerate(zip(spans, plan.instructions, strict=True)):
        engine = engines.get(instruction.engine)
        if engine is None or start == math.inf:
            continue
        least = _least_seconds(plan, facts, instruction, engine)
        if finish - start < least * (1 - 1e-9) - max(4 * math.ulp(finish), _NO_TIME_S):
            message = (
                f"{_subject(instruction)!r} takes {finish - start} s, engine {engine.name!r} needs {least} s for it"
            )
            yield Finding(Fault.FASTER_THAN_MACHINE, message, step)


def _subject(instruction: Instruction) -> str:
    return instruction.buffer if isinstance(instruction, Load | Store) else instruction.op


def _least_seconds(plan: Plan, facts: Facts, instruction: Instruction, engine: Engine | Link) -> float:
    """Seconds ``engine`` needs; 0 for what is named as another fault: an unknown name, an engine of the wrong kind."""
    if isinstance(engine, Link):
        return _least_collective(plan, facts, instruction)
    if isinstance(instruction, CollectiveStart | CollectiveWait):
        return 0.0
    if isinstance(instruction, Load | Store):
        known = engine.kind is EngineKind.COPY and instruction.buffer in facts.nbytes
        return transfer_seconds(facts.nbytes[instruction.buffer], engine) if known else 0.0
    if engine.kind is not EngineKind.COMPUTE or instruction.op not in facts.op_index:
        return 0.0
    index = facts.op_index[instruction.op]
    op = plan.graph.ops[index]
    if op.kind is OpKind.BOUNDARY:
        return 0.0
    operands = [plan.graph.tensor[name] for name in dict.fromkeys((*op.inputs, *op.outputs))]
    local = sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in operands if t.buffer not in facts.streamed)
    local += op.outside_bytes
    streamed = sum(facts.nbytes[buffer] for buffer in facts.reads[index] if buffer in facts.streamed)
    dtype = operands[0].dtype if operands else "default"
    return op_seconds(op.flops, dtype, local, streamed, plan.machine, engine)


def _least_collective(plan: Plan, facts: Facts, instruction: Instruction) -> float:
    """Seconds of a collective done in the fastest way, while nothing else runs; also one that does more as well."""
    if not isinstance(instruction, Run | CollectiveStart) or instruction.op not in facts.op_index:
        return 0.0
    from ...hw_models.collectives import collective_modes, collective_seconds

    collective = plan.graph.ops[facts.op_index[instruction.op]].collective
    if collective is None or plan.machine.fabric is None:
        return 0.0
    what = (collective.kind.value, collective.nbytes, collective.ranks, plan.machine)
    fused = {rate.fuses for rate in plan.machine.fabric.rates if rate.fuses and rate.kind == collective.kind.value}
    least = collective_seconds(*what)
    for fuses in sorted(fused):
        try:
            least = min(least, collective_modes(*what, fuses=fuses)[0].seconds)
        except MachineError:
            continue  # not among so many ranks
    return least


def _check_engines(plan: Plan, spans: _Spans) -> Iterator[Finding]:
    busy: dict[str, tuple[float, int]] = {}
    for start, finish, step in sorted((*span, step) for step, span in enumerate(spans) if span[0] < math.inf):
        if isinstance(plan.instructions[step], CollectiveWait):
            continue  # occupies nothing
        engine = plan.instructions[step].engine
        until, other = busy.get(engine, (-math.inf, -1))
        if start < until:
            message = f"engine {engine!r} is busy with step {other} until {until} s, this starts at {start} s"
            yield Finding(Fault.ENGINE_OVERLAP, message, step)
        busy[engine] = max((until, other), (finish, step))


def _check_operands(plan: Plan, facts: Facts, spans: _Spans) -> Iterator[Finding]:
    ready: dict[str, tuple[float, int]] = {}  # when the resident copy is complete, and the step that completes it
    used: dict[str, tuple[float, int]] = {}  # when the last reader of the buffer is done
    stored: dict[str, tuple[float, int]] = {}  # when the backing copy is complete
    flying: dict[int, tuple[float, int]] = {}  # when each collective that is not waited for yet is done
    never = (-math.inf, -1)
    for step, instruction in enumerate(plan.instructions):
        start, finish = spans[step]
        done = (finish, step)
        waits: list[tuple[float, int, str]] = []
        if isinstance(instruction, CollectiveWait):
            index = facts.op_index.get(instruction.op)
            waits += [] if index is None or index not in flying else [(*flying.pop(index), instruction.op)]
            ready.update(dict.fromkeys(() if index is None else facts.writes[index], done))
        elif not isinstance(instruction, Load | Store):
            index = facts.op_index.get(instruction.op)
            if isinstance(instruction, CollectiveStart) and index is not None:
                flying[index] = done
            reads = () if index is None else facts.reads[index]
            writes = () if index is None else facts.writes[index]
            waits += [(*ready.get(b, never), b) for b in (*reads, *writes)]
            waits += [(*used.get(b, never), b) for b in writes]
            used.update({b: max(used.get(b, never), done) for b in reads})
            ready.update(dict.fromkeys(writes, done))
        elif isinstance(instruction, Store):
            buffer = instruction.buffer
            waits.append((*ready.get(buffer, never), buffer))
            used[buffer] = max(used.get(buffer, never), done)
            stored[buffer] = done
        else:
            waits.append((*stored.get(instruction.buffer, never), instruction.buffer))
            ready[instruction.buffer] = done
        until, other, buffer = max(waits, default=(*never, ""))
        if start < until:
            message = f"starts at {start} s, but step {other} is busy with {buffer!r} until {until} s"
            yield Finding(Fault.STARTS_BEFORE_OPERANDS, message, step)


def _last_uses(
    plan: Plan, facts: Facts, residences: tuple[Residence, ...], spans: _Spans
) -> dict[Residence, tuple[float, int]]:
    """When the last instruction that uses each residence is done, and its step."""
    uses: dict[str, list[int]] = {}
    for step, instruction in enumerate(plan.instructions):
        if not isinstance(instruction, Load | Store):
            index = facts.op_index.get(instruction.op)
            touched = () if index is None else {*facts.reads[index], *facts.writes[index]}
        else:
            touched = {instruction.buffer}
        for buffer in touched:
            uses.setdefault(buffer, []).append(step)
    last: dict[Residence, tuple[float, int]] = {}
    for residence in residences:
        steps = uses.get(residence.buffer, [])
        inside = steps[bisect.bisect_left(steps, residence.begin) : bisect.bisect_left(steps, residence.end)]
        last[residence] = max(((spans[step][1], step) for step in inside), default=(-math.inf, -1))
    return last


def _check_regions(plan: Plan, facts: Facts, residences: tuple[Residence, ...], spans: _Spans) -> Iterator[Finding]:
    """A residence's first instruction starts after the last user of its bytes, as far as they are known.

    Without offsets any two residences may come to share bytes, so every residence that ended before counts.
    """
    last = _last_uses(plan, facts, residences, spans)
    ordered = sorted((r for r in residences if 0 <= r.begin < len(spans)), key=lambda r: (r.begin, r.buffer))
    ended = sorted(residences, key=lambda r: r.end)
    taken = _ByteMap()
    position, free = 0, (-math.inf, -1)
    for residence in ordered:
        if residence.offset is None:
            while position < len(ended) and ended[position].end <= residence.begin:
                free = max(free, last[ended[position]])
                position += 1
            until, other = free
        else:
            region = (residence.offset, residence.offset + facts.nbytes[residence.buffer])
            until, other = taken.replace(*region, last[residence])
        start = spans[residence.begin][0]
        if start < until and other != residence.begin:
            message = (
                f"buffer {residence.buffer!r} appears at {start} s in bytes that step {other} uses until {until} s"
            )
            yield Finding(Fault.STARTS_BEFORE_REGION_FREE, message, residence.begin)


class _ByteMap:
    """Disjoint byte ranges, each with the time its last user is done; sorted by first byte."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, tuple[float, int]]] = []

    def replace(self, begin: int, end: int, done: tuple[float, int]) -> tuple[float, int]:
        """Set ``[begin, end)`` to ``done``; returns the latest time it held before."""
        low = bisect.bisect_left(self.ranges, begin, key=lambda entry: entry[1])
        high = low
        latest = (-math.inf, -1)
        kept: list[tuple[int, int, tuple[float, int]]] = [(begin, end, done)] if begin < end else []
        while high < len(self.ranges) and self.ranges[high][0] < end:
            first, stop, time = self.ranges[high]
            if stop > begin:
                latest = max(latest, time)
            if first < begin:
                kept.append((first, min(stop, begin), time))
            if stop > end:
                kept.append((end, stop, time))
            high += 1
        self.ranges[low:high] = sorted(kept)
        return latest
