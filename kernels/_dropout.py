"""Dropout masks that are computed again instead of stored, the same in Triton and in plain PyTorch.

An element is kept if its random number is at least ``p``. The number is one of the four words of Philox 4x32-10
(Salmon and others, SC 2011) under the key ``seed`` (64 bits), with the counter ``(column // 4, row, 0, 0)`` and the
word ``column % 4``: it depends on nothing but the seed and the element's place, not on tiles or launches. One call
serves four elements; a call for each, as ``tl.rand`` makes, would cost more than reading the elements.

It is Triton's generator (`tl.philox`), not PyTorch's: ``torch.nn.functional.dropout`` on a GPU numbers its calls by
thread, advances an offset with each launch and cannot be asked for the mask of a tile. Masks are as good, but for
the same seed they are others. ``p`` is rounded to a multiple of 2**-32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["dropped", "kept", "mask", "philox", "scaling", "threshold"]


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def kept(seed: tl.tensor, row: tl.tensor, first: tl.tensor, least: tl.tensor, columns: tl.constexpr) -> tl.tensor:
    """Which of ``columns`` elements from ``first`` on are kept in each ``row``; both are multiples of four.

    ``least`` is what ``threshold`` gives.
    """
    zero = tl.zeros([row.shape[0], columns // 4], tl.int32)
    group = first // 4 + tl.arange(0, columns // 4)
    words = tl.philox(seed, zero + group[None, :], zero + row[:, None], zero, zero)
    even = tl.join(words[0].to(tl.int32, bitcast=True) >= least, words[2].to(tl.int32, bitcast=True) >= least)
    odd = tl.join(words[1].to(tl.int32, bitcast=True) >= least, words[3].to(tl.int32, bitcast=True) >= least)
    return tl.reshape(tl.join(even, odd), [row.shape[0], columns])


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def dropped(
    values: tl.tensor, seed: tl.tensor, row: tl.tensor, first: tl.tensor, least: tl.tensor, columns: tl.constexpr
) -> tl.tensor:
    """``values`` ``[rows, columns]`` with zeros where an element is not kept; arguments as for ``kept``.

    Half by half: all random numbers of a large tile at once would need more registers than there are.
    """
    half: tl.constexpr = columns // 2
    left, right = tl.split(tl.permute(tl.reshape(values, [row.shape[0], 2, half]), [0, 2, 1]))
    left = tl.where(kept(seed, row, first, least, half), left, 0.0)
    right = tl.where(kept(seed, row, first + half, least, half), right, 0.0)
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [row.shape[0], columns])


def threshold(p: float) -> int:
    """The least word that is kept, as a signed integer: a share ``p`` of the ``2**32`` words is below it."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def scaling(p: float) -> float:
    """What kept elements are multiplied by, so that the mean stays; 0 where none is kept."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def _wide_product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of products of unsigned 32-bit numbers; 64-bit multiplication wraps and keeps them all."""
    product = a * b
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(seed: torch.Tensor, counters: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four words of Philox 4x32-10 as int64 from 0 to 2**32 - 1, of counters given likewise; as `tl.philox` does."""
    c0, c1, c2, c3 = counters
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high_0, low_0 = _wide_product(0xD2511F53, c0)
        high_2, low_2 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ low, low_2, high_0 ^ c3 ^ high, low_0
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def mask(shape: Sequence[int], p: float, seed: torch.Tensor) -> torch.Tensor:
    """The kernels' mask of a matrix of this shape, as bool, by plain PyTorch on the seed's device."""
    rows, columns = shape
    group = torch.arange(-(-columns // 4), device=seed.device).expand(rows, -1)
    row = torch.arange(rows, device=seed.device)[:, None].expand_as(group)
    zero = torch.zeros_like(group)
    words = torch.stack(philox(seed.reshape(()), (group, row, zero, zero)), -1).flatten(-2)[:, :columns]
    signed = words - ((words >> 31) << 32)
    return signed >= threshold(p)
