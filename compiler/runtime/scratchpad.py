"""The scratchpad machine: executes a plan byte for byte, and so shows whether its residences and addresses are right.

One byte array is the scratchpad; every operand is read from its planned address and every result written to its own.
Bytes that hold no value are poisoned, so an operand that is read too late, too early or from elsewhere shows as NaN.
The machine trusts the plan and knows nothing of the verifier: a plan that is wrong raises here, or computes wrong
numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...errors import ExecutionError
from ..graph import Graph, Op, Role, Tensor
from ..plan import CollectiveStart, CollectiveWait, Instruction, Load, Plan, Recompute, Residence, Run, Store
from .calls import evaluate
from .memory import TORCH_DTYPE, ByteMemory

__all__ = ["ExecutionResult", "ScratchpadMachine", "execute"]

#: Scratchpads up to this size are allocated whole; larger ones, such as a GPU's, up to the highest planned byte.
WHOLE_ARENA_BYTES = 1 << 30


@dataclass(frozen=True)
class ExecutionResult:
    """What an execution returned and what it moved.

    ``outputs`` are in the order of ``graph.outputs``; ``updated`` holds, by tensor name, the new values of sources
    that operators updated in place. Outputs that share a buffer share memory. ``streamed_bytes`` were read by
    operators directly from backing memory.
    """

    outputs: tuple[torch.Tensor, ...]
    updated: Mapping[str, torch.Tensor]
    loaded_bytes: int
    stored_bytes: int
    streamed_bytes: int
    runs: int
    loads: int
    stores: int
    recomputes: int

    @property
    def moved_bytes(self) -> int:
        """All bytes that went between scratchpad or engine and backing memory."""
        return self.loaded_bytes + self.stored_bytes + self.streamed_bytes


def execute(plan: Plan, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> ExecutionResult:
    """Execute ``plan`` in a scratchpad of the machine's size.

    Args:
        plan: a plan with an address for each residence; times are not looked at.
        inputs: values of the graph's inputs by tensor name.
        weights: values of its weights, constants and optimizer states by tensor name; others are ignored.
            Neither is changed: sources that the model updates are returned.

    Raises:
        ExecutionError: a value is missing or of another shape or dtype; the plan has no addresses; an operand is not
            resident, or a buffer is loaded that backing memory does not hold; an operator has no executable body, or
            its result is not what the graph says.
    """
    with torch.no_grad():
        machine = ScratchpadMachine(plan)
        for buffer in _required_sources(plan.graph):
            machine.provide(buffer, _source_value(plan.graph.buffers[buffer], inputs, weights))
        for step in range(len(plan.instructions)):
            machine.step(step)
        return machine.result()


def _required_sources(graph: Graph) -> list[str]:
    used = {b for touched in graph.touches for b in touched} | {graph.tensor[name].buffer for name in graph.outputs}
    return [name for name, base in graph.buffers.items() if base.role.is_source and name in used and base.nbytes]


def _source_value(
    base: Tensor, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    values = inputs if base.role is Role.INPUT else weights
    noun = base.role.value.replace("_", " ")
    if base.name not in values:
        raise ExecutionError(f"{noun} {base.name!r} has no value; it takes {_spec(base)}")
    _check_value(f"{noun} {base.name!r}", base, values[base.name])
    return values[base.name]


def _spec(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def _check_value(what: str, tensor: Tensor, value: torch.Tensor) -> None:
    if tuple(value.shape) != tensor.shape or value.dtype is not TORCH_DTYPE[tensor.dtype]:
        got = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise ExecutionError(f"{what} is {got}, expected {_spec(tensor)}")
    if value.layout is not torch.strided or value.device.type == "meta":
        raise ExecutionError(f"{what} is a {value.layout} tensor on {value.device}, expected plain elements")


@dataclass
class _Counters:
    loaded_bytes: int = 0
    stored_bytes: int = 0
    streamed_bytes: int = 0
    counts: dict[type[Instruction], int] = field(default_factory=lambda: {Run: 0, Load: 0, Store: 0, Recompute: 0})


class ScratchpadMachine:
    """A scratchpad, the backing memory behind it, and a plan to execute: ``provide`` sources, then ``step`` in turn.

    The scratchpad has exactly the machine's capacity; above ``WHOLE_ARENA_BYTES`` only the bytes up to the highest
    planned one are allocated. Each buffer has a backing memory of its own.

    Raises:
        ExecutionError: the plan has no addresses, or places a buffer outside the scratchpad or outside its steps.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._graph = plan.graph
        self._ops = {op.name: op for op in plan.graph.ops}
        self._begins: dict[int, list[Residence]] = defaultdict(list)
        self._ends: dict[int, list[Residence]] = defaultdict(list)
        highest = 0
        for residence in self._residences():
            self._begins[residence.begin].append(residence)
            self._ends[residence.end].append(residence)
            highest = max(highest, self._address(residence) + self._base(residence.buffer).nbytes)
        capacity = plan.machine.scratchpad_memory.capacity_bytes
        self._arena = ByteMemory(capacity if capacity <= WHOLE_ARENA_BYTES else highest)
        self._backing: dict[str, ByteMemory] = {}
        self._resident: dict[str, Residence] = {}
        self._streamed = frozenset(plan.streamed)
        self._counters = _Counters()

    def provide(self, buffer: str, value: torch.Tensor) -> None:
        """Put a source's value into backing memory; shape and dtype as its base tensor's."""
        memory = ByteMemory(self._base(buffer).nbytes)
        memory.write(self._base(buffer), 0, value)
        self._backing[buffer] = memory

    def step(self, step: int) -> None:
        """Execute instruction ``step``: end the residences that end there, begin those that begin, then do it."""
        for residence in self._ends[step]:
            self._end(residence)
        for residence in self._begins[step]:
            if residence.buffer in self._resident:
                raise ExecutionError(f"step {step}: buffer {residence.buffer!r} begins a residence but has one already")
            self._resident[residence.buffer] = residence
        instruction = self._plan.instructions[step]
        match instruction:
            case Load(buffer=buffer):
                self._load(step, buffer)
            case Store(buffer=buffer):
                self._store(step, buffer)
            case CollectiveStart(op=name) | CollectiveWait(op=name):
                raise ExecutionError(
                    f"step {step} is of collective {name!r}, which one scratchpad cannot execute",
                    hint="run the module it came from on real ranks; docs/running-on-ranks.md says how",
                )
            case Run(op=name) | Recompute(op=name):
                if name not in self._ops:
                    raise ExecutionError(f"step {step} runs operator {name!r}, which the graph does not have")
                self._run(step, self._ops[name])
        self._counters.counts[type(instruction)] += 1

    def result(self) -> ExecutionResult:
        """Outputs and updated sources as backing memory holds them. Raises ExecutionError if one was never stored."""
        graph, counters = self._graph, self._counters
        written = {b for buffers in graph.writes for b in buffers}
        updated = [name for name, base in graph.buffers.items() if name in written and base.role.is_source]
        return ExecutionResult(
            outputs=tuple(self._final(graph.tensor[name]) for name in graph.outputs),
            updated={name: self._final(graph.buffers[name]) for name in updated},
            loaded_bytes=counters.loaded_bytes,
            stored_bytes=counters.stored_bytes,
            streamed_bytes=counters.streamed_bytes,
            runs=counters.counts[Run],
            loads=counters.counts[Load],
            stores=counters.counts[Store],
            recomputes=counters.counts[Recompute],
        )

    def _residences(self) -> tuple[Residence, ...]:
        plan, capacity = self._plan, self._plan.machine.scratchpad_memory.capacity_bytes
        if plan.residences is None or any(r.offset is None for r in plan.residences):
            raise ExecutionError(
                "the plan has no addresses yet; it cannot be executed", hint="run a residency and an address pass"
            )
        for residence in plan.residences:
            begin, end, address = residence.begin, residence.end, self._address(residence)
            what = f"the residence of buffer {residence.buffer!r} from step {begin} to {end}"
            if residence.memory != plan.machine.scratchpad:
                raise ExecutionError(f"{what} is in memory {residence.memory!r}, not {plan.machine.scratchpad!r}")
            if not 0 <= begin < end <= len(plan.instructions):
                raise ExecutionError(f"{what} lies outside the plan's {len(plan.instructions)} steps")
            if not 0 <= address <= capacity - self._base(residence.buffer).nbytes:
                nbytes = self._base(residence.buffer).nbytes
                raise ExecutionError(f"{what} takes {nbytes} bytes at {address}, the scratchpad has {capacity}")
        return plan.residences

    def _base(self, buffer: str) -> Tensor:
        try:
            return self._graph.buffers[buffer]
        except KeyError:
            raise ExecutionError(f"the plan names buffer {buffer!r}, which the graph does not have") from None

    @staticmethod
    def _address(residence: Residence) -> int:
        assert residence.offset is not None  # the constructor has looked at all of them
        return residence.offset

    def _end(self, residence: Residence) -> None:
        self._arena.poison(self._address(residence), self._base(residence.buffer).nbytes)
        del self._resident[residence.buffer]

    def _region(self, step: int, buffer: str, user: str) -> torch.Tensor:
        """The bytes of a resident buffer."""
        begin = self._resident_address(step, buffer, user)
        return self._arena.bytes[begin : begin + self._base(buffer).nbytes]

    def _resident_address(self, step: int, buffer: str, user: str) -> int:
        if buffer not in self._resident:
            raise ExecutionError(f"step {step}: {user} needs buffer {buffer!r}, which is not resident")
        return self._address(self._resident[buffer])

    def _load(self, step: int, buffer: str) -> None:
        region = self._region(step, buffer, "a load")
        if self._resident[buffer].begin != step:
            raise ExecutionError(f"step {step}: buffer {buffer!r} is loaded but already resident")
        if buffer not in self._backing:
            raise ExecutionError(f"step {step}: buffer {buffer!r} is loaded but backing memory never got it")
        region.copy_(self._backing[buffer].bytes)
        self._counters.loaded_bytes += len(region)

    def _store(self, step: int, buffer: str) -> None:
        region = self._region(step, buffer, "a store")
        if buffer not in self._backing:
            self._backing[buffer] = ByteMemory(len(region))
        self._backing[buffer].bytes.copy_(region)
        self._counters.stored_bytes += len(region)

    def _run(self, step: int, op: Op) -> None:
        tensors = self._graph.tensor
        user = f"operator {op.name!r}"
        targets = [(tensors[name], self._target(step, tensors[name], user)) for name in op.outputs]
        operands = [self._operand(step, tensors[name], user) for name in op.inputs]
        try:
            results = evaluate(op.body, operands)
        except ExecutionError as error:
            raise ExecutionError(f"step {step}: {user}: {error.message}", hint=error.hint) from error
        if len(results) != len(targets):
            raise ExecutionError(f"step {step}: {user} returned {len(results)} tensors, expected {len(targets)}")
        # A result may be a view of an operand, whose bytes the writing of another result may change.
        values = [r.clone() if r.layout is torch.strided and self._arena.holds(r) else r for r in results]
        for (tensor, address), value in zip(targets, values, strict=True):
            _check_value(f"step {step}: result {tensor.name!r} of {user} ({op.target})", tensor, value)
            if tensor.nbytes:
                self._write(tensor, address, value, user)
        streamed = {tensors[name].buffer for name in op.inputs} & self._streamed
        self._counters.streamed_bytes += sum(self._base(buffer).nbytes for buffer in streamed)

    def _operand(self, step: int, tensor: Tensor, user: str) -> torch.Tensor:
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=TORCH_DTYPE[tensor.dtype])
        if tensor.buffer not in self._streamed:
            return self._arena.read(tensor, self._resident_address(step, tensor.buffer, user))
        if tensor.buffer not in self._backing:
            raise ExecutionError(f"step {step}: {user} streams buffer {tensor.buffer!r}, which was never stored")
        return self._backing[tensor.buffer].read(tensor, 0)

    def _target(self, step: int, tensor: Tensor, user: str) -> int:
        """Where a result goes; buffers without bytes need no place."""
        return self._resident_address(step, tensor.buffer, user) if self._base(tensor.buffer).nbytes else 0

    def _write(self, tensor: Tensor, address: int, value: torch.Tensor, user: str) -> None:
        try:
            self._arena.write(tensor, address, value)
        except RuntimeError as error:  # strides that put two elements into one place
            raise ExecutionError(f"{user} cannot write {tensor.name!r} {_spec(tensor)}: {error}") from error

    def _final(self, tensor: Tensor) -> torch.Tensor:
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=TORCH_DTYPE[tensor.dtype])
        if tensor.buffer not in self._backing:
            raise ExecutionError(f"output {tensor.name!r} was never stored to backing memory")
        return self._backing[tensor.buffer].read(tensor, 0)
