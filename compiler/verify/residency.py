"""Replays the instructions and watches where each buffer's current version is: in its residence, in backing memory.

A version is the number of writes the buffer has seen. After a finding the replay goes on as if it had been repaired,
so that one mistake gives one finding wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Recompute, Residence, Run, Store
from .facts import Facts
from .faults import Fault, Finding
from .order import first_runs

__all__ = ["check_residences", "replay"]


def check_residences(plan: Plan, facts: Facts, residences: tuple[Residence, ...]) -> Iterator[Finding]:
    """Each residence is in range and has bytes, begun by a load or where an operator creates its buffer."""
    steps = len(plan.instructions)
    last: dict[str, Residence] = {}
    for residence in sorted(residences, key=lambda r: (r.begin, r.end)):
        name, begin = residence.buffer, residence.begin
        if facts.nbytes[name] == 0:
            yield Finding(Fault.ZERO_BYTES_MOVED, f"buffer {name!r} has no bytes, so it has no residence", begin)
        if not 0 <= begin < residence.end <= steps:
            message = f"buffer {name!r} is resident in [{begin}, {residence.end}); the plan has steps 0 to {steps}"
            yield Finding(Fault.RESIDENCE_OUT_OF_RANGE, message, begin)
        elif not _explained(plan, facts, residence):
            message = f"buffer {name!r} appears, but this instruction neither loads it nor first writes it"
            yield Finding(Fault.RESIDENCE_UNEXPLAINED, message, begin)
        other = last.get(name)
        if other is not None and begin < other.end:
            message = f"buffer {name!r} is already resident in [{other.begin}, {other.end}); one place at a time"
            yield Finding(Fault.RESIDENCE_REPEATED, message, begin)
        if other is None or residence.end > other.end:
            last[name] = residence


def _explained(plan: Plan, facts: Facts, residence: Residence) -> bool:
    instruction = plan.instructions[residence.begin]
    if not isinstance(instruction, Load | Store):
        index = facts.op_index.get(instruction.op)
        creates = not isinstance(instruction, CollectiveWait)
        return index is None or (creates and residence.buffer in facts.creates[index])
    return not isinstance(instruction, Store) and instruction.buffer == residence.buffer


def replay(plan: Plan, facts: Facts, residences: tuple[Residence, ...]) -> Iterator[Finding]:
    """Run, load and store as the plan says; every operand must be where the plan claims it is."""
    state = _Replay(facts)
    first = first_runs(plan, facts)
    begins: dict[int, list[Residence]] = {}
    for residence in residences:
        begins.setdefault(max(0, residence.begin), []).append(residence)
    for step, instruction in enumerate(plan.instructions):
        for residence in begins.get(step, ()):
            state.begin(residence)
        yield from _replay_step(state, first, instruction, step)
    yield from state.finish()


def _replay_step(state: _Replay, first: dict[int, int], instruction: Instruction, step: int) -> Iterator[Finding]:
    """One instruction; those that run no operator, or a second time, are named by check_order and skipped."""
    facts = state.facts
    if isinstance(instruction, Run | CollectiveStart):
        index = facts.op_index.get(instruction.op)
        if index is not None and first[index] == step:
            yield from state.run(instruction.op, index, step)
    elif isinstance(instruction, Recompute):
        index = facts.op_index.get(instruction.op)
        if index is not None and index in state.read:
            yield from state.recompute(instruction.op, index, step)
    elif isinstance(instruction, CollectiveWait):
        index = facts.op_index.get(instruction.op)
        if index is not None and first.get(index, step) < step:
            yield from state.wait(instruction.op, index, first[index], step)
    elif instruction.buffer not in facts.nbytes:
        return  # named by check_names
    elif facts.nbytes[instruction.buffer] == 0:
        yield Finding(Fault.ZERO_BYTES_MOVED, f"buffer {instruction.buffer!r} has no bytes to move", step)
    elif isinstance(instruction, Store):
        yield from state.store(instruction.buffer, step)
    else:
        yield from state.load(instruction.buffer, step)


class _Replay:
    """Versions, backing copies and current residences; version 0 means that the buffer does not exist yet."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.version = {buffer: int(facts.is_source(buffer)) for buffer in facts.nbytes}
        self.backing = dict(self.version)
        self.residence: dict[str, tuple[int, int]] = {}
        self.given_up: set[str] = set()
        self.read: dict[int, dict[str, int]] = {}  # the versions each operator read when it ran

    def begin(self, residence: Residence) -> None:
        begin, end = self.residence.get(residence.buffer, (0, 0))
        if end <= residence.begin:
            begin = residence.begin
        self.residence[residence.buffer] = (begin, max(end, residence.end))
        self.given_up.discard(residence.buffer)

    def is_resident(self, buffer: str, step: int) -> bool:
        return buffer in self.residence and self.residence[buffer][1] > step

    def run(self, op: str, index: int, step: int) -> Iterator[Finding]:
        facts = self.facts
        for buffer in facts.reads[index]:
            yield from self._use(f"operator {op!r} reads", buffer, step, Fault.NOT_RESIDENT_WHEN_READ)
        self.read[index] = {buffer: self.version[buffer] for buffer in facts.reads[index]}
        for buffer in facts.writes[index]:
            if buffer in facts.creates[index]:
                self.version[buffer] += 1
                if facts.nbytes[buffer] and not self.is_resident(buffer, step):
                    message = f"operator {op!r} creates buffer {buffer!r}, which has no residence beginning here"
                    yield Finding(Fault.NOT_RESIDENT_WHEN_WRITTEN, message, step)
                    self.given_up.add(buffer)
                continue
            if buffer not in facts.reads[index]:
                yield from self._use(f"operator {op!r} updates", buffer, step, Fault.NOT_RESIDENT_WHEN_WRITTEN)
            self.version[buffer] += int(self.version[buffer] > 0)

    def recompute(self, op: str, index: int, step: int) -> Iterator[Finding]:
        facts = self.facts
        for buffer in facts.reads[index]:
            if self.version[buffer] != self.read[index][buffer]:
                message = f"operator {op!r} is recomputed, but its operand {buffer!r} was updated since it ran"
                yield Finding(Fault.OPERAND_UPDATED, message, step)
            yield from self._use(f"operator {op!r}, recomputed, reads", buffer, step, Fault.NOT_RESIDENT_WHEN_READ)
        for buffer in facts.writes[index]:
            if facts.nbytes[buffer] == 0:
                continue
            if not self.is_resident(buffer, step):
                message = f"operator {op!r} recomputes buffer {buffer!r}, which has no residence beginning here"
                yield Finding(Fault.NOT_RESIDENT_WHEN_WRITTEN, message, step)
                self.given_up.add(buffer)
            elif self.residence[buffer][0] < step:
                since = self.residence[buffer][0]
                message = f"operator {op!r} recomputes buffer {buffer!r}, resident since step {since}"
                yield Finding(Fault.RECOMPUTE_OF_RESIDENT, message, step)

    def wait(self, op: str, index: int, start: int, step: int) -> Iterator[Finding]:
        """What a collective reads and writes has stayed where it was since the collective was started."""
        for buffer in sorted({*self.facts.reads[index], *self.facts.writes[index]}):
            begin, end = self.residence.get(buffer, (0, 0))
            if not self.facts.nbytes[buffer] or buffer in self.facts.streamed or buffer in self.given_up:
                continue
            if begin > start or end <= step:
                message = f"collective {op!r}, started at step {start}, still uses buffer {buffer!r}, which has left"
                yield Finding(Fault.NOT_RESIDENT_WHEN_READ, message, step)

    def _use(self, who: str, buffer: str, step: int, fault: Fault) -> Iterator[Finding]:
        if self.is_resident(buffer, step) or self.facts.nbytes[buffer] == 0 or buffer in self.facts.streamed:
            return
        if self.version[buffer] == 0 or buffer in self.given_up:
            return  # before its creator, which is a violated dependency; or named already
        if self.backing[buffer] == self.version[buffer]:
            yield Finding(fault, f"{who} buffer {buffer!r}, which has no residence now; load it before", step)
        else:
            message = f"{who} buffer {buffer!r}, whose residence ended before its value was stored"
            yield Finding(Fault.VALUE_LOST, message, step)
            self.given_up.add(buffer)

    def load(self, buffer: str, step: int) -> Iterator[Finding]:
        if buffer in self.facts.streamed:
            yield Finding(Fault.STREAMED_ILLEGALLY, f"buffer {buffer!r} is streamed, so it is not loaded", step)
            return
        if not self.is_resident(buffer, step):
            message = f"buffer {buffer!r} is loaded but has no residence beginning here"
            yield Finding(Fault.LOAD_WITHOUT_RESIDENCE, message, step)
        elif self.residence[buffer][0] < step:
            message = f"buffer {buffer!r} has been resident since step {self.residence[buffer][0]}"
            yield Finding(Fault.LOAD_OF_RESIDENT, message, step)
            return
        if self.backing[buffer] == 0:
            message = f"buffer {buffer!r} was never stored, so backing memory has nothing to load"
            yield Finding(Fault.LOAD_WITHOUT_COPY, message, step)
        elif self.backing[buffer] != self.version[buffer]:
            message = f"buffer {buffer!r} was updated since it was last stored; store it again before dropping it"
            yield Finding(Fault.LOAD_OF_STALE_COPY, message, step)
        self.backing[buffer] = self.version[buffer]

    def store(self, buffer: str, step: int) -> Iterator[Finding]:
        if not self.is_resident(buffer, step):
            yield Finding(Fault.STORE_NOT_RESIDENT, f"buffer {buffer!r} has no residence to store from", step)
        self.backing[buffer] = self.version[buffer]

    def finish(self) -> Iterator[Finding]:
        for buffer in sorted(self.facts.outputs):
            if self.facts.nbytes[buffer] and self.backing[buffer] != self.version[buffer]:
                message = f"the last version of buffer {buffer!r} is an output but is never stored to backing memory"
                yield Finding(Fault.OUTPUT_NOT_STORED, message)
