"""What the reports draw, in data units: instructions as bars, residences as regions, live bytes as a profile.

Everything here also takes a plan that does not verify, because a wrong plan is what one most wants to look at: names
that the graph does not have get zero bytes and the role ``unknown``; nothing is left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from ...hw_models.model import EngineKind
from ..graph import OpKind
from ..plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Recompute, Run, Store

__all__ = ["UNKNOWN_ROLE", "Bar", "Region", "bars", "is_timed", "live_bytes", "live_over_time", "regions", "role_of"]

UNKNOWN_ROLE = "unknown"


@dataclass(frozen=True, slots=True)
class Bar:
    """One instruction as drawn.

    ``subject`` is the operator that it executes, starts among ranks or waits for, or the buffer a transfer moves;
    ``nbytes`` what it moves between scratchpad and backing memory (for an operator: its streamed operands), of which
    ``additional_bytes`` are not compulsory.
    """

    step: int
    kind: str
    subject: str
    engine: str
    start_s: float | None
    finish_s: float | None
    nbytes: int
    additional_bytes: int

    @property
    def executes(self) -> bool:
        """Whether it is about an operator: executes it, for the first time or again, or waits for it."""
        return self.kind not in ("load", "store")

    @property
    def category(self) -> str:
        """Its kind, and of a transfer whether it is compulsory: ``run``, ``wait``, ``additional store``..."""
        if self.executes:
            return self.kind
        return f"{'additional' if self.additional_bytes else 'compulsory'} {self.kind}"


@dataclass(frozen=True, slots=True)
class Region:
    """One residence as drawn: ``nbytes`` from ``offset`` over steps ``begin`` to ``end - 1``.

    ``start_s`` is when the instruction that creates it starts, ``finish_s`` when its last user finishes: from then on
    the simulator lets other bytes take the place.
    """

    buffer: str
    role: str
    nbytes: int
    offset: int | None
    begin: int
    end: int
    start_s: float | None
    finish_s: float | None


def is_timed(plan: Plan) -> bool:
    """Whether every instruction has a finite start and finish, and there is at least one."""
    return bool(plan.instructions) and all(
        i.start_s is not None and i.finish_s is not None and math.isfinite(i.start_s) and math.isfinite(i.finish_s)
        for i in plan.instructions
    )


def role_of(plan: Plan, buffer: str) -> str:
    """Role of a buffer's base tensor; ``unknown`` for a name that is no buffer of the graph."""
    base = plan.graph.buffers.get(buffer)
    return UNKNOWN_ROLE if base is None else base.role.value


def bars(plan: Plan) -> tuple[Bar, ...]:
    """Every instruction, in step order.

    Of a source's transfers the first is compulsory, of an output's stores the last; all other traffic is additional.
    """
    graph = plan.graph
    to_read = {b for reads in graph.reads for b in reads if graph.buffers[b].role.is_source}
    last_store = {i.buffer: step for step, i in enumerate(plan.instructions) if isinstance(i, Store)}
    compulsory_store = {last_store[b] for b in graph.output_buffers if b in last_store}
    streamed_reads = _streamed_reads(plan)
    collectives = {op.name for op in graph.ops if op.kind is OpKind.COLLECTIVE}
    waiting = _waiting_engines(plan)
    result: list[Bar] = []
    for step, instruction in enumerate(plan.instructions):
        moved: Iterable[str]
        kind, engine = type(instruction).__name__.lower(), instruction.engine
        if isinstance(instruction, CollectiveWait):
            kind, engine = "wait", instruction.engine or waiting[instruction.op]
        elif isinstance(instruction, CollectiveStart) or getattr(instruction, "op", "") in collectives:
            kind = "collective"
        if isinstance(instruction, Load | Store):
            subject, moved = instruction.buffer, (instruction.buffer,)
        else:
            subject, moved = instruction.op, streamed_reads.get(instruction.op, ())
        total = additional = 0
        for buffer in moved:
            nbytes = _nbytes(plan, buffer)
            total += nbytes
            if isinstance(instruction, Store):
                additional += 0 if step in compulsory_store else nbytes
            elif buffer in to_read:
                to_read.discard(buffer)
            else:
                additional += nbytes
        times = (instruction.start_s, instruction.finish_s)
        result.append(Bar(step, kind, subject, engine, *times, total, additional))
    return tuple(result)


def regions(plan: Plan) -> tuple[Region, ...]:
    """Every residence, in the plan's order; empty for a plan that has decided only an order."""
    timed = is_timed(plan)
    uses = _uses(plan) if timed else {}
    result: list[Region] = []
    for r in plan.residences or ():
        start_s, finish_s = _span(plan.instructions, uses.get(r.buffer, []), r.begin, r.end) if timed else (None, None)
        role, nbytes = role_of(plan, r.buffer), _nbytes(plan, r.buffer)
        result.append(Region(r.buffer, role, nbytes, r.offset, r.begin, r.end, start_s, finish_s))
    return tuple(result)


def live_bytes(plan: Plan) -> tuple[int, ...]:
    """Bytes resident during each step; steps outside the plan are cut off."""
    steps = len(plan.instructions)
    change = [0] * (steps + 1)
    for region in regions(plan):
        begin, end = (min(max(s, 0), steps) for s in (region.begin, region.end))
        if begin < end:
            change[begin] += region.nbytes
            change[end] -= region.nbytes
    return tuple(accumulate(change[:-1]))


def live_over_time(plan: Plan) -> tuple[tuple[float, int], ...]:
    """Times (s) at which the bytes held in the scratchpad change, with the bytes held from then on; needs times."""
    change: dict[float, int] = {}
    for region in regions(plan):
        if region.start_s is None or region.finish_s is None:
            continue
        change[region.start_s] = change.get(region.start_s, 0) + region.nbytes
        change[region.finish_s] = change.get(region.finish_s, 0) - region.nbytes
    times = sorted(change)
    return tuple(zip(times, accumulate(change[t] for t in times), strict=True))


def _nbytes(plan: Plan, buffer: str) -> int:
    base = plan.graph.buffers.get(buffer)
    return 0 if base is None else base.nbytes


def _streamed_reads(plan: Plan) -> dict[str, tuple[str, ...]]:
    streamed = set(plan.streamed)
    return {
        op.name: tuple(b for b in reads if b in streamed)
        for op, reads in zip(plan.graph.ops, plan.graph.reads, strict=True)
    }


def _waiting_engines(plan: Plan) -> dict[str, str]:
    """The engine that each wait lets wait, by operator: its first reader's, and the first one where nobody reads."""
    computing = plan.machine.engines_of(EngineKind.COMPUTE)[0].name
    reads = {op.name: reads for op, reads in zip(plan.graph.ops, plan.graph.reads, strict=True)}
    written = {op.name: writes for op, writes in zip(plan.graph.ops, plan.graph.writes, strict=True)}
    reader: dict[str, str] = {}
    waiting: dict[str, str] = {}
    for instruction in reversed(plan.instructions):
        if isinstance(instruction, CollectiveWait):
            buffers = written.get(instruction.op, ())
            waiting[instruction.op] = next((reader[b] for b in buffers if b in reader), computing)
        elif isinstance(instruction, Run | Recompute):
            reader |= dict.fromkeys(reads.get(instruction.op, ()), instruction.engine or computing)
    return waiting


def _uses(plan: Plan) -> dict[str, list[int]]:
    """Steps whose instruction touches each buffer, ascending."""
    touches = {op.name: touched for op, touched in zip(plan.graph.ops, plan.graph.touches, strict=True)}
    uses: dict[str, list[int]] = {}
    for step, instruction in enumerate(plan.instructions):
        touched = (instruction.buffer,) if isinstance(instruction, Load | Store) else touches.get(instruction.op, ())
        for buffer in touched:
            uses.setdefault(buffer, []).append(step)
    return uses


def _span(
    instructions: tuple[Instruction, ...], uses: list[int], begin: int, end: int
) -> tuple[float | None, float | None]:
    if not 0 <= begin < len(instructions):
        return None, None
    inside = uses[bisect_left(uses, begin) : bisect_left(uses, end)]
    finishes = [instructions[step].finish_s or 0.0 for step in (begin, *inside)]
    return instructions[begin].start_s, max(finishes)
