"""What moving transfers may change: the stretch of the plan in which each load and store can be issued.

An *anchor* is an instruction that computes. Anchors keep their order; loads and stores move between them. A *slot*
``k`` is the place right before anchor ``k``, and the last slot lies behind all anchors. For every buffer its
instructions keep their order too, but that a store and the anchors that only read may change places: they use the same
version. So every plan made here moves the same bytes as the one it began with, and computes the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ...compiler.plan import Instruction, Load, Plan, Residence, Store
from ...compiler.simulate import simulate
from ...errors import OptionError
from ...hw_models.model import aligned_bytes

__all__ = ["Stay", "Transfer", "TransferProblem", "rebuilt", "step_seconds"]


@dataclass(frozen=True)
class Transfer:
    """A load or store by its ``step`` in the plan given; it is issued in a slot from ``first`` to ``last``.

    ``stay`` is the index of its residence, ``seconds`` the time of the fastest engine that takes it. ``behind`` is the
    transfer, by step, of the same buffer that must be issued before it: the store of what a load fetches again.
    """

    step: int
    stay: int
    first: int
    last: int
    seconds: float
    behind: int | None


@dataclass(frozen=True)
class Stay:
    """A residence with its bytes rounded up to the alignment, and everything that uses it.

    ``anchors`` are indices of the computing instructions that touch it, ascending. It begins with the transfer of step
    ``load``, or with its first anchor when that is ``None``; ``stores`` are steps.
    """

    residence: Residence
    footprint: int
    anchors: tuple[int, ...]
    load: int | None
    stores: tuple[int, ...]


@dataclass(frozen=True)
class TransferProblem:
    """The anchors of a plan, by step, its residences, and its transfers by step.

    ``touches`` are indices of the stays each anchor uses, ``writes`` of those it writes. ``room`` is what the stays
    leave of ``capacity`` bytes while each anchor runs, when every load is issued right before its first use and every
    stay ends with its last use.
    """

    plan: Plan
    anchors: tuple[int, ...]
    touches: tuple[tuple[int, ...], ...]
    writes: tuple[frozenset[int], ...]
    stays: tuple[Stay, ...]
    transfers: dict[int, Transfer]
    capacity: int
    room: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, seconds: Sequence[float], pass_name: str) -> TransferProblem:
        """The problem of ``plan``, whose instructions take ``seconds`` each.

        Raises:
            OptionError: the plan has no residences yet.
        """
        if plan.residences is None:
            raise OptionError(
                f"pass {pass_name} moves loads and stores and the plan has no residences",
                hint="run a residency pass before it",
            )
        return _Reader(plan, plan.residences).problem(seconds)


class _Reader:
    """Finds out which residence each instruction uses, and between which anchors each transfer may move."""

    def __init__(self, plan: Plan, residences: tuple[Residence, ...]) -> None:
        self.plan = plan
        self.residences = residences
        self.index = {op.name: i for i, op in enumerate(plan.graph.ops)}
        self.anchors = [s for s, i in enumerate(plan.instructions) if not isinstance(i, Load | Store)]
        self.stays_of: dict[str, list[int]] = {}
        for number in sorted(range(len(residences)), key=lambda r: residences[r].begin):
            self.stays_of.setdefault(residences[number].buffer, []).append(number)
        self.begins = {b: [residences[r].begin for r in stays] for b, stays in self.stays_of.items()}
        self.touched: list[list[tuple[int, bool]]] = [[] for _ in residences]  # anchor, whether it writes
        self.events: dict[str, list[int]] = {}  # steps of a buffer's loads and stores

    def problem(self, seconds: Sequence[float]) -> TransferProblem:
        plan = self.plan
        touches, writes = self._read_anchors()
        moves = [s for s, i in enumerate(plan.instructions) if isinstance(i, Load | Store)]
        for step in moves:
            self.events.setdefault(self._buffer(step), []).append(step)
        stays = self._stays()
        transfers = {step: self._transfer(step, stays, seconds[step]) for step in moves}
        capacity = plan.machine.scratchpad_memory.capacity_bytes
        return TransferProblem(
            plan,
            tuple(self.anchors),
            tuple(touches),
            tuple(writes),
            tuple(stays),
            transfers,
            capacity,
            tuple(_room(stays, len(self.anchors), capacity)),
        )

    def _read_anchors(self) -> tuple[list[tuple[int, ...]], list[frozenset[int]]]:
        touches: list[tuple[int, ...]] = []
        writes: list[frozenset[int]] = []
        for anchor, step in enumerate(self.anchors):
            op = self.index[_operator(self.plan.instructions[step])]
            found = {b: s for b in self.plan.graph.touches[op] if (s := self._stay(b, step)) is not None}
            written = frozenset(found[b] for b in self.plan.graph.writes[op] if b in found)
            for stay in found.values():
                self.touched[stay].append((anchor, stay in written))
            touches.append(tuple(found.values()))
            writes.append(written)
        return touches, writes

    def _stay(self, buffer: str, step: int) -> int | None:
        """The residence of ``buffer`` that holds it at ``step``."""
        position = bisect.bisect_right(self.begins.get(buffer, ()), step) - 1
        if position < 0:
            return None
        stay = self.stays_of[buffer][position]
        return stay if step < self.residences[stay].end else None

    def _buffer(self, step: int) -> str:
        instruction = self.plan.instructions[step]
        assert isinstance(instruction, Load | Store)
        return instruction.buffer

    def _stays(self) -> list[Stay]:
        alignment = self.plan.machine.scratchpad_memory.alignment_bytes
        stays = []
        for number, residence in enumerate(self.residences):
            nbytes = self.plan.graph.buffers[residence.buffer].nbytes
            steps = [s for s in self.events.get(residence.buffer, ()) if residence.begin <= s < residence.end]
            loads = [s for s in steps if isinstance(self.plan.instructions[s], Load)]
            stays.append(
                Stay(
                    residence,
                    aligned_bytes(nbytes, alignment),
                    tuple(anchor for anchor, _ in self.touched[number]),
                    loads[0] if loads else None,
                    tuple(s for s in steps if s not in loads),
                )
            )
        return stays

    def _transfer(self, step: int, stays: Sequence[Stay], seconds: float) -> Transfer:
        buffer = self._buffer(step)
        number = self._stay(buffer, step)
        assert number is not None  # the verifier has seen that every transfer has a residence
        slot = bisect.bisect_left(self.anchors, step)
        siblings = self.stays_of[buffer]
        position = siblings.index(number)
        if isinstance(self.plan.instructions[step], Load):
            earlier = [a for s in siblings[:position] for a in stays[s].anchors]
            behind = [s for s in self.events[buffer] if s < step]
            last = stays[number].anchors[0] if stays[number].anchors else slot
            return Transfer(step, number, earlier[-1] + 1 if earlier else 0, last, seconds, _last(behind))
        return self._store(step, number, siblings[position + 1 :], stays, seconds)

    def _store(self, step: int, number: int, later: Sequence[int], stays: Sequence[Stay], seconds: float) -> Transfer:
        """A store may go back to the write of its version, and on to the next write or the next load of the buffer."""
        slot = bisect.bisect_left(self.anchors, step)
        before = [a for a, writes in self.touched[number] if writes and a < slot]
        behind = [a for a, writes in self.touched[number] if writes and a >= slot]
        if behind:
            last = behind[0]
        elif later and stays[later[0]].anchors:
            last = stays[later[0]].anchors[0]
        else:
            last = slot if later else len(self.anchors)
        predecessors = [s for s in self.events[self._buffer(step)] if s < step]
        return Transfer(step, number, before[-1] + 1 if before else slot, last, seconds, _last(predecessors))


def _operator(instruction: Instruction) -> str:
    assert not isinstance(instruction, Load | Store)
    return instruction.op


def _last(steps: Sequence[int]) -> int | None:
    return steps[-1] if steps else None


def _room(stays: Sequence[Stay], anchors: int, capacity: int) -> list[int]:
    change = [0] * (anchors + 1)
    for stay in stays:
        if stay.anchors:
            change[stay.anchors[0]] += stay.footprint
            change[stay.anchors[-1] + 1] -= stay.footprint
    room, live = [], 0
    for anchor in range(anchors):
        live += change[anchor]
        room.append(capacity - live)
    return room


def step_seconds(plan: Plan) -> list[float]:
    """Seconds each instruction takes, on the engine the simulator gives it."""
    return [(i.finish_s or 0.0) - (i.start_s or 0.0) for i in simulate(plan).instructions]


def rebuilt(problem: TransferProblem, sequence: Sequence[int], offsets: Sequence[int] | None = None) -> Plan:
    """The plan with its instructions in ``sequence``, steps of the plan given; times are dropped.

    Every residence begins as it did and ends with its last use; ``offsets`` are by stay, in bytes.
    """
    plan = problem.plan
    place = {step: position for position, step in enumerate(sequence)}
    residences = []
    for number, stay in enumerate(problem.stays):
        uses = [place[problem.anchors[a]] for a in stay.anchors] + [place[s] for s in stay.stores]
        begin = place[stay.load] if stay.load is not None else min(uses)
        offset = None if offsets is None else offsets[number]
        end = max(uses, default=begin) + 1
        residences.append(Residence(stay.residence.buffer, stay.residence.memory, begin, end, offset))
    residences.sort(key=lambda residence: (residence.begin, residence.buffer))
    instructions = tuple(
        msgspec.structs.replace(plan.instructions[step], engine="", start_s=None, finish_s=None) for step in sequence
    )
    return msgspec.structs.replace(plan, instructions=instructions, residences=tuple(residences))
