"""Tensors with sentinel bytes before and behind them, to see writes that go out of bounds."""

from __future__ import annotations

import math

import torch

__all__ = ["Guarded"]

_SENTINEL_BYTES = 4096
_SENTINEL = 0xA5


class Guarded:
    """A row-major tensor filled with NaN in the middle of an allocation filled with sentinels."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: str) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        self._memory = torch.full((nbytes + 2 * _SENTINEL_BYTES,), _SENTINEL, dtype=torch.uint8, device=device)
        self._end = _SENTINEL_BYTES + nbytes
        self.tensor = self._memory[_SENTINEL_BYTES : self._end].view(dtype).view(shape).fill_(math.nan)

    def is_intact(self) -> bool:
        """Whether no byte outside the tensor has been written."""
        before, behind = self._memory[:_SENTINEL_BYTES], self._memory[self._end :]
        return bool((before == _SENTINEL).all()) and bool((behind == _SENTINEL).all())
