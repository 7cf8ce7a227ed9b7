"""The second half of a mixture of experts: down projections of sorted rows, weighted and summed for each token.

    out[token] = sum over the token's choices of weights[token, choice] * (x[row] @ weight[expert])

where the rows are the assignments of tokens to experts sorted by expert (see `_experts`), as in Mixtral (arXiv
2401.04088); the grouped product over experts is that of MegaBlocks (arXiv 2211.15841). Products are summed in float32
and weighted before they are rounded for the first time, into scratch at the place of their assignment; a second launch
sums a token's choices in float32, in their order, and rounds once more. Nothing is added atomically: the same operands
give the same result.

How many rows an expert has is known to the device only. So the grid has as many programs as tiles there can be; each
finds its tile by ``ends``, or that it has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._expert_patterns import GroupedProduct, gathered, grouped_product, inverted
from ._experts import (
    INDICES,
    WORKLOADS,
    check_ends,
    count_tiles,
    counts_of,
    expert_tile,
    expert_tiles,
    matrix_of,
    sizes_of,
    sorted_by_expert,
    tokens_of,
)
from ._kernel import Kernel, normal
from ._match import CASTS, Cost, Match, Walk, any_tensor, call, is_row_major, literal, reshaped
from ._matmul import multiplied
from .grouped_linear import KERNEL as GROUPED_LINEAR
from .grouped_linear_weight_gradient import KERNEL as WEIGHT_GRADIENT

__all__ = ["KERNEL"]

NAME = "grouped_linear_scatter"
CONFIGS = Configs.beside(__file__)
_CAST_NAMES = tuple(target.split(".")[1] for target in CASTS)
#: Columns that one program sums.
_BLOCK_SUM = 1024


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def grouped_linear_scatter_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    order_pointer: tl.tensor,
    ends_pointer: tl.tensor,
    weights_pointer: tl.tensor,
    products_pointer: tl.tensor,
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
    """Compute one tile of weighted products, each row at the place of its assignment; the grid is `count_tiles`."""
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
    assignment = tl.load(order_pointer + row, mask=row < last, other=0).to(tl.int64)
    share = tl.load(weights_pointer + assignment, mask=row < last, other=0.0).to(tl.float32)
    at = assignment[:, None] * columns + column[None, :]
    inside = (row < last)[:, None] & (column < columns)[None, :]
    tl.store(products_pointer + at, (total * share[:, None]).to(products_pointer.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def grouped_linear_scatter_sum_kernel(
    products_pointer: tl.tensor,
    out_pointer: tl.tensor,
    top_k: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Sum the choices of one token over one block of columns; the grid is the number of these."""
    blocks = tl.cdiv(columns, block)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = column < columns
    total = tl.zeros([block], dtype=tl.float32)
    for choice in tl.static_range(top_k):
        at = (token * top_k + choice) * columns + column
        total += tl.load(products_pointer + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_pointer + token * columns + column, total.to(out_pointer.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    weights: torch.Tensor,
    *,
    out: torch.Tensor,
    products: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write each token's weighted sum over its experts into ``out``, on the current stream, in two launches.

    Args:
        x: ``[tokens * top_k, intermediate]``, float32, float16 or bfloat16, row-major, on a CUDA device, sorted by
            expert, as `grouped_gated_linear` makes it.
        weight: ``[experts, intermediate, hidden]`` of the same dtype, with any strides.
        order: ``[tokens * top_k]`` of int32 or int64, a permutation, as `expert_routing` makes it.
        ends: ``[experts]`` of int32, where each expert's rows end; not decreasing, the last is ``tokens * top_k``.
        weights: ``[..., top_k]`` of any of the three dtypes, row-major: what a token's experts count.
        out: ``[..., hidden]``, as ``x``; written, shares no memory with any other argument.
        products: ``[tokens * top_k, hidden]``, as ``x``; scratch, shares no memory with any other argument.
        config: how to launch; chosen by the rows that an expert has on average if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, weight, order, ends, weights)
    (rows, depth), (experts, _, columns) = x.shape, weight.shape
    written = {"out": out, "products": products}
    check_tensor(NAME, "out", out, (*weights.shape[:-1], columns), x.dtype, x.device)
    check_tensor(NAME, "products", products, (rows, columns), x.dtype, x.device)
    check_apart(NAME, written, {"x": x, "weight": weight, "order": order, "ends": ends, "weights": weights})
    check_device(NAME, grouped_linear_scatter_kernel, x)
    if out.numel() == 0:
        return
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, experts, weight))
    block_m, block_n = config.constants["block_m"], config.constants["block_n"]
    options = dataclasses.replace(config, constants={}, num_warps=4, num_stages=1).options
    with torch.accelerator.device_index(x.device.index):
        grouped_linear_scatter_kernel[(count_tiles(rows, experts, columns, block_m, block_n),)](
            x, weight, order, ends, weights, products, *weight.stride(), experts=experts, depth=depth,
            columns=columns, block_experts=triton.next_power_of_2(experts), **config.options,
        )  # fmt: skip
        block = min(_BLOCK_SUM, triton.next_power_of_2(columns))
        grouped_linear_scatter_sum_kernel[(out.numel() // columns * triton.cdiv(columns, block),)](
            products, out, top_k=weights.shape[-1], columns=columns, block=block, **options
        )


def _check(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor
) -> None:
    check_tensor(NAME, "x", x, (None, None), FLOATS, x.device)
    rows, depth = x.shape
    check_tensor(NAME, "weight", weight, (None, depth, None), x.dtype, x.device, row_major=False)
    check_tensor(NAME, "order", order, (rows,), INDICES, x.device)
    check_ends(NAME, ends, weight.shape[0], rows, x.device)
    check_tensor(NAME, "weights", weights, (*[None] * max(weights.dim(), 1),), FLOATS, x.device)
    if weights.numel() != rows or weights.shape[-1] == 0:
        raise fail(NAME, f"needs weights [..., top_k] for all {rows} rows of x; got {list(weights.shape)}")


def allocate(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(out, products)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, weight, order, ends, weights)
    columns = weight.shape[2]
    return x.new_empty(*weights.shape[:-1], columns), x.new_empty(x.shape[0], columns)


def reference(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    columns, top_k = weight.shape[2], weights.shape[-1]
    share = weights.reshape(-1)[order.long()].to(torch.float32)[:, None]
    parts = torch.split(x.to(torch.float32), counts_of(ends, len(x)))
    plain = torch.cat([part @ of_expert.to(torch.float32) for part, of_expert in zip(parts, weight, strict=True)])
    products = (plain * share).to(x.dtype)
    by_token = products[order.long().argsort()].view(x.shape[0] // top_k, top_k, columns)
    return (by_token.to(torch.float32).sum(1).to(x.dtype).view(*weights.shape[:-1], columns),)


def eager(x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor) -> Any:
    """A loop over experts that multiplies, weighs and adds to the tokens; the host waits for the counts."""
    out = x.new_zeros(weights.numel() // weights.shape[-1], weight.shape[2])
    counts = counts_of(ends, len(x))
    for part, of_expert, assignments in zip(
        torch.split(x, counts), weight, torch.split(order.long(), counts), strict=True
    ):
        share = weights.reshape(-1)[assignments].to(x.dtype)
        out = out.index_add(0, assignments // weights.shape[-1], part @ of_expert * share[:, None])
    return out.view(*weights.shape[:-1], weight.shape[2])


def cost(dtype: str, tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> Cost:
    """Flops and bytes for ``tokens`` with ``top_k`` experts each, weighted by float32.

    Every operand once: x, the weights of the experts that can have rows, order, ends and shares read, ``out`` written.
    Scratch, written and read once between the two launches, is not compulsory and not counted.
    """
    rows = tokens * top_k
    elements = rows * intermediate + min(rows, experts) * hidden * intermediate + tokens * hidden
    flops = rows * hidden * (2 * intermediate + 2) - tokens * hidden
    return Cost(flops, elements * DTYPE_BYTES[dtype] + 8 * rows + 4 * experts)


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
    weights, order, ends = sorted_by_expert(random, tokens, experts, top_k)
    weight = random(experts, intermediate, hidden) * max(intermediate, 1) ** -0.5
    x = random(tokens * top_k, intermediate)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "order": order, "ends": ends, "weights": weights}


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph weighs the rows of a ``torch._grouped_mm``, puts them back in order and sums those of a token.

    Shares are gathered by the ``order`` that the rows have, which comes from a sort; rows are put back by its inverse.
    """
    walk = Walk(graph)
    found = []
    for out in walk.results("sum", *_CAST_NAMES):
        if len(out.shape) == 2 and out.dtype in map(dtype_name, FLOATS):
            for summed in walk.find(call("sum", any_tensor("rows"), literal("dims")), out):
                rows, dims = summed["rows"], summed.literals["dims"]
                if len(rows.shape) == 3 and dims in ([1], [-2]) and (rows.shape[0], rows.shape[2]) == out.shape:
                    found += [_match(walk, *parts, out) for parts in _weighted(walk, rows, out)]
    return tuple(match for match in found if match is not None)


def _weighted(walk: Walk, rows: Tensor, out: Tensor) -> Iterator[tuple[GroupedProduct, Tensor, Tensor]]:
    """``(product, order, weights)`` whose rows, by assignment, are ``rows`` ``[tokens, top_k, hidden]``."""
    tokens, top_k, hidden = rows.shape
    flat = reshaped(rows, (tokens * top_k, hidden))
    source = None if flat is None else gathered(walk, flat)
    order = None if source is None else inverted(walk, source[1])
    if source is None or order is None:
        return
    for found in walk.find(call("mul", any_tensor("product"), any_tensor("share")), source[0]):
        product = grouped_product(walk, walk.uncast(found["product"], out.dtype))
        share = reshaped(found["share"], (tokens * top_k,))
        shares = None if share is None or found["share"].shape[-1] != 1 else gathered(walk, share)
        if product is None or shares is None or shares[1].name != order.name:
            continue
        weights = reshaped(shares[0], (tokens, top_k))
        if weights is not None and is_row_major(weights) and weights.dtype in map(dtype_name, FLOATS):
            yield product, order, weights


def _match(walk: Walk, product: GroupedProduct, order: Tensor, weights: Tensor, out: Tensor) -> Match | None:
    x, weight, ends = product.x, product.weight, product.ends
    if (len(x.shape), len(weight.shape)) != (2, 3) or not is_row_major(x) or x.dtype != out.dtype:
        return None
    experts, depth, columns = weight.shape
    rows, (tokens, top_k) = order.shape[0], weights.shape
    shapes = ((rows, depth), (experts,), (tokens, columns), tokens * top_k)
    if (x.shape, ends.shape, out.shape, rows) != shapes:
        return None
    arguments = {"x": x, "weight": weight, "order": order, "ends": ends, "weights": weights}
    return walk.match(NAME, arguments, (out,), cost(out.dtype, tokens, experts, top_k, columns, depth))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight and weights. A row's product with its gradient is the gradient of its share."""
    x, weight, order, ends, weights = ctx.saved_tensors
    of_x, of_weight, _, _, of_weights = ctx.needs_input_grad
    rows = matrix_of(gradient)[tokens_of(order, weights.shape[-1])]
    share = weights.reshape(-1)[order.long()].to(torch.float32)[:, None]
    x_gradient = weight_gradient = weights_gradient = None
    if of_x or of_weights:
        unweighted = GROUPED_LINEAR(rows, weight.transpose(1, 2), ends).to(torch.float32)
        x_gradient = (unweighted * share).to(x.dtype)
        shares = (unweighted * x).sum(-1).to(weights.dtype)
        weights_gradient = torch.empty_like(shares).index_copy(0, order.long(), shares).view(weights.shape)
    if of_weight:
        weight_gradient = WEIGHT_GRADIENT((x * share).to(x.dtype), rows, ends)
    return x_gradient, weight_gradient, None, None, weights_gradient


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
    scratch=("products",),
)
KERNEL.operator.register_autograd(_backward, setup_context=_keep)
