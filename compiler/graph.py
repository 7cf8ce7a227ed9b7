"""The operator graph: Tensor, Op, Graph. Frozen, checked when built; the whole IR fits one screen.

A graph is a list of operators in program order over named tensors. Tensors live in *buffers*: a view, and every
version an in-place update makes, is an alias of one buffer, and memory decisions are about buffers. Program order
gives the meaning: an operator sees the bytes left by the last operator before it that wrote the buffer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType

import msgspec

from ..errors import ModelError
from ..hw_models.fabric import CollectiveKind

__all__ = [
    "DTYPE_BYTES",
    "Collective",
    "CollectiveKind",
    "Graph",
    "Op",
    "OpKind",
    "Role",
    "Tensor",
    "contiguous_strides",
]

#: Bytes of one element, by the dtype's PyTorch name.
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1,
        "uint8": 1,
        "int8": 1,
        "float8_e4m3fn": 1,
        "float8_e4m3fnuz": 1,
        "float8_e5m2": 1,
        "float8_e5m2fnuz": 1,
        "float8_e8m0fnu": 1,
        "uint16": 2,
        "int16": 2,
        "float16": 2,
        "bfloat16": 2,
        "uint32": 4,
        "int32": 4,
        "float32": 4,
        "uint64": 8,
        "int64": 8,
        "float64": 8,
        "complex64": 8,
        "complex128": 16,
    }
)

MAX_DIMENSIONS = 64  # PyTorch's and NumPy's own limit
MAX_BUFFER_BYTES = 1 << 50  # above any memory in sight: a larger tensor is a malformed or hostile model


class Role(StrEnum):
    """What a tensor is to the model. Inputs, weights, constants and optimizer state exist before the first operator."""

    INPUT = "input"
    WEIGHT = "weight"
    CONSTANT = "constant"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    OUTPUT = "output"

    @property
    def is_source(self) -> bool:
        """Whether tensors of this role exist, in backing memory, before the first operator runs."""
        return self in _SOURCES


_SOURCES = frozenset({Role.INPUT, Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE})


class OpKind(StrEnum):
    """Which kind of engine an operator occupies; one at a boundary takes or hands over what exists, in no time."""

    COMPUTE = "compute"
    COLLECTIVE = "collective"
    COPY = "copy"
    BOUNDARY = "boundary"


class Collective(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an operator of kind collective does: ``kind`` in the process group ``group`` of ``ranks`` (global numbers).

    ``nbytes`` are those of the whole message: of the tensor that is reduced or broadcast, of what is gathered, of what
    is reduced before it is scattered, and of all that one rank hands over to all, its own part included. Ranks meet in
    the order in which they hand collectives over, whatever these carry; ``tag`` says what this one carries, where that
    is to be judged.
    """

    kind: CollectiveKind
    group: str
    ranks: tuple[int, ...]
    nbytes: int
    tag: str = ""

    def __post_init__(self) -> None:
        if not self.ranks or len(set(self.ranks)) != len(self.ranks) or min(self.ranks) < 0:
            raise ModelError(
                f"process group {self.group!r} has ranks {list(self.ranks)}; they are different, from 0 on"
            )
        if not 0 <= self.nbytes <= MAX_BUFFER_BYTES:
            raise ModelError(f"a collective of group {self.group!r} moves {self.nbytes} bytes, outside 0 to 2**50")


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of ``shape``, in elements."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One value: ``shape`` in elements, laid out in ``buffer`` at ``offset_bytes`` with ``strides`` (elements).

    The tensor whose name is its buffer's name is the buffer's *base* and sets its size; all others are aliases:
    views when no operator produces them, new versions when an in-place operator does. ``strides`` of ``None``
    mean row-major.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role = Role.ACTIVATION
    buffer: str = ""
    strides: tuple[int, ...] | None = None
    offset_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.buffer:
            msgspec.structs.force_setattr(self, "buffer", self.name)
        if self.dtype not in DTYPE_BYTES:
            raise ModelError(f"tensor {self.name!r} has dtype {self.dtype!r}; known are {', '.join(DTYPE_BYTES)}")
        if len(self.shape) > MAX_DIMENSIONS:
            raise ModelError(f"tensor {self.name!r} has {len(self.shape)} dimensions, more than {MAX_DIMENSIONS}")
        if any(extent < 0 for extent in self.shape) or self.nbytes > MAX_BUFFER_BYTES:
            raise ModelError(f"tensor {self.name!r} has shape {list(self.shape)}, outside 0 to 2**50 bytes")

    @property
    def nbytes(self) -> int:
        """Bytes of the elements: product of ``shape`` times the dtype's size."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def element_strides(self) -> tuple[int, ...]:
        """Strides in elements, row-major where none were given."""
        return contiguous_strides(self.shape) if self.strides is None else self.strides

    @property
    def end_bytes(self) -> int:
        """First byte of the buffer behind the last element this tensor touches."""
        if 0 in self.shape:
            return self.offset_bytes
        last = sum((extent - 1) * stride for extent, stride in zip(self.shape, self.element_strides, strict=True))
        return self.offset_bytes + (last + 1) * DTYPE_BYTES[self.dtype]


class Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One schedulable unit; after fusion, one kernel.

    ``inputs`` and ``outputs`` name tensors. An output whose buffer already exists is written in place. ``flops``
    counts multiplications and additions. ``body`` is the call that computes it, for example
    ``aten.convolution.default(%0, %1, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)`` where ``%i`` is input ``i``;
    an empty body can be planned but not executed. ``origin`` names the model's own node. ``outside_bytes`` are what it
    reads and writes in the scratchpad's memory beyond the graph's tensors, as weights that their owner keeps there:
    they take time and no planned place. One that is not ``repeatable`` acts on more than its outputs, and runs once.
    ``collective`` says what one of kind collective does; no other operator has it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: OpKind = OpKind.COMPUTE
    flops: int = 0
    body: str = ""
    origin: str = ""
    outside_bytes: int = 0
    repeatable: bool = True
    collective: Collective | None = None

    @property
    def target(self) -> str:
        """What the body calls, such as ``aten.relu.default``; empty without a body."""
        return self.body.partition("(")[0]


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, omit_defaults=True):
    """Operators in program order over tensors; ``outputs`` are the tensors the model returns.

    Raises:
        ModelError: names that repeat or are missing, a tensor produced twice or used before it exists, an alias
            outside its buffer, or a body that refers to an input the operator does not have.
    """

    name: str
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def tensor(self) -> Mapping[str, Tensor]:
        """Tensors by name."""
        return MappingProxyType({t.name: t for t in self.tensors})

    @cached_property
    def buffers(self) -> Mapping[str, Tensor]:
        """Base tensor of each buffer, by the buffer's name; its ``nbytes`` is the buffer's size."""
        return MappingProxyType({t.name: t for t in self.tensors if t.buffer == t.name})

    @cached_property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """Buffers each operator reads, in operand order, without repeats."""
        return tuple(tuple(dict.fromkeys(self.tensor[t].buffer for t in op.inputs)) for op in self.ops)

    @cached_property
    def writes(self) -> tuple[tuple[str, ...], ...]:
        """Buffers each operator writes, in operand order, without repeats."""
        return tuple(tuple(dict.fromkeys(self.tensor[t].buffer for t in op.outputs)) for op in self.ops)

    @cached_property
    def touches(self) -> tuple[tuple[str, ...], ...]:
        """Buffers each operator reads or writes: its working set, all resident while it runs."""
        return tuple(tuple(dict.fromkeys((*r, *w))) for r, w in zip(self.reads, self.writes, strict=True))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Operators that must come before each one: it reads what they wrote, or overwrites what they read or wrote."""
        last_write: dict[str, int] = {}
        readers: dict[str, list[int]] = {}
        result: list[tuple[int, ...]] = []
        for index, (read, written) in enumerate(zip(self.reads, self.writes, strict=True)):
            before = {last_write[b] for b in (*read, *written) if b in last_write}
            for buffer in written:
                before.update(readers.pop(buffer, ()))
                last_write[buffer] = index
            for buffer in read:
                readers.setdefault(buffer, []).append(index)
            result.append(tuple(sorted(before - {index})))
        return tuple(result)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Operators that must come after each one; the mirror of ``predecessors``."""
        result: list[list[int]] = [[] for _ in self.ops]
        for index, before in enumerate(self.predecessors):
            for other in before:
                result[other].append(index)
        return tuple(map(tuple, result))

    @cached_property
    def output_buffers(self) -> frozenset[str]:
        """Buffers whose final bytes the caller gets: those of outputs, and sources that were updated in place."""
        written = {b for buffers in self.writes for b in buffers}
        updated = {b for b in written if self.buffers[b].role.is_source}
        return frozenset({self.tensor[t].buffer for t in self.outputs} & written | updated)


_INPUT_REFERENCE = re.compile(r"%(\d+)")


def _check(graph: Graph) -> None:
    if len(graph.tensor) != len(graph.tensors):
        raise ModelError(f"graph {graph.name!r} names a tensor twice: {_first_repeat([t.name for t in graph.tensors])}")
    if len({op.name for op in graph.ops}) != len(graph.ops):
        raise ModelError(f"graph {graph.name!r} names an operator twice: {_first_repeat([o.name for o in graph.ops])}")
    for tensor in graph.tensors:
        _check_alias(graph, tensor)
    _check_program_order(graph)


def _first_repeat(names: list[str]) -> str:
    seen: set[str] = set()
    return next((n for n in names if n in seen or seen.add(n)), "")  # type: ignore[func-returns-value]


def _check_alias(graph: Graph, tensor: Tensor) -> None:
    base = graph.tensor.get(tensor.buffer)
    if base is None or base.buffer != base.name:
        raise ModelError(f"tensor {tensor.name!r} lies in buffer {tensor.buffer!r}, which no tensor is the base of")
    if tensor is base and tensor.strides is None and tensor.offset_bytes == 0:
        return  # row-major from the first byte: exactly the buffer, and most tensors of a large graph
    if len(tensor.element_strides) != len(tensor.shape) or any(stride < 0 for stride in tensor.element_strides):
        raise ModelError(f"tensor {tensor.name!r} has strides {tensor.strides} for shape {list(tensor.shape)}")
    if tensor.offset_bytes < 0 or tensor.end_bytes > base.nbytes:
        raise ModelError(
            f"tensor {tensor.name!r} covers bytes [{tensor.offset_bytes}, {tensor.end_bytes}) "
            f"of buffer {base.name!r}, which has {base.nbytes}"
        )


def _check_program_order(graph: Graph) -> None:
    live = {t.name for t in graph.tensors if t.name == t.buffer and t.role.is_source}
    produced: set[str] = set()
    operator_outputs = {name for op in graph.ops for name in op.outputs}
    for op in graph.ops:
        _check_figures(op)
        for name in op.inputs:
            tensor = _known(graph, name, f"operator {op.name!r}")
            if not (name in produced if name in operator_outputs else tensor.buffer in live):
                raise ModelError(f"operator {op.name!r} reads {name!r} before it exists", hint="is the graph cyclic?")
        for name in op.outputs:
            _check_production(graph, op, name, live, produced)
            produced.add(name)
            live.add(graph.tensor[name].buffer)
        for match in _INPUT_REFERENCE.finditer(op.body):
            if int(match[1]) >= len(op.inputs):
                raise ModelError(f"the body of operator {op.name!r} uses {match[0]} but it has {len(op.inputs)} inputs")
    for name in graph.outputs:
        if _known(graph, name, "the list of outputs").buffer not in live:
            raise ModelError(f"output {name!r} of graph {graph.name!r} is never produced")


def _check_figures(op: Op) -> None:
    if not (0 <= op.flops < 1 << 63 and 0 <= op.outside_bytes < 1 << 63):  # what a plan's JSON can hold
        raise ModelError(
            f"operator {op.name!r} has {op.flops} flops and {op.outside_bytes} outside bytes; both take 0 to 2**63 - 1"
        )
    if (op.kind is OpKind.COLLECTIVE) != (op.collective is not None):
        raise ModelError(f"operator {op.name!r} is of kind {op.kind.value}, its collective is {op.collective}")


def _check_production(graph: Graph, op: Op, name: str, live: set[str], produced: set[str]) -> None:
    tensor = _known(graph, name, f"operator {op.name!r}")
    if name in produced or (name == tensor.buffer and tensor.role.is_source):
        raise ModelError(f"tensor {name!r} is written by operator {op.name!r} but already exists")
    if name != tensor.buffer and tensor.buffer not in live:
        raise ModelError(f"operator {op.name!r} updates {tensor.buffer!r} in place before it exists")


def _known(graph: Graph, name: str, user: str) -> Tensor:
    try:
        return graph.tensor[name]
    except KeyError:
        raise ModelError(f"{user} names tensor {name!r}, which graph {graph.name!r} does not have") from None
