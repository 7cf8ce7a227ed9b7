"""Collects operators and tensors, and knows in which buffer each fake tensor's storage lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from msgspec.structs import replace

from ....errors import ModelError
from ...graph import DTYPE_BYTES, Collective, Graph, Op, OpKind, Role, Tensor, contiguous_strides

__all__ = ["GraphBuilder", "is_dense"]


def is_dense(value: torch.Tensor) -> bool:
    """Whether the elements fill one gapless region without sharing any byte, in whatever order of dimensions."""
    if value.numel() == 0:
        return value.is_contiguous()
    step = 1
    for stride, extent in sorted(zip(value.stride(), value.shape, strict=True)):
        if extent != 1:
            if stride != step:
                return False
            step *= extent
    return True


def _free_name(name: str, taken: dict[str, int]) -> str:
    """``name``, or with the first free number behind it; it is taken from now on."""
    candidate = name
    while candidate in taken:
        candidate = f"{name}_{taken[name]}"
        taken[name] += 1
    taken[candidate] = 1
    return candidate


def _key(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


class GraphBuilder:
    """A graph under construction. Values are fake tensors; two in one storage lie in one buffer.

    The builder keeps every registered storage alive, so that a storage's identity is never taken by another.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._tensors: dict[str, Tensor] = {}
        self._taken: dict[str, int] = {}
        self._taken_by_operators: dict[str, int] = {}
        self._buffers: dict[int, tuple[str, int]] = {}  # storage -> buffer, byte of the storage where it begins
        self._storages: list[torch.UntypedStorage] = []
        self._latest: dict[tuple[Any, ...], str] = {}  # layout -> the last tensor made with it
        self._private: dict[str, str] = {}  # buffers that stand apart from memory they shared -> why

    def add_op(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        flops: int,
        body: str,
        origin: str,
        collective: Collective | None = None,
    ) -> None:
        """Append an operator under a name that is free; with a ``collective`` it is of that kind, and runs once."""
        name = _free_name(name, self._taken_by_operators)
        operator = Op(name, tuple(inputs), tuple(outputs), flops=flops, body=body, origin=origin)
        if collective is not None:
            operator = replace(operator, kind=OpKind.COLLECTIVE, flops=0, repeatable=False, collective=collective)
        self.ops.append(operator)

    def is_placed(self, value: torch.Tensor) -> bool:
        """Whether the value lies in a buffer that exists already."""
        return _key(value) in self._buffers

    def buffer_of(self, value: torch.Tensor) -> str:
        """Name of the buffer that holds a placed value."""
        return self._buffers[_key(value)][0]

    def add_base(self, value: torch.Tensor, name: str, role: Role, *, private: str = "") -> str:
        """A new buffer that ``value`` (dense) fills; ``private`` says why nobody may write it, if nobody may."""
        name = _free_name(name, self._taken)
        self._buffers[_key(value)] = (name, int(value.storage_offset()) * value.element_size())
        self._storages.append(value.untyped_storage())
        if private:
            self._private[name] = private
        return self._add(value, name, role)

    def tensor_of(self, value: torch.Tensor, name: str) -> str:
        """The tensor that reads ``value``: one made before with the same layout, else a new view called ``name``."""
        known = self._latest.get(self._layout(value))
        return known if known is not None else self._add(value, _free_name(name, self._taken), self._role(value))

    def new_version(self, value: torch.Tensor, name: str) -> str:
        """A tensor for what an operator writes over ``value``.

        Raises:
            ModelError: the buffer is a copy of memory that it shared with others in the model.
        """
        buffer = self.buffer_of(value)
        if buffer in self._private:
            raise ModelError(f"operator {name!r} writes {buffer!r} in place, {self._private[buffer]}")
        return self._add(value, _free_name(name, self._taken), self._role(value))

    def _role(self, value: torch.Tensor) -> Role:
        return self._tensors[self.buffer_of(value)].role

    def _layout(self, value: torch.Tensor) -> tuple[Any, ...]:
        buffer, begin = self._buffers[_key(value)]
        shape = tuple(int(extent) for extent in value.shape)
        strides = tuple(int(stride) for stride in value.stride())
        offset = int(value.storage_offset()) * value.element_size() - begin
        if 0 in shape:
            offset = 0  # an empty slice may start behind the end of its buffer
        return buffer, shape, str(value.dtype).removeprefix("torch."), strides, offset

    def _add(self, value: torch.Tensor, name: str, role: Role) -> str:
        layout = self._layout(value)
        buffer, shape, dtype, strides, offset = layout
        if dtype not in DTYPE_BYTES:
            raise ModelError(f"tensor {name!r} has dtype {dtype}, which has no fixed size in bytes here")
        kept = None if strides == contiguous_strides(shape) else strides
        self._tensors[name] = Tensor(name, shape, dtype, role, buffer, kept, offset)
        self._latest[layout] = name
        return name

    def finish(self, name: str, inputs: Iterable[str], outputs: Sequence[str]) -> Graph:
        """The graph, without operators whose results nobody sees and sources that nobody reads.

        An operator stays if it writes a source or a buffer that an output or a staying operator reads. A collective
        stays in any case: the other ranks wait for this one in it.
        """
        needed = {self._tensors[t].buffer for t in outputs}
        ops: list[Op] = []
        for op in reversed(self.ops):
            written = {self._tensors[t].buffer for t in op.outputs}
            is_seen = bool(written & needed) or any(self._tensors[b].role.is_source for b in written)
            if is_seen or op.collective is not None:
                needed |= written | {self._tensors[t].buffer for t in op.inputs}
                ops.append(op)
        ops.reverse()
        used = {*inputs, *outputs, *(t for op in ops for t in (*op.inputs, *op.outputs))}
        used |= {self._tensors[t].buffer for t in used}
        returned = {self._tensors[t].buffer for t in outputs}
        tensors = [_with_output_role(t, returned) for t in self._tensors.values() if t.name in used]
        return Graph(name, tuple(tensors), tuple(ops), tuple(outputs))


def _with_output_role(tensor: Tensor, returned: set[str]) -> Tensor:
    if tensor.buffer not in returned or tensor.role.is_source:
        return tensor
    return Tensor(
        tensor.name, tensor.shape, tensor.dtype, Role.OUTPUT, tensor.buffer, tensor.strides, tensor.offset_bytes
    )
