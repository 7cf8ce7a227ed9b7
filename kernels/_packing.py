"""Quantises weights of linear layers, and packs integers of 4 bits as ``w4a16_linear`` reads them.

A block of 256 weights along the depth is 32 words of 32 bits: nibble ``i`` of word ``j`` (from the lowest on) is
weight ``32 i + j`` of the block, and the last block is filled up with zeros. So a program reads 128 bytes in a row, 16
a thread; and nibble ``i`` of all words is 32 neighbours along the depth, which meet 32 neighbours of ``x``. To use all
nibbles of a register, nothing moves between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._quantized import HALVES

__all__ = ["BLOCK", "WORDS", "Packed", "Quantized", "pack", "pack_integers", "quantize", "unpack", "words_of"]

BLOCK, WORDS = 256, 32
_NIBBLES = 8


class Packed(NamedTuple):
    """A weight of 4 bits: what ``w4a16_linear`` takes between ``x`` and the bias."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


class Quantized(NamedTuple):
    """A weight of 8 bits: what ``w8a16_linear`` takes between ``x`` and the bias."""

    weight: torch.Tensor
    scales: torch.Tensor


def quantize(weight: torch.Tensor, group: int) -> Quantized:
    """Round a float weight ``[columns, depth]`` to 8 bits, -127 to 127, with a scale for each group along the depth.

    Scales have the weight's dtype, or bfloat16 where it is float32.
    """
    groups = _groups(weight, group)
    scales = _stored(groups.abs().amax(-1) / 127, weight.dtype)
    integers = (groups / scales.to(torch.float32)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Quantized(integers.flatten(1)[:, : weight.shape[1]].contiguous(), scales.t().contiguous())


def pack(weight: torch.Tensor, group: int, *, symmetric: bool = True) -> Packed:
    """Round a float weight ``[columns, depth]`` to 4 bits, with a scale and a zero point for each group.

    Symmetric groups reach 7 scales to both sides of 8; others from the least to the greatest weight and over zero.
    Scales as of `quantize`.
    """
    groups = _groups(weight, group)
    low = groups.amin(-1).clamp(max=0)
    extent = groups.abs().amax(-1) / 7 if symmetric else (groups.amax(-1).clamp(min=0) - low) / 15
    scales = _stored(extent, weight.dtype)
    step = scales.to(torch.float32)
    zeros = torch.full_like(step, 8) if symmetric else (-low / step).round().clamp(0, 15)
    integers = ((groups / step[..., None]).round() + zeros[..., None]).clamp(0, 15).to(torch.uint8)
    packed = pack_integers(integers.flatten(1)[:, : weight.shape[1]])
    return Packed(packed, scales.t().contiguous(), None if symmetric else zeros.to(torch.uint8).t().contiguous())


def pack_integers(integers: torch.Tensor) -> torch.Tensor:
    """Integers 0 to 15 ``[columns, depth]``, of any integer dtype, packed; higher bits are dropped."""
    columns, depth = integers.shape
    filled = torch.nn.functional.pad(integers.to(torch.int32), (0, -depth % BLOCK)) & 15
    nibbles = filled.view(columns, filled.shape[1] // BLOCK, _NIBBLES, WORDS)
    words = nibbles[:, :, 0].clone()
    for index in range(1, _NIBBLES):
        words |= nibbles[:, :, index] << 4 * index
    return words.flatten(1)


def unpack(packed: torch.Tensor, depth: int) -> torch.Tensor:
    """The integers ``[columns, depth]`` in ``packed``, as uint8."""
    words = packed.view(packed.shape[0], packed.shape[1] // WORDS, 1, WORDS)
    shifts = torch.arange(0, 4 * _NIBBLES, 4, dtype=torch.int32, device=packed.device).view(1, 1, -1, 1)
    return ((words >> shifts) & 15).flatten(1)[:, :depth].to(torch.uint8)


def words_of(depth: int) -> int:
    """How many words the weights of one column need."""
    return -(-depth // BLOCK) * WORDS


def _groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """``[columns, groups, group]`` in float32; the last group is filled up with zeros."""
    columns, depth = weight.shape
    span = min(group, depth)
    filled = torch.nn.functional.pad(weight.to(torch.float32), (0, -depth % span))
    return filled.view(columns, filled.shape[1] // span, span)


def _stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the dtype that keeps them; that of zeros is not zero, so that one can divide by it."""
    return scales.clamp(min=2.0**-24).to(dtype if dtype in HALVES else torch.bfloat16)
