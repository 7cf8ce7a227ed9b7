"""A pipeline schedule as plans, one a rank, which the verifier judges alone and together.

The graph of a rank has an operator for each action and message that the problem asks of it, whatever the steps are that
are judged: a step that is left out, doubled, or comes before what it needs is then a fault of the plan. What a stage
holds for a microbatch are buffers of the memory that the limit is for; messages take no bytes of it, as in the problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from ...errors import OptionError
from ...hw_models.model import Engine, EngineKind, HardwareModel, Link, Memory
from ..plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Residence, Run, Store
from .problem import PipelineProblem
from .rank_graph import RankGraph, reduction
from .schedule import Action, ActionKind, TimedSchedule
from .transfers import Message, Step, Transfer, TransferKind, messages_of, with_transfers

__all__ = ["plans_of_steps", "rank_plans"]

_MEMORY, _HOST, _COMPUTE, _COPY, _NETWORK = "activations", "host", "compute", "copy", "gradients"
_UNLIMITED = 1 << 60
_AT_ONCE = 1e30  # bytes a second: how long copies take is the problem's to say
_NS = 1e-9

Moments = Mapping[Action, tuple[int, int]]


def rank_plans(timed: TimedSchedule) -> dict[int, Plan]:
    """The plan of each rank, with times; the problem's unit of time is taken for nanoseconds.

    Raises:
        OptionError: a rank's limit is below what is resident on it.
    """
    orders = zip(timed.schedule.orders, timed.starts, timed.finishes, strict=True)
    moments = {action: (start, finish) for order in orders for action, start, finish in zip(*order, strict=True)}
    reduced = timed.reduced or ((),) * timed.schedule.problem.ranks
    return _plans(timed.schedule.problem, with_transfers(timed), moments, reduced)


def plans_of_steps(problem: PipelineProblem, steps: Mapping[int, Sequence[Step]]) -> dict[int, Plan]:
    """The plans of ranks that execute ``steps``, by rank, without times: what to judge before it runs.

    A receive is posted where it stands and waited for where its data are needed; sends are waited for at the end. A
    backward counts as whole where any rank does it whole. Nothing is refused here but what has no plan: what is wrong
    with the steps is for ``verify`` and ``verify_ranks``. Gradients' all-reduces are no steps of it.

    Raises:
        OptionError: a rank's limit is below what is resident on it.
    """
    return _plans(problem, steps, {}, ((),) * problem.ranks)


def _plans(
    problem: PipelineProblem,
    steps: Mapping[int, Sequence[Step]],
    moments: Moments,
    reduced: Sequence[Sequence[tuple[int, int, int]]],
) -> dict[int, Plan]:
    given = [step for own in steps.values() for step in own if isinstance(step, Action)]
    whole = frozenset(step for step in given if step.kind is ActionKind.BACKWARD)
    messages = [m for number in range(problem.microbatches) for m in messages_of(problem, number, whole)]
    return {
        rank: _RankPlan(RankGraph(problem, rank, whole, messages), moments, reduced[rank]).plan(steps.get(rank, ()))
        for rank in range(problem.ranks)
    }


class _RankPlan:
    """Writes down the instructions of one rank, and what is held when."""

    def __init__(self, written: RankGraph, moments: Moments, reduced: Sequence[tuple[int, int, int]]) -> None:
        self.written, self.moments, self.reduced = written, moments, reduced
        self.lanes: dict[str, list[int]] = {}  # of each direction: when each of its links is free

    def plan(self, steps: Sequence[Step]) -> Plan:
        graph = self.written.graph([stage for stage, *_ in self.reduced])
        issued = [*self._issued(steps)]
        places = list(range(len(issued)))
        if self.moments:
            # An engine keeps its order: what it does never starts before what it did. Equal starts stay as they are.
            places.sort(key=lambda place: issued[place].start_s or 0.0)
        instructions = [issued[place] for place in places]
        machine = self._machine()
        return Plan(graph, machine, tuple(instructions), residences=tuple(self._residences(instructions, places)))

    def _issued(self, steps: Sequence[Step]) -> Iterator[Instruction]:
        flying: dict[Transfer, int | None] = {}
        for step in steps:
            if isinstance(step, Transfer):
                start, finish = self._flight(step)
                yield self._timed(CollectiveStart(str(step), self._lane(step, start, finish)), start, finish)
                flying.setdefault(step, finish)
                continue
            start, finish = self.moments.get(step, (None, None))
            for transfer in self.written.arrives.get(step, ()):
                if transfer in flying:
                    del flying[transfer]
                    yield self._timed(CollectiveWait(str(transfer)), start, start)
            yield self._timed(self._instruction(step), start, finish)
        for transfer, finish in flying.items():
            yield self._timed(CollectiveWait(str(transfer)), finish, finish)
        for stage, start, finish in self.reduced:
            yield self._timed(CollectiveStart(reduction(stage), _NETWORK), start, finish)
            yield self._timed(CollectiveWait(reduction(stage)), finish, finish)

    def _timed(self, instruction: Instruction, start: int | None, finish: int | None) -> Instruction:
        if start is None or finish is None:
            return msgspec.structs.replace(instruction, engine="")
        return msgspec.structs.replace(instruction, start_s=start * _NS, finish_s=finish * _NS)

    def _instruction(self, action: Action) -> Instruction:
        moved = f"{Action(action.stage, ActionKind.FORWARD, action.microbatch)} offloaded"
        if action.kind is ActionKind.OFFLOAD:
            return Store(moved, _COPY)
        return Load(moved, _COPY) if action.kind is ActionKind.RELOAD else Run(str(action), _COMPUTE)

    def _flight(self, transfer: Transfer) -> tuple[int | None, int | None]:
        """When a message is on its way, if there are times: from when all that it carries is there."""
        message: Message | None = self.written.mine.get(transfer)
        if message is None or not self.moments:
            return None, None
        start = max(self.moments[action][1] for action in message.after)
        return start, start + message.lag_ns

    def _lane(self, transfer: Transfer, start: int | None, finish: int | None) -> str:
        """A link for the message: the first of its direction that is free; messages on their way share none."""
        if start is None or finish is None:
            return ""
        sender, *others = self.written.mine[transfer].ranks
        direction = "all ranks"
        if transfer.kind in (TransferKind.SEND_F, TransferKind.SEND_B):
            direction = f"to rank {others[0]}"
        elif transfer.kind in (TransferKind.RECV_F, TransferKind.RECV_B):
            direction = f"from rank {sender}"
        lanes = self.lanes.setdefault(direction, [])
        free = next((number for number, until in enumerate(lanes) if until <= start), len(lanes))
        lanes[free : free + 1] = [finish]
        return direction if not free else f"{direction} ({free + 1})"

    def _machine(self) -> HardwareModel:
        problem, rank = self.written.problem, self.written.rank
        capacity = _UNLIMITED
        if problem.memory_limit is not None:
            capacity = problem.memory_limit[rank] - problem.resident_bytes[rank]
        if capacity < 0 or (capacity == 0 and any(self.written.makes.values())):
            raise OptionError(
                f"rank {rank} may hold {problem.memory_limit and problem.memory_limit[rank]} bytes, of which "
                f"{problem.resident_bytes[rank]} are taken by what is resident",
                hint="raise the limit, or give the rank fewer stages",
            )
        names = [_NETWORK] if self.reduced else []
        for direction, lanes in sorted(self.lanes.items()):
            names += [direction if not number else f"{direction} ({number + 1})" for number in range(len(lanes))]
        return HardwareModel(
            name=f"rank {rank}",
            description="one rank of a pipeline; how long things take is its schedule's to say",
            sources=(),
            scratchpad=_MEMORY,
            backing=_HOST,
            memories=(Memory(_MEMORY, max(1, capacity), 1, _AT_ONCE), Memory(_HOST, 1 << 60, 1, _AT_ONCE)),
            engines=(
                Engine(_COMPUTE, EngineKind.COMPUTE, {"default": 1 / _NS}),  # an operation a nanosecond
                Engine(_COPY, EngineKind.COPY, bandwidth_bytes_per_s=_AT_ONCE),
            ),
            links=tuple(Link(name, _AT_ONCE, 0.0) for name in names),
        )

    def _residences(self, instructions: Sequence[Instruction], places: Sequence[int]) -> Iterator[Residence]:
        """What is held, from the instruction that makes or loads it to the first that starts when it is freed."""
        first: dict[tuple[type, str], int] = {}
        for step, instruction in enumerate(instructions):
            if isinstance(instruction, Run):
                first.setdefault((Run, instruction.op), step)
            elif isinstance(instruction, Load | Store):
                first.setdefault((type(instruction), instruction.buffer), step)
        ends = _Ends(instructions, places)
        freed = {buffer: name for name, buffers in self.written.frees.items() for buffer in buffers}
        for name, buffers in self.written.makes.items():
            begin = first.get((Run, name))
            for buffer in buffers if begin is not None else ():
                end = ends.of(first.get((Run, freed[buffer])))
                gone, back = first.get((Store, buffer)), first.get((Load, buffer))
                if gone is not None:
                    yield Residence(buffer, _MEMORY, begin or 0, ends.of(gone, latest=back))
                    begin = back
                if begin is None:
                    continue
                yield Residence(buffer, _MEMORY, begin or 0, max(end, (begin or 0) + 1))


class _Ends:
    """The step before which what an instruction frees is free; ``places`` are those of the rank's order."""

    def __init__(self, instructions: Sequence[Instruction], places: Sequence[int]) -> None:
        self.instructions, self.places = instructions, places

    def of(self, step: int | None, latest: int | None = None) -> int:
        """That of instruction ``step``, and ``latest`` at the latest; without one it is the end of the plan."""
        last = len(self.instructions) if latest is None else latest
        if step is None:
            return last
        finish = self.instructions[step].finish_s
        if finish is None:
            return min(step + 1, last)
        for later in range(step + 1, last):
            instruction = self.instructions[later]
            start = instruction.start_s or 0.0
            # What starts at that very moment finds it free if it stands behind it, as in the schedule.
            free = start > finish or (start == finish and self.places[later] > self.places[step])
            if free and isinstance(instruction, Run | Load | Store):
                return later
        return last
