"""Which output tile a program computes: shared by the kernels that multiply matrices."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["swizzled"]


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def swizzled(program: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, group_m: tl.constexpr) -> tl.tensor:
    """Row and column of the tile that ``program`` computes, in bands of ``group_m`` rows of tiles.

    Programs that run at the same time then share operands in the L2 cache: the tile order of Triton's tutorial on
    matrix multiplication. Bands at the lower edge are as high as what is left.
    """
    band = program // (group_m * tiles_n)
    first = band * group_m
    height = tl.minimum(tiles_m - first, group_m)
    within = program - band * group_m * tiles_n
    return first + within % height, within // height
