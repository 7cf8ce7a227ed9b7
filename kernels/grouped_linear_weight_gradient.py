"""The gradient of the weights of a linear layer for each expert, from rows sorted by expert.

    out[expert] = sum over the expert's rows of outer(x[row], gradient[row])

where the rows of expert ``e`` are ``ends[e - 1]`` to ``ends[e]`` (see `_experts`): the backward of ``grouped_linear``,
a grouped matrix product as in MegaBlocks (arXiv 2211.15841). An expert without rows gets zeros. Products are summed in
float32, in the order of the rows, and rounded once. One program sums all rows of an expert, so that nothing is added
atomically; an expert with most of the rows is what a launch then waits for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._expert_patterns import grouped_product
from ._experts import WORKLOADS, check_ends, counts_of, sizes_of, sorted_by_expert
from ._kernel import Kernel, normal
from ._match import Cost, Match, Walk, is_row_major, transposed
from ._tiles import swizzled

__all__ = ["KERNEL"]

NAME = "grouped_linear_weight_gradient"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def grouped_linear_weight_gradient_kernel(
    x_pointer: tl.tensor,
    gradient_pointer: tl.tensor,
    ends_pointer: tl.tensor,
    out_pointer: tl.tensor,
    height: tl.constexpr,
    columns: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of row-major ``out`` ``[experts, height, columns]``; the grid is the number of tiles.

    ``block_k`` rows are summed at a time.
    """
    tiles_m, tiles_n = tl.cdiv(height, block_m), tl.cdiv(columns, block_n)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile_m, tile_n = swizzled(tl.program_id(0) - expert * tiles_m * tiles_n, tiles_m, tiles_n, group_m)
    m = tile_m * block_m + tl.arange(0, block_m)
    n = tile_n * block_n + tl.arange(0, block_n)
    start = tl.load(ends_pointer + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_pointer + expert)
    lane = tl.arange(0, block_k)
    first_rows = (start + lane).to(tl.int64)
    x_pointers = x_pointer + m[:, None] + first_rows[None, :] * height
    gradient_pointers = gradient_pointer + first_rows[:, None] * columns + n[None, :]
    has_m, has_n = (m < height)[:, None], (n < columns)[None, :]
    total = tl.zeros([block_m, block_n], dtype=tl.float32)
    for first in range(start, end, block_k):
        has_row = lane < end - first
        x = tl.load(x_pointers, mask=has_m & has_row[None, :], other=0.0)
        gradient = tl.load(gradient_pointers, mask=has_row[:, None] & has_n, other=0.0)
        total = tl.dot(x, gradient, total, input_precision="ieee")
        x_pointers += block_k * height
        gradient_pointers += block_k * columns
    at = (expert.to(tl.int64) * height + m)[:, None] * columns + n[None, :]
    tl.store(out_pointer + at, total.to(out_pointer.dtype.element_ty), mask=has_m & has_n)


def launch(
    x: torch.Tensor,
    gradient: torch.Tensor,
    ends: torch.Tensor,
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gradient of each expert's weight into ``out``, on the current stream.

    Args:
        x: ``[rows, hidden]``, float32, float16 or bfloat16, row-major, on a CUDA device, sorted by expert.
        gradient: ``[rows, intermediate]`` of the same dtype, row-major: that of ``x[row] @ weight[expert]``.
        ends: ``[experts]`` of int32, where each expert's rows end; not decreasing, at most ``rows``.
        out: ``[experts, hidden, intermediate]``, as ``x``; written, shares no memory with any other argument.
        config: how to launch; chosen by the rows that an expert has on average if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, gradient, ends)
    rows, height, columns, experts = *x.shape, gradient.shape[1], ends.shape[0]
    check_tensor(NAME, "out", out, (experts, height, columns), x.dtype, x.device)
    check_apart(NAME, {"out": out}, {"x": x, "gradient": gradient, "ends": ends})
    check_device(NAME, grouped_linear_weight_gradient_kernel, x)
    if out.numel() == 0:
        return
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, experts, x, gradient))
    tiles = triton.cdiv(height, config.constants["block_m"]) * triton.cdiv(columns, config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        grouped_linear_weight_gradient_kernel[(experts * tiles,)](
            x, gradient, ends, out, height=height, columns=columns, **config.options
        )


def _check(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> None:
    check_tensor(NAME, "x", x, (None, None), FLOATS, x.device)
    check_tensor(NAME, "gradient", gradient, (x.shape[0], None), x.dtype, x.device)
    check_ends(NAME, ends, ends.numel(), x.shape[0], x.device)


def allocate(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor]:
    """New ``(out,)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, gradient, ends)
    return (x.new_empty(ends.shape[0], x.shape[1], gradient.shape[1]),)


def reference(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    counts = counts_of(ends, len(x))
    known = sum(counts)  # rows behind the last expert's are nobody's
    parts = zip(*(torch.split(rows[:known].to(torch.float32), counts) for rows in (x, gradient)), strict=True)
    return (torch.stack([(a.t() @ b).to(x.dtype) for a, b in parts]),)


def eager(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> Any:
    """A loop of matrix products over experts; the host waits for the counts."""
    counts = counts_of(ends, len(x))
    return torch.stack([a.t() @ b for a, b in zip(torch.split(x, counts), torch.split(gradient, counts), strict=True)])


def cost(dtype: str, tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> Cost:
    """Flops and bytes for the rows of ``tokens`` with ``top_k`` experts each: operands read once, ``out`` written."""
    rows = tokens * top_k
    elements = rows * (hidden + intermediate) + experts * hidden * intermediate
    return Cost(2 * rows * hidden * intermediate, elements * DTYPE_BYTES[dtype] + 4 * experts)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    _, _, ends = sorted_by_expert(random, tokens, experts, top_k)
    rows = tokens * top_k
    x, gradient = random(rows, hidden), random(rows, intermediate) * max(rows // experts, 1) ** -0.5
    return {"x": x.to(dtype), "gradient": gradient.to(dtype), "ends": ends}


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph calls ``torch._grouped_mm`` of transposed rows and rows, as the backward of that operator does."""
    walk = Walk(graph)
    found = []
    for out in walk.results("_grouped_mm"):
        product = grouped_product(walk, out)
        if product is None or (len(product.x.shape), len(product.weight.shape)) != (2, 2):
            continue
        x, gradient, ends = transposed(product.x), product.weight, product.ends
        (rows, height), columns = x.shape, gradient.shape[1]
        if is_row_major(x) and is_row_major(gradient) and out.shape == (*ends.shape, height, columns):
            arguments = {"x": x, "gradient": gradient, "ends": ends}
            launch_cost = cost(out.dtype, rows, ends.shape[0], 1, height, columns)
            found.append(walk.match(NAME, arguments, (out,), launch_cost))
    return tuple(match for match in found if match is not None)


KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=WORKLOADS,
    dtypes=FLOATS,
    configs=CONFIGS,
)
