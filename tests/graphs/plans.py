"""Two plans that are right for every graph and decide nothing cleverly: keep everything, and keep nothing."""

from __future__ import annotations

from collections.abc import Iterable

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Instruction, Load, Plan, Residence, Run, Store
from opweave.hw_models.model import HardwareModel

from .build import machine as default_machine

__all__ = ["keep_everything", "keep_nothing"]


def keep_everything(
    graph: Graph, machine: HardwareModel | None = None, *, streamed: Iterable[str] = (), gap_bytes: int = 0
) -> Plan:
    """Load every source that is used, run in program order, store every output; nothing is ever dropped.

    Buffers lie one behind the other, ``gap_bytes`` apart, whatever the machine's capacity is.
    """
    machine, skip = machine or default_machine(), frozenset(streamed)
    used = dict.fromkeys(b for touched in graph.touches for b in touched)
    moved = [b for b in used if graph.buffers[b].nbytes and b not in skip]
    sources = [b for b in moved if graph.buffers[b].role.is_source]
    begin = {buffer: step for step, buffer in enumerate(sources)}
    instructions: list[Instruction] = [Load(buffer) for buffer in sources]
    for op, written in zip(graph.ops, graph.writes, strict=True):
        begin |= {b: len(instructions) for b in written if b not in begin}
        instructions.append(Run(op.name))
    instructions += [Store(b) for b in sorted(graph.output_buffers) if graph.buffers[b].nbytes]
    residences, offset = [], 0
    for buffer in moved:
        residences.append(Residence(buffer, machine.scratchpad, begin[buffer], len(instructions), offset))
        offset = _aligned(offset + graph.buffers[buffer].nbytes + gap_bytes, machine)
    return Plan(graph, machine, tuple(instructions), tuple(residences), tuple(sorted(skip)))


def keep_nothing(graph: Graph, machine: HardwareModel | None = None, *, streamed: Iterable[str] = ()) -> Plan:
    """Load an operator's operands, run it, store what it wrote, drop everything; then the next operator."""
    machine, skip = machine or default_machine(), frozenset(streamed)
    existing = {name for name, base in graph.buffers.items() if base.role.is_source}
    instructions: list[Instruction] = []
    residences: list[Residence] = []
    for op, touched, written in zip(graph.ops, graph.touches, graph.writes, strict=True):
        moved = [b for b in touched if graph.buffers[b].nbytes and b not in skip]
        begin: dict[str, int] = {}
        for buffer in moved:
            if buffer in existing:
                begin[buffer] = len(instructions)
                instructions.append(Load(buffer))
        begin |= {b: len(instructions) for b in moved if b not in begin}
        instructions.append(Run(op.name))
        instructions += [Store(b) for b in written if b in begin]
        existing.update(written)
        offset = 0
        for buffer in moved:
            residences.append(Residence(buffer, machine.scratchpad, begin[buffer], len(instructions), offset))
            offset = _aligned(offset + graph.buffers[buffer].nbytes, machine)
    return Plan(graph, machine, tuple(instructions), tuple(residences), tuple(sorted(skip)))


def _aligned(offset: int, machine: HardwareModel) -> int:
    alignment = machine.scratchpad_memory.alignment_bytes
    return -(-offset // alignment) * alignment
