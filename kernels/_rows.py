"""What kernels over rows of a matrix share: loads in float32, and sums over all rows in a fixed order.

For such sums, as gradients of weights are, every program keeps those of its own rows; `add_up` adds them. Atomic
additions would need no second launch, but the order in which they happen changes from run to run, and with it the last
bits of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_up", "loaded", "partial_shape"]

#: Two programs for each of a Hopper's 132 multiprocessors; a constant, so that a sum is the same on every device.
_PROGRAMS = 264

#: How `add_up` walks partial sums: as wide as four sectors of memory, and as high as keeps four warps busy.
_BLOCK_M, _BLOCK_N = 64, 32


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def loaded(pointer: tl.tensor, place: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """What is at ``pointer + place``, in float32; zero where not ``inside``."""
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32)


def partial_shape(like: torch.Tensor) -> tuple[int, int]:
    """``[programs, columns]`` of scratch for sums over the rows of ``like``: a program for each row, up to 264."""
    columns = like.shape[-1]
    return min(like.numel() // columns if columns else 0, _PROGRAMS), columns


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_up_kernel(
    partials_pointer: tl.tensor,
    first_pointer: tl.tensor,
    second_pointer: tl.tensor,
    programs: tl.tensor,
    columns: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Sum ``block_n`` columns of one of two matrices; which of them says the second dimension of the grid."""
    which = tl.program_id(1)
    partials_pointer += which.to(tl.int64) * programs * columns
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    sums = tl.zeros([block_m, block_n], dtype=tl.float32)
    for first in range(0, programs, block_m):
        row = first + tl.arange(0, block_m)
        inside = (row < programs)[:, None] & (column < columns)[None, :]
        sums += loaded(partials_pointer, row.to(tl.int64)[:, None] * columns + column[None, :], inside)
    total = tl.sum(sums, axis=0).to(first_pointer.dtype.element_ty)
    tl.store(first_pointer + column, total, mask=(column < columns) & (which == 0))
    tl.store(second_pointer + column, total, mask=(column < columns) & (which == 1))


def add_up(partials: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Sum float32 ``[programs, columns]`` over programs into ``first``; with ``second``, both of ``[2, ...]``.

    Launches on the current stream of the current device.
    """
    programs, columns = partials.shape[-2:]
    grid = (triton.cdiv(columns, _BLOCK_N), 1 if second is None else 2)
    add_up_kernel[grid](
        partials,
        first,
        first if second is None else second,
        programs,
        columns=columns,
        block_m=_BLOCK_M,
        block_n=_BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )
