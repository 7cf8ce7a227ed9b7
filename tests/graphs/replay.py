"""Executes a plan on symbols, byte by byte and event by event, knowing nothing of the verifier's rules.

A buffer's contents are a term: ``(operator, buffer, contents of what it read)``. An instruction reads its operands when
it starts, must find the same bytes when it finishes, and leaves its destination undefined in between.
"""

from __future__ import annotations

import itertools

from opweave.compiler.plan import Instruction, Load, Plan, Recompute, Run, Store

__all__ = ["computes_the_right_outputs"]

_Contents = tuple[object, ...]


def computes_the_right_outputs(plan: Plan) -> bool:
    """Whether every output buffer ends in backing memory with the contents that program order gives it.

    The plan has offsets; without times, instructions run one after another.
    """
    machine = _SymbolicMachine(plan)
    events = []
    for step, instruction in enumerate(plan.instructions):
        start, finish = instruction.start_s, instruction.finish_s
        if start is None or finish is None:
            start, finish = step, step + 0.5
        events += [(finish, 0, step), (start, 1, step)]
    for _, begins, step in sorted(events):
        (machine.start if begins else machine.finish)(step, plan.instructions[step])
    expected = _program_order(plan)
    return not machine.disturbed and all(machine.backing.get(b) == expected[b] for b in machine.outputs)


def _program_order(plan: Plan) -> dict[str, _Contents]:
    """Contents of every buffer after the operators ran in program order."""
    graph = plan.graph
    contents: dict[str, _Contents] = {b: ("source", b) for b, base in graph.buffers.items() if base.role.is_source}
    for index, op in enumerate(graph.ops):
        term = (op.name, tuple(contents[b] for b in graph.reads[index]))
        before = {b: contents.get(b) for b in graph.writes[index]}
        contents |= {b: (*term, b, before[b]) for b in graph.writes[index]}
    return contents


class _SymbolicMachine:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph = plan.graph
        self.index = {op.name: i for i, op in enumerate(plan.graph.ops)}
        self.outputs = [b for b in plan.graph.output_buffers if plan.graph.buffers[b].nbytes]
        self.backing: dict[str, _Contents] = {
            b: ("source", b) for b, base in plan.graph.buffers.items() if base.role.is_source
        }
        self.arena: dict[int, tuple[_Contents, int]] = {}
        self.seen: dict[int, dict[str, _Contents]] = {}
        self.garbage = itertools.count()
        self.disturbed = False

    def start(self, step: int, instruction: Instruction) -> None:
        self.seen[step] = self._operands(step, instruction)
        for buffer in self._destinations(instruction):
            exists = (
                isinstance(instruction, Run | Recompute)
                and buffer not in self.graph.ops[self.index[instruction.op]].outputs
            )
            if not exists:
                self._write(buffer, step, ("undefined", next(self.garbage)))

    def finish(self, step: int, instruction: Instruction) -> None:
        seen = self.seen[step]
        self.disturbed |= seen != self._operands(step, instruction)
        if isinstance(instruction, Store):
            self.backing[instruction.buffer] = seen[instruction.buffer]
        elif isinstance(instruction, Load):
            self._write(instruction.buffer, step, seen[instruction.buffer])
        else:
            op = self.index[instruction.op]
            term = (instruction.op, tuple(seen[b] for b in self.graph.reads[op]))
            for buffer in self.graph.writes[op]:
                created = buffer in self.graph.ops[op].outputs
                self._write(buffer, step, (*term, buffer, None if created else seen[buffer]))

    def _destinations(self, instruction: Instruction) -> tuple[str, ...]:
        if isinstance(instruction, Run | Recompute):
            return self.graph.writes[self.index[instruction.op]]
        return (instruction.buffer,) if isinstance(instruction, Load) else ()

    def _operands(self, step: int, instruction: Instruction) -> dict[str, _Contents]:
        if isinstance(instruction, Load):
            return {instruction.buffer: self._backing(instruction.buffer)}
        if isinstance(instruction, Store):
            return {instruction.buffer: self._read(instruction.buffer, step)}
        op = self.index[instruction.op]
        created = self.graph.ops[op].outputs
        return {
            b: self._backing(b) if b in self.plan.streamed else self._read(b, step)
            for b in self.graph.touches[op]
            if b not in created
        }

    def _backing(self, buffer: str) -> _Contents:
        return self.backing.get(buffer, ("nothing", buffer))

    def _region(self, buffer: str, step: int) -> range | None:
        for r in self.plan.residences or ():
            if r.buffer == buffer and r.begin <= step < r.end and r.offset is not None:
                return range(r.offset, r.offset + self.graph.buffers[buffer].nbytes)
        return None

    def _read(self, buffer: str, step: int) -> _Contents:
        """The contents all bytes of a buffer agree on; a buffer without bytes always holds what it should."""
        if self.graph.buffers[buffer].nbytes == 0:
            return self._empty(buffer)
        region = self._region(buffer, step)
        cells = [self.arena.get(address) for address in region or ()]
        first = cells[0] if cells else None
        if first is None or cells != [(first[0], position) for position in range(len(cells))]:
            return ("mixture", buffer, step)
        return first[0]

    def _empty(self, buffer: str) -> _Contents:
        return self.backing.get(buffer, ("empty", buffer))

    def _write(self, buffer: str, step: int, contents: _Contents) -> None:
        region = self._region(buffer, step)
        if self.graph.buffers[buffer].nbytes == 0:
            self.backing[buffer] = contents
        elif region is None:
            self.disturbed = True
        else:
            self.arena.update({address: (contents, position) for position, address in enumerate(region)})
