"""A linear layer for each expert: rows sorted by expert times the weight of their expert, in one launch.

    out[row] = x[row] @ weight[expert]

where the rows of expert ``e`` are ``ends[e - 1]`` to ``ends[e]`` (see `_experts`): a grouped matrix product as in
MegaBlocks (arXiv 2211.15841), and what ``torch._grouped_mm`` computes. Products are summed in float32 and rounded once.
The gradient of x is the same with the transposed weights; that of the weight is ``grouped_linear_weight_gradient``.

How many rows an expert has is known to the device only. So the grid has as many programs as tiles there can be; each
finds its tile by ``ends``, or that it has none.
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
from ._experts import (
    WORKLOADS,
    check_ends,
    count_tiles,
    counts_of,
    expert_tile,
    expert_tiles,
    sizes_of,
    sorted_by_expert,
)
from ._kernel import Kernel, normal
from ._match import Cost, Match, Walk, is_row_major
from ._matmul import multiplied
from .grouped_linear_weight_gradient import KERNEL as WEIGHT_GRADIENT

__all__ = ["KERNEL"]

NAME = "grouped_linear"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def grouped_linear_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    ends_pointer: tl.tensor,
    out_pointer: tl.tensor,
    stride_expert: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    experts: tl.constexpr,
    depth: tl.constexpr,
    columns: tl.constexpr,
    block_experts: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of row-major ``out``; the grid is `count_tiles`."""
    starts, ends, tiles = expert_tiles(ends_pointer, experts, block_experts, block_m)
    if tl.program_id(0) >= tl.sum(tiles, axis=0) * tl.cdiv(columns, block_n):
        return
    expert, row, last, column = expert_tile(
        tl.program_id(0), starts, ends, tiles, columns, block_experts, block_m, block_n, group_m
    )
    total = multiplied(
        x_pointer, weight_pointer + expert * stride_expert, row, column, last, stride_k, stride_n,
        columns, depth, block_k,
    )  # fmt: skip
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < last)[:, None] & (column < columns)[None, :]
    tl.store(out_pointer + at, total.to(out_pointer.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write each row of ``x`` times the weight of its expert into ``out``, on the current stream.

    Args:
        x: ``[rows, hidden]``, float32, float16 or bfloat16, row-major, on a CUDA device, sorted by expert.
        weight: ``[experts, hidden, intermediate]`` of the same dtype, with any strides.
        ends: ``[experts]`` of int32, where each expert's rows end; not decreasing, the last is ``rows``.
        out: ``[rows, intermediate]``, as ``x``; written, shares no memory with any other argument.
        config: how to launch; chosen by the rows that an expert has on average if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, weight, ends)
    (rows, depth), (experts, _, columns) = x.shape, weight.shape
    check_tensor(NAME, "out", out, (rows, columns), x.dtype, x.device)
    check_apart(NAME, {"out": out}, {"x": x, "weight": weight, "ends": ends})
    check_device(NAME, grouped_linear_kernel, x)
    if out.numel() == 0:
        return
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, experts, weight))
    block_m, block_n = config.constants["block_m"], config.constants["block_n"]
    with torch.accelerator.device_index(x.device.index):
        grouped_linear_kernel[(count_tiles(rows, experts, columns, block_m, block_n),)](
            x, weight, ends, out, *weight.stride(), experts=experts, depth=depth, columns=columns,
            block_experts=triton.next_power_of_2(experts), **config.options,
        )  # fmt: skip


def _check(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> None:
    check_tensor(NAME, "x", x, (None, None), FLOATS, x.device)
    check_tensor(NAME, "weight", weight, (None, x.shape[1], None), x.dtype, x.device, row_major=False)
    check_ends(NAME, ends, weight.shape[0], x.shape[0], x.device)


def allocate(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor]:
    """New ``(out,)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, weight, ends)
    return (x.new_empty(x.shape[0], weight.shape[2]),)


def reference(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    parts = torch.split(x.to(torch.float32), counts_of(ends, len(x)))
    products = [part @ of_expert.to(torch.float32) for part, of_expert in zip(parts, weight, strict=True)]
    return (torch.cat(products).to(x.dtype),)


def eager(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> Any:
    """A loop of matrix products over experts; the host waits for the counts."""
    parts = torch.split(x, counts_of(ends, len(x)))
    return torch.cat([part @ of_expert for part, of_expert in zip(parts, weight, strict=True)])


def cost(dtype: str, tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> Cost:
    """Flops and bytes for the rows of ``tokens`` with ``top_k`` experts each.

    Every operand once: x, the weights of the experts that can have rows and ends read, ``out`` written.
    """
    rows = tokens * top_k
    elements = rows * (hidden + intermediate) + min(rows, experts) * hidden * intermediate
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
    weight = random(experts, hidden, intermediate) * max(hidden, 1) ** -0.5
    return {"x": random(tokens * top_k, hidden).to(dtype), "weight": weight.to(dtype), "ends": ends}


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph calls ``torch._grouped_mm`` of rows and a weight for each expert, without bias."""
    walk = Walk(graph)
    found = []
    for out in walk.results("_grouped_mm"):
        product = grouped_product(walk, out)
        if product is None or (len(product.x.shape), len(product.weight.shape)) != (2, 3):
            continue
        (rows, depth), (experts, _, columns) = product.x.shape, product.weight.shape
        if is_row_major(product.x) and experts == product.ends.shape[0] and out.shape == (rows, columns):
            arguments = {"x": product.x, "weight": product.weight, "ends": product.ends}
            found.append(walk.match(NAME, arguments, (out,), cost(out.dtype, rows, experts, 1, depth, columns)))
    return tuple(match for match in found if match is not None)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    x_gradient = KERNEL(gradient, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    weight_gradient = WEIGHT_GRADIENT(x, gradient, ends) if ctx.needs_input_grad[1] else None
    return x_gradient, weight_gradient, None


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
KERNEL.operator.register_autograd(_backward, setup_context=_keep)
