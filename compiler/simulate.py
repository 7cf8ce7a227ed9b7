"""Gives a plan its times: every engine issues its instructions in the plan's order, each as soon as it may start.

An instruction waits for its engine, for its operands (what loads or computes them), and, when it begins a residence,
for the last user of the bytes it takes over. A load waits for the store it depends on, an update for earlier readers.
Where a plan has residences without offsets, any two of them may come to share bytes, so that the first instruction of
a residence waits for the users of every residence that ended before: no placement of that plan takes longer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import msgspec

from ..errors import PlanError
from ..hw_models.cost import op_seconds, transfer_seconds
from ..hw_models.model import Direction, Engine, EngineKind, HardwareModel
from .graph import OpKind
from .plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Residence, Store

_T = TypeVar("_T")

__all__ = ["EngineUse", "Timeline", "latency_ns", "simulate", "timeline_summary"]


@dataclass(frozen=True)
class EngineUse:
    """Seconds an engine or link is busy, and the fraction of the plan's latency that makes.

    ``kind`` is the engine's, or ``"link"``.
    """

    engine: str
    kind: str
    busy_s: float
    utilisation: float


@dataclass(frozen=True)
class Timeline:
    """How long a timed plan takes and the roofline below it.

    ``compute_bound_s`` is the sum of all operators' seconds, shared among the compute engines; ``transfer_bound_s`` the
    bytes loaded and stored over the copy engines' bandwidth; ``communication_bound_s`` the seconds of the collectives
    on the link that is busiest. No schedule of these instructions beats the largest.
    """

    latency_s: float
    engines: tuple[EngineUse, ...]
    compute_bound_s: float
    transfer_bound_s: float
    communication_bound_s: float = 0.0

    @property
    def bound_s(self) -> float:
        """The roofline bound on the latency."""
        return max(self.compute_bound_s, self.transfer_bound_s, self.communication_bound_s)

    @property
    def bound_by(self) -> Literal["compute", "transfer", "communication"]:
        """Which of its terms the bound is."""
        if self.communication_bound_s > max(self.compute_bound_s, self.transfer_bound_s):
            return "communication"
        return "compute" if self.compute_bound_s >= self.transfer_bound_s else "transfer"


def simulate(plan: Plan) -> Plan:
    """The same plan with an engine, a start and a finish in seconds on every instruction.

    Each instruction goes to the engine of its kind that finishes it first, the earliest described among equals.

    Raises:
        PlanError: an instruction names an operator or buffer that the graph does not have. Anything else that is
            wrong with the plan is the verifier's to say.
    """
    clock = _Clock(plan)
    timed = tuple(clock.issue(step, instruction) for step, instruction in enumerate(plan.instructions))
    return msgspec.structs.replace(plan, instructions=timed)


def latency_ns(plan: Plan) -> int:
    """Nanoseconds until the last instruction of ``plan`` is done as ``simulate`` times it, rounded up."""
    return math.ceil(max((i.finish_s or 0.0 for i in simulate(plan).instructions), default=0.0) * 1e9)


def timeline_summary(plan: Plan) -> Timeline:
    """Latency, use of every engine and roofline bound of a timed plan.

    Raises:
        PlanError: an instruction has no times, or names an operator, buffer or engine that does not exist.
    """
    links = {link.name for link in plan.machine.links}
    busy = dict.fromkeys((*(engine.name for engine in plan.machine.engines), *sorted(links)), 0.0)
    latency_s = compute_s = 0.0
    moved = {Direction.LOAD: 0, Direction.STORE: 0}
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    computing, streamed = plan.machine.engines_of(EngineKind.COMPUTE), frozenset(plan.streamed)
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, CollectiveWait):
            continue
        if instruction.start_s is None or instruction.finish_s is None or instruction.engine not in busy:
            raise PlanError(f"step {step} has no times on an engine of the machine", hint="simulate the plan first")
        busy[instruction.engine] += instruction.finish_s - instruction.start_s
        latency_s = max(latency_s, instruction.finish_s)
        # Added up in the order of issue, so that rounding keeps one engine's sum at or below the latency.
        if instruction.engine in links:
            continue
        if not isinstance(instruction, Load | Store):
            op = _known(index, instruction.op, f"step {step}", "operator")
            compute_s += min(_run_seconds(plan, streamed, op, engine) for engine in computing)
        else:
            direction = Direction.LOAD if isinstance(instruction, Load) else Direction.STORE
            moved[direction] += _known(plan.graph.buffers, instruction.buffer, f"step {step}", "buffer").nbytes
    units = [(engine.name, engine.kind.value) for engine in plan.machine.engines]
    units += [(name, "link") for name in sorted(links) if busy[name]]
    uses = (EngineUse(name, kind, busy[name], busy[name]) for name, kind in units)
    engines = tuple(replace(use, utilisation=min(1.0, use.busy_s / latency_s) if latency_s else 0.0) for use in uses)
    communication_s = max((busy[name] for name in links), default=0.0)
    transfer_s = _transfer_seconds(plan.machine, moved)
    return Timeline(latency_s, engines, compute_s / len(computing), transfer_s, communication_s)


def _transfer_seconds(machine: HardwareModel, moved: Mapping[Direction, int]) -> float:
    """Seconds the copy engines take at least: for each direction alone, and for both together."""
    copying = machine.engines_of(EngineKind.COPY)
    bounds = [sum(moved.values()) / sum(e.bandwidth_bytes_per_s or 0.0 for e in copying)]
    for direction, nbytes in moved.items():
        bounds.append(nbytes / sum(e.bandwidth_bytes_per_s or 0.0 for e in copying if e.copies(direction)))
    return max(bounds)


def _run_seconds(plan: Plan, streamed: frozenset[str], op_index: int, engine: Engine) -> float:
    """Seconds the operator at ``op_index`` of the graph takes on ``engine``, as ``cost.op_seconds`` has it.

    The arithmetic rate is that of its first operand's dtype. Operands in the scratchpad count with the bytes of their
    tensors, streamed ones with those of their buffers.
    """
    graph, op = plan.graph, plan.graph.ops[op_index]
    if op.kind is OpKind.BOUNDARY:
        return 0.0
    operands = [graph.tensor[name] for name in dict.fromkeys((*op.inputs, *op.outputs))]
    local_bytes = op.outside_bytes + sum(tensor.nbytes for tensor in operands if tensor.buffer not in streamed)
    streamed_bytes = sum(graph.buffers[b].nbytes for b in graph.reads[op_index] if b in streamed)
    dtype = operands[0].dtype if operands else "default"
    return op_seconds(op.flops, dtype, local_bytes, streamed_bytes, plan.machine, engine)


def _known(things: Mapping[str, _T], name: str, who: str, what: str) -> _T:
    try:
        return things[name]
    except KeyError:
        raise PlanError(f"{who} names {what} {name!r}, which the graph does not have") from None


class _Clock:
    """When each engine, each buffer's copies and each residence's bytes are free."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.streamed = frozenset(plan.streamed)
        self.op_index = {op.name: index for index, op in enumerate(plan.graph.ops)}
        self.engine_free = {engine.name: 0.0 for engine in plan.machine.engines}
        self.engine_free |= {link.name: 0.0 for link in plan.machine.links}
        self.ready: dict[str, float] = {}  # the resident copy is complete
        self.read: dict[str, float] = {}  # the last reader is done
        self.stored: dict[str, float] = {}  # the backing copy is complete
        self.regions = _Regions(plan)

    def issue(self, step: int, instruction: Instruction) -> Instruction:
        """Time the instruction of this step; steps come in order."""
        waits = [0.0, self.regions.begin(step)]
        if isinstance(instruction, CollectiveWait):
            return self._wait(step, instruction, max(waits))
        if not isinstance(instruction, Load | Store):
            op = _known(self.op_index, instruction.op, f"step {step}", "operator")
            touched, written = self.plan.graph.touches[op], self.plan.graph.writes[op]
            waits += [self.ready.get(buffer, 0.0) for buffer in touched]
            waits += [self.read.get(buffer, 0.0) for buffer in written]
            if self.plan.graph.ops[op].collective is not None:
                engine, start, finish = self._communicate(
                    max(waits), op, blocks=not isinstance(instruction, CollectiveStart)
                )
            else:
                engine, start, finish = self._compute(max(waits), op)
            self.read |= {b: max(finish, self.read.get(b, 0.0)) for b in self.plan.graph.reads[op]}
            self.ready |= dict.fromkeys(written, finish)
            self.regions.use(touched, finish)
        else:
            name = instruction.buffer
            nbytes = _known(self.plan.graph.buffers, name, f"step {step}", "buffer").nbytes
            copies = self.stored if isinstance(instruction, Load) else self.ready
            direction = Direction.LOAD if isinstance(instruction, Load) else Direction.STORE
            engine, start, finish = self._copy(max(*waits, copies.get(name, 0.0)), direction, nbytes)
            if isinstance(instruction, Store):
                self.stored[name] = finish
                self.read[name] = max(finish, self.read.get(name, 0.0))
            else:
                self.ready[name] = finish
            self.regions.use((name,), finish)
        return msgspec.structs.replace(instruction, engine=engine, start_s=start, finish_s=finish)

    def _communicate(self, earliest: float, op: int, *, blocks: bool) -> tuple[str, float, float]:
        """Time a collective in its fastest way; one that ``blocks`` is waited for on the spot by all that computes."""
        from ..hw_models.collectives import collective_modes

        collective = self.plan.graph.ops[op].collective
        assert collective is not None
        mode, *_ = collective_modes(collective.kind.value, collective.nbytes, collective.ranks, self.plan.machine)
        engine, start, finish = self._first({mode.link: mode.seconds}, earliest)
        if blocks:
            self._hold(finish)
        return engine, start, finish

    def _hold(self, until: float) -> None:
        for engine in self.plan.machine.engines_of(EngineKind.COMPUTE):
            self.engine_free[engine.name] = max(until, self.engine_free[engine.name])

    def _wait(self, step: int, instruction: CollectiveWait, earliest: float) -> CollectiveWait:
        op = _known(self.op_index, instruction.op, f"step {step}", "operator")
        moment = max([earliest, *(self.ready.get(buffer, 0.0) for buffer in self.plan.graph.writes[op])])
        self._hold(moment)
        return msgspec.structs.replace(instruction, engine="", start_s=moment, finish_s=moment)

    def _compute(self, earliest: float, op: int) -> tuple[str, float, float]:
        engines = self.plan.machine.engines_of(EngineKind.COMPUTE)
        return self._first({e.name: _run_seconds(self.plan, self.streamed, op, e) for e in engines}, earliest)

    def _copy(self, earliest: float, direction: Direction, nbytes: int) -> tuple[str, float, float]:
        engines = (engine for engine in self.plan.machine.engines if engine.copies(direction))
        return self._first({engine.name: transfer_seconds(nbytes, engine) for engine in engines}, earliest)

    def _first(self, seconds: Mapping[str, float], earliest: float) -> tuple[str, float, float]:
        """The engine that finishes first, with start and finish, given the seconds each one takes."""
        finish = {name: max(earliest, self.engine_free[name]) + duration for name, duration in seconds.items()}
        best = min(finish, key=lambda name: finish[name])
        start = max(earliest, self.engine_free[best])
        self.engine_free[best] = finish[best]
        return best, start, finish[best]


class _Regions:
    """Who holds which bytes, and when each residence's last user so far is done."""

    def __init__(self, plan: Plan) -> None:
        self.nbytes = {name: base.nbytes for name, base in plan.graph.buffers.items()}
        self.residences = plan.residences or ()
        self.done = [0.0] * len(self.residences)
        self.current: dict[str, int] = {}
        self.begins: dict[int, list[int]] = {}
        for index, residence in enumerate(self.residences):
            _known(self.nbytes, residence.buffer, f"residence {index}", "buffer")
            self.begins.setdefault(residence.begin, []).append(index)
        self.ended = sorted(range(len(self.residences)), key=lambda i: self.residences[i].end, reverse=True)
        self.ended_done = 0.0
        self.held: list[tuple[int, int, int]] = []  # disjoint: first byte, end, index of the latest residence there

    def begin(self, step: int) -> float:
        """Begin the residences of this step; returns when their bytes are free."""
        free = 0.0
        for index in self.begins.get(step, ()):
            residence = self.residences[index]
            free = max(free, self._ended_before(step) if residence.offset is None else self._take(index, residence))
            self.current[residence.buffer] = index
        return free

    def use(self, buffers: tuple[str, ...], finish: float) -> None:
        """Note that an instruction which uses the current residences of ``buffers`` is done at ``finish``."""
        for buffer in buffers:
            if buffer in self.current:
                index = self.current[buffer]
                self.done[index] = max(self.done[index], finish)

    def _ended_before(self, step: int) -> float:
        while self.ended and self.residences[self.ended[-1]].end <= step:
            self.ended_done = max(self.ended_done, self.done[self.ended.pop()])
        return self.ended_done

    def _take(self, index: int, residence: Residence) -> float:
        """Take a residence's bytes over from their last holders; returns when the last of these is done."""
        begin = residence.offset or 0
        end = begin + self.nbytes[residence.buffer]
        low = high = bisect.bisect_right(self.held, begin, key=lambda entry: entry[1])
        free, pieces = 0.0, [(begin, end, index)] if begin < end else []
        while high < len(self.held) and self.held[high][0] < end:
            first, stop, holder = self.held[high]
            free = max(free, self.done[holder])
            pieces += [(a, b, holder) for a, b in ((first, begin), (end, stop)) if a < b]
            high += 1
        self.held[low:high] = sorted(pieces)
        return free
