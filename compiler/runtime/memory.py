"""A memory of plain bytes in which tensors are read and written at byte addresses, as a machine would."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy
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
            self._array = numpy.full(size, POISON, dtype=numpy.uint8)
        except MemoryError as error:
            raise ExecutionError(f"cannot allocate a memory of {size} bytes: {error}") from error
        self.bytes = torch.from_numpy(self._array)

    def poison(self, begin: int, nbytes: int) -> None:
        """Overwrite ``nbytes`` bytes from ``begin``: whoever reads them now reads values that show."""
        self.bytes[begin : begin + nbytes].fill_(POISON)

    def read(self, tensor: Tensor, base: int) -> torch.Tensor:
        """The value of ``tensor`` whose buffer lies at byte ``base``: shape, strides and dtype as the graph says.

        Shares this memory where the address is a multiple of the element's size, and is a copy elsewhere. Its storage
        is its own bytes and no others: operators such as ``slice_scatter`` copy an operand's whole storage.
        """
        begin, end = base + tensor.offset_bytes, base + tensor.end_bytes
        span = self._array[begin:end]
        if begin % DTYPE_BYTES[tensor.dtype]:
            span = span.copy()
        return torch.from_numpy(span).view(TORCH_DTYPE[tensor.dtype]).as_strided(tensor.shape, tensor.element_strides)

    def write(self, tensor: Tensor, base: int, value: torch.Tensor) -> None:
        """Write ``value``, of the shape and dtype of ``tensor``, to where ``read`` finds it; no other byte changes."""
        begin, end = base + tensor.offset_bytes, base + tensor.end_bytes
        place = self.read(tensor, base).copy_(value)
        if begin % DTYPE_BYTES[tensor.dtype]:
            elements = place.as_strided(((end - begin) // place.element_size(),), (1,))
            self.bytes[begin:end] = elements.view(torch.uint8)

    def holds(self, value: torch.Tensor) -> bool:
        """Whether the storage of ``value`` lies in this memory."""
        first = self.bytes.data_ptr()
        return first <= value.untyped_storage().data_ptr() < first + len(self._array)
