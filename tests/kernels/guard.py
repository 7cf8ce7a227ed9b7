"""Tensors with sentinel bytes before and behind them, to see accesses that go out of bounds."""

from __future__ import annotations

import torch

__all__ = ["Guarded"]

_SENTINEL_BYTES = 4096
_WRITTEN, _READ = 0xA5, 0xFF


class Guarded:
    """A copy of a tensor, with its strides, in the middle of an allocation filled with sentinels, on ``device``.

    Around an input they are NaN in every floating-point dtype, so that what is read there shows in the result. An
    output is filled with NaN (-1 in integers) itself, so that what is not written shows.
    """

    def __init__(self, like: torch.Tensor, *, output: bool = False, device: str | None = None) -> None:
        extents = zip(like.shape, like.stride(), strict=True)
        nbytes = (sum((e - 1) * s for e, s in extents) + 1) * like.element_size() if like.numel() else 0
        self._sentinel = _WRITTEN if output else _READ
        self._memory = torch.full(
            (nbytes + 2 * _SENTINEL_BYTES,), self._sentinel, dtype=torch.uint8, device=device or like.device
        )
        self._end = _SENTINEL_BYTES + nbytes
        middle = self._memory[_SENTINEL_BYTES : self._end]
        middle.fill_(0xFF)
        self.tensor = middle.view(like.dtype).as_strided(like.shape, like.stride())
        if not output:
            self.tensor.copy_(like)

    def is_intact(self) -> bool:
        """Whether no byte outside the tensor has been written."""
        before, behind = self._memory[:_SENTINEL_BYTES], self._memory[self._end :]
        return bool((before == self._sentinel).all()) and bool((behind == self._sentinel).all())
