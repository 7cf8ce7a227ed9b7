"""What linear layers with quantised weights have in common: tiles, splits and their sums, checks, launches, references.

Both kernels compute the transposed product ``weight @ x.T``: the weight, dequantised in registers, is then the left
operand of a matrix instruction, which Hopper takes from registers, and ``x`` the right one, in shared memory. Tiles
are as narrow as there are rows, so that few rows waste little. With few rows there are too few tiles to keep a GPU's
memory busy; then ``splits`` programs share the depth of one tile (split-K: Hoque et al., arXiv 2402.00025), store
float32 sums in scratch, and a second launch adds those in a fixed order: results are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, check_tensor, fail
from ._configs import Config
from ._tiles import swizzled

__all__ = [
    "HALVES",
    "check_product",
    "launch_product",
    "product_reference",
    "quantized_split",
    "quantized_store",
    "quantized_tile",
    "rows_of",
    "scratch_for",
    "spread",
]

#: What ``x``, scales and results may be: the dtypes to which weights are dequantised, for matrix instructions.
HALVES = (torch.float16, torch.bfloat16)

#: Scratch holds at most this many rows of float32 sums, all splits together; with more rows than `FEW` none.
_SCRATCH_ROWS, _FEW, _MOST_SPLITS = 256, 64, 16
#: Elements that one program of the second launch sums: a few for each of its threads.
_SUMMED = 512


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def quantized_tile(
    rows: tl.tensor, columns: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, group_m: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Rows and columns of the result that this program computes."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(rows, block_m), tl.cdiv(columns, block_n), group_m)
    return tile_m * block_m + tl.arange(0, block_m), tile_n * block_n + tl.arange(0, block_n)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def quantized_split(blocks: tl.constexpr, splits: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First and last (exclusive) of the blocks along the depth that this program sums; there may be none."""
    share: tl.constexpr = (blocks + splits - 1) // splits
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, blocks)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def quantized_store(
    total: tl.tensor,
    scales_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    out_pointer: tl.tensor,
    partial_pointer: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    columns: tl.constexpr,
    grouped: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """Store a transposed tile: scaled if the weight was not, with the bias if it is the whole sum."""
    if not grouped:
        total *= tl.load(scales_pointer + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    inside = (n < columns)[:, None] & (m < rows)[None, :]
    place = m.to(tl.int64)[None, :] * columns + n[:, None]
    if splits == 1:
        if bias_pointer is not None:
            total += tl.load(bias_pointer + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
        tl.store(out_pointer + place, total.to(out_pointer.dtype.element_ty), mask=inside)
    else:
        first = tl.program_id(1).to(tl.int64) * rows * columns
        tl.store(partial_pointer + first + place, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def quantized_sum_kernel(
    partial_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    out_pointer: tl.tensor,
    elements: tl.tensor,
    columns: tl.constexpr,
    splits: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Add the sums of all splits, one behind the other, and the bias; the grid is the number of blocks of ``out``."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < elements
    total = tl.zeros([block], dtype=tl.float32)
    partial_pointers = partial_pointer + place
    for _ in tl.static_range(splits):
        total += tl.load(partial_pointers, mask=inside, other=0.0)
        partial_pointers += elements
    if bias_pointer is not None:
        total += tl.load(bias_pointer + place % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_pointer + place, total.to(out_pointer.dtype.element_ty), mask=inside)


def launch_product(
    function: Any,
    x: torch.Tensor,
    weight: tuple[Any, ...],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor,
    blocks: int,
    constants: Mapping[str, int],
    config: Config,
) -> None:
    """Launch ``function`` on all tiles and splits of ``out``, which is not empty, then add what splits left.

    ``weight`` are the function's arguments between ``x`` and ``bias``, ``blocks`` how many steps of its main loop the
    depth has. There are no more splits than blocks or than ``partial`` has room for.
    """
    columns, depth = out.shape[-1], x.shape[-1]
    matrix = rows_of(x)
    rows = matrix.shape[0]
    splits = max(1, min(config.constants["splits"], partial.shape[0], blocks))
    tiles = -(-rows // config.constants["block_m"]) * -(-columns // config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        function[(tiles, splits)](
            matrix,
            *weight,
            bias,
            out,
            partial,
            rows,
            *matrix.stride(),
            columns=columns,
            depth=depth,
            **{**config.options, "splits": splits, **constants},
        )
        if splits > 1:
            quantized_sum_kernel[(-(-out.numel() // _SUMMED),)](
                partial, bias, out, out.numel(), columns=columns, splits=splits, block=_SUMMED, enable_fp_fusion=True
            )


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x [..., depth]`` as a matrix over the same memory; raises RuntimeError where strides do not allow it."""
    return x.view(math.prod(x.shape[:-1]), x.shape[-1])


def scratch_for(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Room for as many splits' sums as there may be, ``[splits, rows, columns]`` of float32; by sizes alone.

    Another device or a tuned configuration must not change what a planner has to place.
    """
    rows = math.prod(x.shape[:-1])
    room = min(_MOST_SPLITS, _SCRATCH_ROWS // rows, -(-x.shape[-1] // 64)) if 0 < rows <= _FEW else 0
    return x.new_empty((room if room > 1 else 0, rows, columns), dtype=torch.float32)


def check_product(
    name: str, x: torch.Tensor, columns: int, scales: torch.Tensor, bias: torch.Tensor | None, group: int
) -> int:
    """How many groups the depth has. Raises ExecutionError for tensors that a launch cannot take."""
    check_tensor(name, "x", x, (*[None] * max(x.dim(), 1),), HALVES, x.device, row_major=False)
    depth = x.shape[-1]
    if depth == 0:
        raise fail(name, "needs at least one input feature; x has none")
    if group < depth and (group < 32 or group & (group - 1)):
        raise fail(name, f"needs a group of 32, 64, 128, ... weights, or all {depth} in one; got {group}")
    try:
        rows_of(x)
    except RuntimeError:
        message = f"needs rows of x at equal distances; {list(x.shape)} has strides {list(x.stride())}"
        raise fail(name, message, hint="call .contiguous() on x") from None
    groups = -(-depth // group)
    check_tensor(name, "scales", scales, (groups, columns), HALVES, x.device)
    if bias is not None:
        check_tensor(name, "bias", bias, (columns,), FLOATS, x.device)
    return groups


def spread(values: torch.Tensor, group: int, depth: int) -> torch.Tensor:
    """Values of groups ``[groups, columns]`` as float32, one for each weight: ``[columns, depth]``."""
    wide = values.to(torch.float32).t()
    return wide.expand(-1, depth) if group >= depth else wide.repeat_interleave(group, 1)[:, :depth]


def product_reference(
    x: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """``x @ (integers * scales).T + bias`` for float32 ``integers`` [columns, depth], with the kernels' roundings."""
    if group < x.shape[-1]:
        weight = (integers * spread(scales, group, x.shape[-1])).to(x.dtype)
        total = x.to(torch.float32) @ weight.to(torch.float32).t()
    else:
        total = x.to(torch.float32) @ integers.t() * scales[0].to(torch.float32)
    return (total if bias is None else total + bias.to(torch.float32)).to(x.dtype)
