"""Which bytes each step of a plan accesses, and which earlier steps it conflicts with."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from ....errors import PlanError
from ...graph import OpKind
from ...plan import Load, Plan, Residence, Store

__all__ = ["Access", "accesses", "predecessors"]


@dataclass(frozen=True)
class Access:
    """Bytes ``begin`` to ``end - 1`` of ``space``, which a step reads or ``writes``."""

    space: str
    begin: int
    end: int
    writes: bool


def accesses(plan: Plan, *, by_address: bool = True) -> list[tuple[Access, ...]]:
    """What each step accesses: bytes of the scratchpad or of a copy in backing memory, and tensors without bytes.

    Without ``by_address`` each buffer has bytes of its own, as if nothing shared an address. Boundary operators access
    nothing.

    Raises:
        PlanError: a buffer that is accessed has no residence at that step, or one without an offset.
    """
    places = _Places(plan, by_address)
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    result: list[tuple[Access, ...]] = []
    for step, instruction in enumerate(plan.instructions):
        if not isinstance(instruction, Load | Store):
            op = index[instruction.op]
            if plan.graph.ops[op].kind is OpKind.BOUNDARY:
                result.append(())
                continue
            read = [places.of(buffer, step, writes=False) for buffer in plan.graph.reads[op]]
            result.append((*read, *(places.of(buffer, step, writes=True) for buffer in plan.graph.writes[op])))
        else:
            loads = isinstance(instruction, Load)
            backing = places.backing(instruction.buffer, writes=not loads)
            result.append((backing, places.of(instruction.buffer, step, writes=loads)))
    return result


class _Places:
    def __init__(self, plan: Plan, by_address: bool) -> None:
        self.nbytes = {name: base.nbytes for name, base in plan.graph.buffers.items()}
        self.streamed = frozenset(plan.streamed)
        self.by_address = by_address
        self.residences: dict[str, list[Residence]] = {}
        for residence in sorted(plan.residences or (), key=lambda r: r.begin):
            self.residences.setdefault(residence.buffer, []).append(residence)

    def of(self, buffer: str, step: int, *, writes: bool) -> Access:
        """The bytes of ``buffer`` at ``step``."""
        nbytes = self.nbytes[buffer]
        if buffer in self.streamed:
            return self.backing(buffer, writes=writes)
        if nbytes == 0 or not self.by_address:
            return Access(f"buffer {buffer}", 0, 1, writes)
        stays = self.residences.get(buffer, [])
        position = bisect.bisect_right(stays, step, key=lambda r: r.begin) - 1
        if position < 0 or stays[position].end <= step or stays[position].offset is None:
            raise PlanError(f"buffer {buffer!r} has no address at step {step}, which uses it")
        first = stays[position].offset or 0
        return Access(stays[position].memory, first, first + nbytes, writes)

    def backing(self, buffer: str, *, writes: bool) -> Access:
        """The copy of ``buffer`` in backing memory."""
        return Access(f"backing {buffer}", 0, 1, writes)


def predecessors(touched: Sequence[Sequence[Access]]) -> list[tuple[int, ...]]:
    """For each step the earlier ones it conflicts with; of those that are ordered among themselves, the last suffice.

    These are the last writer of each byte, and for a step that writes it all readers since.
    """
    spaces: dict[str, _Bytes] = {}
    result: list[tuple[int, ...]] = []
    for step, items in enumerate(touched):
        before: set[int] = set()
        for access in items:
            before |= spaces.setdefault(access.space, _Bytes()).access(access, step)
        result.append(tuple(sorted(before - {step})))
    return result


class _Bytes:
    """Disjoint ranges of bytes in order, each with its last writer, -1 for none, and its readers since."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int, frozenset[int]]] = []

    def access(self, access: Access, step: int) -> set[int]:
        """Note an access; returns the steps that must come before."""
        low, inside, high = self._cut(access.begin, access.end)
        before = {writer for _, _, writer, _ in inside if writer >= 0}
        if access.writes:
            before.update(*(readers for _, _, _, readers in inside))
            inside = [(access.begin, access.end, step, frozenset())]
        else:
            inside = [(begin, end, writer, readers | {step}) for begin, end, writer, readers in inside]
        self.ranges[low:high] = inside
        return before

    def _cut(self, begin: int, end: int) -> tuple[int, list[tuple[int, int, int, frozenset[int]]], int]:
        """Ranges that make up ``[begin, end)`` exactly, and the positions they belong between."""
        for at in (begin, end):
            position = bisect.bisect_right(self.ranges, at, key=lambda r: r[0]) - 1
            if position >= 0 and self.ranges[position][0] < at < self.ranges[position][1]:
                first, last, writer, readers = self.ranges[position]
                self.ranges[position : position + 1] = [(first, at, writer, readers), (at, last, writer, readers)]
        low = bisect.bisect_left(self.ranges, begin, key=lambda r: r[0])
        high = bisect.bisect_left(self.ranges, end, key=lambda r: r[0])
        inside: list[tuple[int, int, int, frozenset[int]]] = []
        reached = begin
        for known in [*self.ranges[low:high], (end, end, -1, frozenset[int]())]:
            if reached < known[0]:
                inside.append((reached, known[0], -1, frozenset()))
            if known[0] < known[1]:
                inside.append(known)
            reached = known[1]
        return low, inside, high
