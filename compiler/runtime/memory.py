"""A memory of plain bytes in which tensors are read and written at byte addresses, as a machine would."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ...errors import ExecutionError
from ..graph import DTYPE_BYTES, Tensor

__all__ = ["POISON", "TORCH_DTYPE", "ByteMemory"]

#: The byte of memory that holds no value: NaN in every floating-point dtype, -1 in the signed integers.
POISON = 0xFF
#: torch's dtype, by the name that graphs use.
TORCH_DTYPE: Mapping[str, torch.dtype] = MappingProxyType({name: getattr(torch, name) for name in DTYPE_BYTES})


class ByteMemory:
    """``size`` bytes, poisoned.

    Raises:
        ExecutionError: this computer cannot allocate that many bytes.
    """

    def __init__(self, size: int) -> None:
        try:
            self.bytes = torch.full((size,), POISON, dtype=torch.uint8)
        except RuntimeError as error:
            raise ExecutionError(f"cannot allocate a memory of {size} bytes: {error}") from error
        self._elements: dict[str, torch.Tensor] = {}

    def poison(self, begin: int, nbytes: int) -> None:
        """Overwrite ``nbytes`` bytes from ``begin``: whoever reads them now reads values that show."""
        self.bytes[begin : begin + nbytes].fill_(POISON)

    def read(self, tensor: Tensor, base: int) -> torch.Tensor:
        """The value of ``tensor`` whose buffer lies at byte ``base``: shape, strides and dtype as the graph says.

        Shares this memory where the address is a multiple of the element's size, and is a copy elsewhere.
        """
        size, begin = DTYPE_BYTES[tensor.dtype], base + tensor.offset_bytes
        if begin % size == 0:
            return self._typed(tensor.dtype).as_strided(tensor.shape, tensor.element_strides, begin // size)
        return self._copied(tensor, base).as_strided(tensor.shape, tensor.element_strides)

    def write(self, tensor: Tensor, base: int, value: torch.Tensor) -> None:
        """Write ``value``, of the shape and dtype of ``tensor``, to where ``read`` finds it; no other byte changes."""
        begin, end = base + tensor.offset_bytes, base + tensor.end_bytes
        if begin % DTYPE_BYTES[tensor.dtype] == 0:
            self.read(tensor, base).copy_(value)
            return
        elements = self._copied(tensor, base)
        elements.as_strided(tensor.shape, tensor.element_strides).copy_(value)
        self.bytes[begin:end] = elements.view(torch.uint8)

    def _typed(self, dtype: str) -> torch.Tensor:
        """All whole elements of this memory."""
        if dtype not in self._elements:
            whole = len(self.bytes) // DTYPE_BYTES[dtype] * DTYPE_BYTES[dtype]
            self._elements[dtype] = self.bytes[:whole].view(TORCH_DTYPE[dtype])
        return self._elements[dtype]

    def _copied(self, tensor: Tensor, base: int) -> torch.Tensor:
        """A copy of the elements from the first to the last one that ``tensor`` touches."""
        span = self.bytes[base + tensor.offset_bytes : base + tensor.end_bytes]
        return span.clone().view(TORCH_DTYPE[tensor.dtype])
