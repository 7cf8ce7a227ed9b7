"""Rotary position embedding of a tile of heads, and what its kernels check: shared by those with and without a cache.

Each pair of a head's elements is a point in the plane, turned by the token's position times the pair's frequency:

    first' = first * cos - second * sin
    second' = second * cos + first * sin

(RoFormer, Su et al., arXiv 2104.09864.) Pair ``i`` of ``rotary_dim`` elements is ``(i, i + rotary_dim / 2)`` as in
Llama and Qwen, or, interleaved, ``(2 i, 2 i + 1)`` as in RoFormer and GPT-J. Elements behind ``rotary_dim`` stay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, check_tensor, fail

__all__ = ["check_heads", "check_tables", "positions_of", "rotate_heads", "rotated", "tables"]

INTEGERS = (torch.int32, torch.int64)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def rotate_heads(
    source_pointer: tl.tensor,
    target_pointer: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    head: tl.tensor,
    inside: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    dim: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
) -> None:
    """Rotate the heads ``head`` of one token, where ``inside``; pointers are to the token's first head."""
    source = source_pointer + head.to(tl.int64)[:, None] * source_stride
    target = target_pointer + head.to(tl.int64)[:, None] * target_stride
    narrow = target_pointer.dtype.element_ty
    if interleaved:
        column = tl.arange(0, 2 * block_pairs)[None, :]
        whole = inside[:, None] & (column < 2 * pairs)
        x = tl.load(source + column, mask=whole, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (block_heads, block_pairs, 2)))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        tl.store(target + column, tl.reshape(turned, (block_heads, 2 * block_pairs)).to(narrow), mask=whole)
    else:
        pair = tl.arange(0, block_pairs)[None, :]
        half = inside[:, None] & (pair < pairs)
        first = tl.load(source + pair, mask=half, other=0.0).to(tl.float32)
        second = tl.load(source + pairs + pair, mask=half, other=0.0).to(tl.float32)
        tl.store(target + pair, (first * cosine - second * sine).to(narrow), mask=half)
        tl.store(target + pairs + pair, (second * cosine + first * sine).to(narrow), mask=half)
    if block_rest > 0:
        column = 2 * pairs + tl.arange(0, block_rest)[None, :]
        rest = inside[:, None] & (column < dim)
        tl.store(target + column, tl.load(source + column, mask=rest, other=0.0), mask=rest)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def tables(
    cos_pointer: tl.tensor,
    sin_pointer: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    position: tl.tensor,
    rows: tl.tensor,
    pairs: tl.constexpr,
    block_pairs: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines ``[1, block_pairs]`` of a position; NaN, and nothing read, for one outside the tables."""
    pair = tl.arange(0, block_pairs)[None, :]
    known = (pair < pairs) & (position >= 0) & (position < rows)
    cosine = tl.load(cos_pointer + position * cos_stride + pair, mask=known, other=float("nan")).to(tl.float32)
    sine = tl.load(sin_pointer + position * sin_stride + pair, mask=known, other=float("nan")).to(tl.float32)
    return cosine, sine


def check_heads(
    kernel: str, name: str, tensor: torch.Tensor, tokens: int | None, dim: int | None, like: torch.Tensor
) -> None:
    """Raise ExecutionError unless ``tensor`` is ``[tokens, any, dim]``, with the elements of a head side by side."""
    check_tensor(kernel, name, tensor, (tokens, None, dim), FLOATS if tensor is like else like.dtype, like.device,
                 row_major=False)  # fmt: skip
    if tensor.stride(-1) != 1 and tensor.numel() > 0 and tensor.shape[-1] > 1:
        raise fail(kernel, f"needs the elements of each head of {name} side by side; strides {list(tensor.stride())}")


def check_tables(kernel: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Raise ExecutionError unless the tables are ``[any, at most dim / 2]``, and positions ``[tokens]``."""
    dtypes = {torch.float32, q.dtype}
    check_tensor(kernel, "cos", cos, (None, None), dtypes, q.device, row_major=False)
    check_tensor(kernel, "sin", sin, cos.shape, cos.dtype, q.device, row_major=False)
    check_tensor(kernel, "positions", positions, q.shape[:1], INTEGERS, q.device)
    if not 0 < 2 * cos.shape[1] <= q.shape[2]:
        raise fail(kernel, f"rotates 1 to {q.shape[2] // 2} pairs of a head of {q.shape[2]}; got {cos.shape[1]}")
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.stride(-1) != 1 and table.numel() > 0 and table.shape[-1] > 1:
            raise fail(kernel, f"needs rows of {name} that are not strided; strides {list(table.stride())}")


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotated ``[tokens, heads, dim]`` by plain PyTorch, in float32, rounded once."""
    rows, pairs = cos.shape
    known = ((positions >= 0) & (positions < rows))[:, None]
    row = positions.clamp(0, rows - 1).long() if rows else positions[:0].long()
    nan = torch.full((len(positions), pairs), torch.nan, dtype=torch.float32, device=x.device)
    cosine, sine = (torch.where(known, table[row].to(torch.float32), nan) if rows else nan for table in (cos, sin))
    cosine, sine = cosine[:, None], sine[:, None]
    wide = x[..., : 2 * pairs].to(torch.float32)
    split = wide.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    first, second = split
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined.to(x.dtype), x[..., 2 * pairs :]), -1)


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
