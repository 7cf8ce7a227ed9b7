"""Rotary position embedding of a tile of heads, and what its kernels check: shared by those with and without a cache.

Each pair of a head's elements is a point in the plane, turned by the token's position times the pair's frequency:

    first' = first * cos - second * sin
    second' = second * cos + first * sin

(RoFormer, Su et al., arXiv 2104.09864.) Pair ``i`` of ``rotary_dim`` elements is ``(i, i + rotary_dim / 2)`` as in
Llama and Qwen, or, interleaved, ``(2 i, 2 i + 1)`` as in RoFormer and GPT-J. Elements behind ``rotary_dim`` stay.
Tables hold a cosine and a sine for each pair, or, as Hugging Face's models keep them, for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, check_tensor, fail

__all__ = [
    "check_heads",
    "check_tables",
    "dense_strides",
    "positions_of",
    "rotate_heads",
    "rotated",
    "spelled",
    "tables",
]

INTEGERS = (torch.int32, torch.int64)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def rotate_heads(
    source_pointer: tl.tensor,
    target_pointer: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    head: tl.tensor,
    inside: tl.tensor,
    angles: tl.tuple,
    dim: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
) -> None:
    """Rotate the heads ``head`` of one token, where ``inside``; pointers are to the token's first head."""
    cosine, sine, second_cosine, second_sine = angles
    source = source_pointer + head.to(tl.int64)[:, None] * source_stride
    target = target_pointer + head.to(tl.int64)[:, None] * target_stride
    narrow = target_pointer.dtype.element_ty
    if interleaved:
        column = tl.arange(0, 2 * block_pairs)[None, :]
        whole = inside[:, None] & (column < 2 * pairs)
        x = tl.load(source + column, mask=whole, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (block_heads, block_pairs, 2)))
        turned = tl.join(first * cosine - second * sine, second * second_cosine + first * second_sine)
        tl.store(target + column, tl.reshape(turned, (block_heads, 2 * block_pairs)).to(narrow), mask=whole)
    else:
        pair = tl.arange(0, block_pairs)[None, :]
        half = inside[:, None] & (pair < pairs)
        first = tl.load(source + pair, mask=half, other=0.0).to(tl.float32)
        second = tl.load(source + pairs + pair, mask=half, other=0.0).to(tl.float32)
        tl.store(target + pair, (first * cosine - second * sine).to(narrow), mask=half)
        tl.store(target + pairs + pair, (second * second_cosine + first * second_sine).to(narrow), mask=half)
    if block_rest > 0:
        column = 2 * pairs + tl.arange(0, block_rest)[None, :]
        rest = inside[:, None] & (column < dim)
        tl.store(target + column, tl.load(source + column, mask=rest, other=0.0), mask=rest)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def tables(
    cos_pointer: tl.tensor,
    sin_pointer: tl.tensor,
    cos_strides: tl.tuple,
    sin_strides: tl.tuple,
    position: tl.tensor,
    rows: tl.tensor,
    pairs: tl.constexpr,
    each: tl.constexpr,
    interleaved: tl.constexpr,
    block_pairs: tl.constexpr,
) -> tl.tuple:
    """Cosines and sines ``[1, block_pairs]`` of the first and of the second elements of all pairs, at a position.

    With ``each``, tables have a column for each element. NaN, and nothing read, for a position outside of the tables.
    """
    position = tl.where(position < 0, position + rows, position)
    pair = tl.arange(0, block_pairs)[None, :]
    known = (pair < pairs) & (position >= 0) & (position < rows)
    cos_row, sin_row = cos_pointer + position * cos_strides[0], sin_pointer + position * sin_strides[0]
    column = 2 * pair if each and interleaved else pair
    cosine = tl.load(cos_row + column * cos_strides[1], mask=known, other=float("nan")).to(tl.float32)
    sine = tl.load(sin_row + column * sin_strides[1], mask=known, other=float("nan")).to(tl.float32)
    second_cosine, second_sine = cosine, sine
    if each:
        column = 2 * pair + 1 if interleaved else pairs + pair
        second_cosine = tl.load(cos_row + column * cos_strides[1], mask=known, other=float("nan")).to(tl.float32)
        second_sine = tl.load(sin_row + column * sin_strides[1], mask=known, other=float("nan")).to(tl.float32)
    return cosine, sine, second_cosine, second_sine


def check_heads(kernel: str, name: str, tensor: torch.Tensor, like: torch.Tensor, head_dim: int) -> None:
    """Raise ExecutionError unless ``tensor`` has the shape of ``like`` but for its number of heads."""
    shape: list[int | None] = list(like.shape)
    shape[head_dim] = None
    dtypes = FLOATS if tensor is like else like.dtype
    check_tensor(kernel, name, tensor, shape, dtypes, like.device, row_major=False)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise fail(kernel, f"needs the elements of each head of {name} side by side; strides {list(tensor.stride())}")


def dense_strides(shape: Sequence[int], given: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, in the order of dimensions in memory of ``given`` ones; what PyTorch gives ``2 * x``."""
    rank, reach = len(shape), 1
    strides = [0] * rank
    for dim in sorted((d for d in range(rank) if shape[d] != 1), key=lambda d: (given[d], -d)):
        strides[dim], reach = reach, reach * max(shape[dim], 1)
    for dim in reversed(range(rank)):  # one element lies anywhere
        if shape[dim] == 1:
            strides[dim] = reach if dim == 0 else strides[dim + 1] * shape[dim + 1] if dim + 1 < rank else 1
    return tuple(strides)


def check_tables(kernel: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int) -> bool:
    """Raise ExecutionError unless the tables rotate ``rotary_dim`` elements; whether they have a column for each."""
    check_tensor(kernel, "cos", cos, (None, None), {torch.float32, q.dtype}, q.device, row_major=False)
    check_tensor(kernel, "sin", sin, cos.shape, cos.dtype, q.device, row_major=False)
    if not 0 < rotary_dim <= q.shape[-1] or rotary_dim % 2:
        raise fail(kernel, f"rotates 2, 4, ... elements of a head of {q.shape[-1]}; got rotary_dim {rotary_dim}")
    if cos.shape[1] not in (rotary_dim, rotary_dim // 2):
        raise fail(kernel, f"needs {rotary_dim // 2} or {rotary_dim} columns of cos; got {cos.shape[1]}")
    return cos.shape[1] == rotary_dim


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor, rotary_dim: int, interleaved: bool
) -> torch.Tensor:
    """Rotated ``[..., tokens, heads, dim]`` by plain PyTorch, in float32, rounded once; ``position`` [..., tokens]."""
    rows, pairs = cos.shape[0], rotary_dim // 2
    position = torch.where(position < 0, position + rows, position)
    known = ((position >= 0) & (position < rows))[..., None, None]
    spread = {pairs: (0, 0), rotary_dim: (0, 1)}[cos.shape[1]]  # where the second elements' column is
    angles = []
    for second in spread:
        column = slice(second, None, 2) if interleaved and spread == (0, 1) else slice(second * pairs, None)
        for table in (cos, sin):
            wide = table[:, column][:, :pairs].to(torch.float32)
            row = wide[position.clamp(0, rows - 1)] if rows else wide.new_zeros((*position.shape, pairs))
            angles.append(torch.where(known, row[..., None, :], torch.nan))
    turning = x[..., :rotary_dim].to(torch.float32)
    first, second_ = turning.reshape(*turning.shape[:-1], pairs, 2).unbind(-1) if interleaved else turning.chunk(2, -1)
    turned = (first * angles[0] - second_ * angles[1], second_ * angles[2] + first * angles[3])
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined.to(x.dtype), x[..., rotary_dim:]), -1)


def spelled(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, rotary_dim: int, interleaved: bool
) -> torch.Tensor:
    """One rotation as models spell it, in the wider dtype of both and rounded at the end."""
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        first, second = turning.reshape(*turning.shape[:-1], -1, 2).unbind(-1)
    else:
        first, second = turning.chunk(2, -1)
    if cosine.shape[-1] == rotary_dim:  # Hugging Face's
        halves = (torch.stack((-second, first), -1).flatten(-2),) if interleaved else (torch.cat((-second, first), -1),)
        turned = turning * cosine + halves[0] * sine
    elif interleaved:
        turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(-2)
    else:
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    turned = turned.to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def positions_of(
    random: Callable[..., torch.Tensor], device: str, seed: int, tokens: int, context: int, pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of tokens in a context, and its tables of cosines and sines in float32, with Llama's first base."""
    if device == "meta":
        return torch.empty(tokens, dtype=torch.int64, device=device), random(context, pairs), random(context, pairs)
    generator = torch.Generator(device).manual_seed(seed)
    positions = torch.randint(context, (tokens,), generator=generator, device=device)
    frequency = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    angle = torch.arange(context, dtype=torch.float64, device=device)[:, None] * frequency
    return positions, angle.cos().float(), angle.sin().float()
