"""What a kernel's match rule returns, and the steps that every rule takes through a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from ..compiler.graph import Graph, Op, Tensor, contiguous_strides
from ..compiler.runtime.calls import InputRef, parse_call

__all__ = ["Cost", "Match", "Walk", "is_row_major", "operands", "replaceable"]


@dataclass(frozen=True)
class Cost:
    """What one launch does: ``flops`` counts as ``Op.flops`` does, ``traffic_bytes`` each operand moved once."""

    flops: int
    traffic_bytes: int


@dataclass(frozen=True)
class Match:
    """Operators that one kernel launch replaces.

    ``ops`` are their names in program order; the launch belongs where the first of them stands. ``inputs`` and
    ``outputs`` are tensor names in the order of the launcher's parameters, ``attributes`` its scalars by name.
    """

    ops: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, float]
    cost: Cost


def is_row_major(tensor: Tensor) -> bool:
    """Whether the elements lie one behind the other in row-major order."""
    return tensor.element_strides == contiguous_strides(tensor.shape)


def operands(op: Op) -> tuple[str, ...] | None:
    """The tensors that a call takes, in order; ``None`` if it takes anything else but ``alpha=1``."""
    call = parse_call(op.body)
    names = tuple(op.inputs[value.index] for value in call.arguments if isinstance(value, InputRef))
    plain = len(names) == len(call.arguments) and call.keywords in ((), (("alpha", 1),))
    return names if plain else None


@dataclass(frozen=True)
class Walk:
    """Follows a graph from a tensor to the operators that read it."""

    graph: Graph

    @cached_property
    def _readers(self) -> Mapping[str, tuple[Op, ...]]:
        readers: dict[str, list[Op]] = {}
        for op in self.graph.ops:
            for name in dict.fromkeys(op.inputs if op.outputs else ()):
                readers.setdefault(name, []).append(op)
        return {name: tuple(ops) for name, ops in readers.items()}

    def readers(self, tensor: str, *targets: str) -> tuple[Op, ...]:
        """Operators with a result that read ``tensor`` and call one of ``targets``, in program order."""
        return tuple(op for op in self._readers.get(tensor, ()) if op.target in targets)

    def sole_reader(self, op: Op | None, *targets: str) -> Op | None:
        """The one operator that reads the first result of ``op``, if it calls one of ``targets``.

        ``None`` gives ``None``, so that the steps of a rule can be written one under the other.
        """
        readers = self._readers.get(op.outputs[0], ()) if op is not None else ()
        return readers[0] if len(readers) == 1 and readers[0].target in targets else None


def replaceable(graph: Graph, ops: Sequence[Op], results: Collection[str]) -> bool:
    """Whether one operator, placed where the first of ``ops`` stands, can take the place of all of them.

    It computes the tensors ``results`` and nothing else, so no other operator, and not the caller, may see what else
    ``ops`` write. It reads all operands at once, so between the first and the last of ``ops`` no other operator may
    write a buffer that they read. And it writes fresh memory, so each result of ``ops`` must be a row-major base.
    """
    members = {op.name for op in ops}
    positions = [index for index, op in enumerate(graph.ops) if op.name in members]
    written = [graph.tensor[name] for op in ops for name in op.outputs]
    if any(tensor.name != tensor.buffer or not is_row_major(tensor) for tensor in written):
        return False
    private = {tensor.buffer for tensor in written} - {graph.tensor[name].buffer for name in results}
    visible = {graph.tensor[name].buffer for name in graph.outputs}
    visible.update(*(graph.touches[index] for index, op in enumerate(graph.ops) if op.name not in members))
    if private & visible:
        return False
    read = set(chain.from_iterable(graph.reads[index] for index in positions))
    between = (index for index in range(positions[0], positions[-1]) if index not in positions)
    return not any(read & set(graph.writes[index]) for index in between)
