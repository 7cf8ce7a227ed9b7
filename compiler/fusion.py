"""Fused kernels in a graph: what one launch replaces, where it goes, and the graph that results.

A match names the arguments of a launch and the tensors that it writes. Which operators it replaces follows: those that
wrote these tensors, and whatever then computes nothing that anybody reads. An operator whose result somebody else
needs, too, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from .graph import Graph, Op, Tensor, contiguous_strides
from .runtime.calls import InputRef, format_call

__all__ = ["Called", "Cost", "Match", "Scalar", "Uses", "fused", "is_row_major"]

Scalar = float | int | bool | str | None


@dataclass(frozen=True)
class Cost:
    """What one launch does: ``flops`` counts as ``Op.flops`` does, ``traffic_bytes`` each operand moved once."""

    flops: int
    traffic_bytes: int


@dataclass(frozen=True)
class Match:
    """Operators that one launch of ``kernel`` can replace.

    ``ops`` are the names of those that vanish, in program order, and the launch belongs before the operator ``before``
    (at the end where that is empty). ``arguments`` are what the kernel takes, by name and in its order: tensors, which
    may be views that the graph does not have yet, and scalars. ``outputs`` are what it writes, in its order: tensors of
    the graph, or new ones that nobody reads.
    """

    kernel: str
    ops: tuple[str, ...]
    before: str
    arguments: Mapping[str, Tensor | Scalar]
    outputs: tuple[Tensor, ...]
    cost: Cost

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments, without repeats."""
        return tuple({a.name: a for a in self.arguments.values() if isinstance(a, Tensor)}.values())


@dataclass(frozen=True)
class Called:
    """How a kernel is called: ``opweave::<kernel>_out`` takes its ``inputs`` and then what is ``written``.

    ``results`` are the names, among both, of what ``opweave::<kernel>`` returns. ``allocate`` makes what is written, in
    order, given the inputs.
    """

    kernel: str
    inputs: tuple[str, ...]
    written: tuple[str, ...]
    results: tuple[str, ...]
    allocate: Callable[..., tuple[Any, ...]]


def is_row_major(tensor: Tensor) -> bool:
    """Whether the elements lie one behind the other in row-major order."""
    strides = zip(tensor.shape, tensor.element_strides, contiguous_strides(tensor.shape), strict=True)
    return all(extent == 1 or stride == wanted for extent, stride, wanted in strides) or 0 in tensor.shape


class Uses:
    """Who reads and writes each buffer of a graph; says what a launch would replace, and where it could stand."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._writing: dict[str, list[int]] = {}
        self._touching: dict[str, list[int]] = {}
        for index, (touched, written) in enumerate(zip(graph.touches, graph.writes, strict=True)):
            for buffer in touched:
                self._touching.setdefault(buffer, []).append(index)
            for buffer in written:
                self._writing.setdefault(buffer, []).append(index)
        self._returned = graph.output_buffers | {graph.tensor[name].buffer for name in graph.outputs}

    def writers(self, buffer: str) -> Sequence[int]:
        """Indices of the operators that write ``buffer``, in program order."""
        return self._writing.get(buffer, ())

    def replaced(self, outputs: Sequence[Tensor], operands: Sequence[Tensor]) -> tuple[int, ...]:
        """Indices of the operators that vanish when ``outputs`` are computed from ``operands``, in program order.

        They are those that write one of them, and those whose every result is then read by vanishing operators only.
        Empty if one that writes ``outputs`` also writes something that is needed.
        """
        names = {tensor.name for tensor in outputs}
        buffers = [tensor.buffer for tensor in outputs if tensor.name in self.graph.tensor]
        gone = {i for b in buffers for i in self.writers(b) if names & set(self.graph.ops[i].outputs)}
        needed = {tensor.buffer for tensor in operands}
        first = tuple(gone)
        waiting = sorted(gone)
        while waiting:
            index = waiting.pop()
            for other in self.graph.predecessors[index]:
                makes_operand = needed.intersection(self.graph.writes[other])
                if other not in gone and not makes_operand and self._is_free(other, gone, names):
                    gone.add(other)
                    waiting.append(other)
        # What one of them writes besides may be read by operators that turned out to vanish.
        return tuple(sorted(gone)) if all(self._is_free(index, gone, names) for index in first) else ()

    def _is_free(self, index: int, gone: Collection[int], names: Collection[str]) -> bool:
        """Whether operator ``index`` writes, but for ``names``, only buffers of its own that only ``gone`` touch."""
        op = self.graph.ops[index]
        private = [name for name in op.outputs if name not in names]
        if not op.repeatable or any(self.graph.tensor[name].buffer != name for name in private):
            return False
        touching = {other for name in private for other in self._touching[name]}
        return not self._returned & set(private) and touching <= {*gone, index}

    def place(
        self, gone: Sequence[int], operands: Sequence[Tensor], outputs: Sequence[Tensor], *, row_major: bool = True
    ) -> str | None:
        """The operator before which a launch can stand that reads ``operands`` and writes ``outputs`` for ``gone``.

        It reads all operands at once, and they must be what the operators that vanish found in them; who reads an
        output comes later. An output is fresh memory, row-major unless the caller knows that the launch lays it out so,
        or a new version of a buffer that nobody else touches meanwhile. ``None`` if there is no such place; an empty
        name means the end.
        """
        members, begin, end = set(gone), min(gone), max(gone)
        low, high = 0, len(self.graph.ops)
        updated = {t.buffer for t in outputs if t.name != t.buffer}
        for tensor in outputs:
            between = [i for i in self._touching.get(tensor.buffer, ()) if begin <= i <= end and i not in members]
            is_new = tensor.name == tensor.buffer
            changed = [i for i in between if i in self.writers(tensor.buffer)]  # what vanishes may have read that
            if (is_new and row_major and not is_row_major(tensor)) or changed or (not is_new and between):
                return None
            readers = [i for i in self._touching.get(tensor.buffer, ()) if i > begin and i not in members]
            high = min([high, *readers])
        for buffer in {tensor.buffer for tensor in operands} - updated:
            for index in self.writers(buffer):
                if index in members or (begin < index < end and buffer not in self.graph.ops[index].outputs):
                    return None  # it vanishes, or changes between two that read it
                if index < begin or buffer in self.graph.ops[index].outputs:
                    low = max(low, index + 1)
                else:
                    high = min(high, index)
        position = max(low, begin)
        if position > high:
            return None
        return self.graph.ops[position].name if position < len(self.graph.ops) else ""


def fused(graph: Graph, matches: Sequence[Match]) -> Graph:
    """``graph`` with one operator, calling ``opweave.<kernel>``, in the place of those that each match replaces.

    Raises:
        ModelError: the matches do not go together: two replace one operator, or none can come first.
    """
    taken = [name for match in matches for name in match.ops]
    if len(taken) != len(set(taken)):
        raise ModelError("two matches replace the same operator")
    origins = {op.name: op.origin for op in graph.ops}
    launches: dict[str, list[Op]] = {}
    fresh: dict[str, Tensor] = {}
    for match in matches:
        launches.setdefault(match.before, []).append(_launch(match, origins))
        new = (t for t in (*match.operands, *match.outputs) if t.name not in graph.tensor)
        fresh.update({tensor.name: tensor for tensor in new})
    gone = set(taken)
    ops: list[Op] = []
    waiting: list[Op] = []  # launches before an operator that another match replaced go before the next that stays
    for op in graph.ops:
        waiting += launches.pop(op.name, [])
        if op.name not in gone:
            ops += _in_order(waiting)
            waiting = []
            ops.append(op)
    ops += _in_order([*waiting, *launches.pop("", [])])
    used = {*graph.outputs, *(name for op in ops for name in (*op.inputs, *op.outputs))}
    tensors = {**graph.tensor, **fresh}
    used |= {tensors[name].buffer for name in used}
    inputs = {t.name for t in graph.tensors if t.role.is_source}
    kept = tuple(tensor for tensor in tensors.values() if tensor.name in used | inputs)
    return Graph(graph.name, kept, tuple(ops), graph.outputs)


def _in_order(launches: Sequence[Op]) -> Iterator[Op]:
    """Launches that go before the same operator, those that others read from first."""
    left = list(launches)
    while left:
        made = {name for op in left for name in op.outputs}
        ready = next((op for op in left if not made & set(op.inputs) - set(op.outputs)), left[0])
        left.remove(ready)
        yield ready


def _launch(match: Match, origins: Mapping[str, str]) -> Op:
    index = {tensor.name: position for position, tensor in enumerate(match.operands)}
    arguments = [InputRef(index[a.name]) if isinstance(a, Tensor) else a for a in match.arguments.values()]
    origin = ", ".join(dict.fromkeys(origins[name] or name for name in match.ops))
    return Op(
        name=f"{match.kernel}_{match.ops[-1]}",
        inputs=tuple(index),
        outputs=tuple(tensor.name for tensor in match.outputs),
        flops=match.cost.flops,
        body=format_call(f"opweave.{match.kernel}.default", arguments),
        origin=origin,
    )
