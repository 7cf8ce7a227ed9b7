"""Bytes moved between backing memory and the scratchpad or the engines, buffer by buffer."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Load, Plan, Recompute, Store
from .facts import Facts
from .order import first_runs

__all__ = ["BufferTraffic", "count_traffic"]


@dataclass(frozen=True)
class BufferTraffic:
    """Bytes of one buffer that were loaded, stored and streamed, and how many of them no plan can avoid."""

    buffer: str
    loaded_bytes: int
    stored_bytes: int
    streamed_bytes: int
    compulsory_bytes: int

    @property
    def total_bytes(self) -> int:
        """All bytes moved."""
        return self.loaded_bytes + self.stored_bytes + self.streamed_bytes


def count_traffic(plan: Plan, facts: Facts) -> tuple[BufferTraffic, ...]:
    """Traffic of every buffer that moves or must, most bytes first.

    A plan that has decided only its order is counted as moving exactly what is compulsory.
    """
    read = {buffer for buffers in facts.reads for buffer in buffers if facts.is_source(buffer)}
    loaded, stored, streamed = (dict.fromkeys(facts.nbytes, 0) for _ in range(3))
    if plan.residences is None:
        for buffer in read:
            (streamed if buffer in facts.streamed else loaded)[buffer] = facts.nbytes[buffer]
        for buffer in facts.outputs:
            stored[buffer] = facts.nbytes[buffer]
    else:
        _count_moves(plan, facts, loaded, stored, streamed)
    rows = []
    for buffer, nbytes in facts.nbytes.items():
        compulsory = nbytes * (int(buffer in read) + int(buffer in facts.outputs))
        row = BufferTraffic(buffer, loaded[buffer], stored[buffer], streamed[buffer], compulsory)
        if row.total_bytes or compulsory:
            rows.append(row)
    return tuple(sorted(rows, key=lambda row: (-row.total_bytes, row.buffer)))


def _count_moves(
    plan: Plan, facts: Facts, loaded: dict[str, int], stored: dict[str, int], streamed: dict[str, int]
) -> None:
    again = (facts.op_index.get(i.op) for i in plan.instructions if isinstance(i, Recompute))
    for index in (*first_runs(plan, facts), *(index for index in again if index is not None)):
        for buffer in facts.reads[index]:
            if buffer in facts.streamed:
                streamed[buffer] += facts.nbytes[buffer]
    for instruction in plan.instructions:
        if isinstance(instruction, Load | Store) and instruction.buffer in facts.nbytes:
            moved = loaded if isinstance(instruction, Load) else stored
            moved[instruction.buffer] += facts.nbytes[instruction.buffer]
