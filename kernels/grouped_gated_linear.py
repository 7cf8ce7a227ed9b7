"""The first half of a mixture of experts: for every token its experts' gated product, in one grouped matrix product.

    out[row] = activation(x[token] @ gate_weight[expert]) * (x[token] @ up_weight[expert])

where the rows are the assignments of tokens to experts sorted by expert (see `_experts`): ``token`` is
``order[row] // top_k``. This is the gated linear unit of Shazeer (arXiv 2002.05202) with the experts of Mixtral (arXiv
2401.04088); that experts need not get equally many rows, or pad them, is from MegaBlocks (arXiv 2211.15841). Products
are summed in float32, activation and product are computed in float32, and ``out`` is rounded once.

How many rows an expert has is known to the device only. So the grid has as many programs as tiles there can be; each
finds its tile by ``ends``, or that it has none.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._activations import ACTIVATIONS, activated
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._expert_patterns import GroupedProduct, gathered, grouped_product, tokens
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
from ._match import Cost, Match, Walk, any_tensor, call, is_row_major
from ._patterns import activations
from .gated_activation_backward import GATES
from .gated_activation_backward import KERNEL as GATED_ACTIVATION_BACKWARD
from .grouped_linear import KERNEL as GROUPED_LINEAR
from .grouped_linear_scatter import KERNEL as GROUPED_LINEAR_SCATTER
from .grouped_linear_weight_gradient import KERNEL as GROUPED_LINEAR_WEIGHT_GRADIENT

__all__ = ["KERNEL"]

NAME = "grouped_gated_linear"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def grouped_gated_linear_kernel(
    x_pointer: tl.tensor,
    gate_pointer: tl.tensor,
    up_pointer: tl.tensor,
    order_pointer: tl.tensor,
    ends_pointer: tl.tensor,
    out_pointer: tl.tensor,
    gate_stride_expert: tl.tensor,
    gate_stride_k: tl.tensor,
    gate_stride_n: tl.tensor,
    up_stride_expert: tl.tensor,
    up_stride_k: tl.tensor,
    up_stride_n: tl.tensor,
    top_k: tl.constexpr,
    experts: tl.constexpr,
    depth: tl.constexpr,
    columns: tl.constexpr,
    activation: tl.constexpr,
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
    has_row = (row < last)[:, None]
    has_column = (column < columns)[None, :]
    token = tl.load(order_pointer + row, mask=row < last, other=0) // top_k
    lane = tl.arange(0, block_k)
    wide_lane, wide_column = lane.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    x_pointers = x_pointer + token.to(tl.int64)[:, None] * depth + lane[None, :]
    gate_pointers = gate_pointer + expert * gate_stride_expert + wide_lane * gate_stride_k + wide_column * gate_stride_n
    up_pointers = up_pointer + expert * up_stride_expert + wide_lane * up_stride_k + wide_column * up_stride_n
    gate_step = tl.full([], block_k, tl.int64) * gate_stride_k
    up_step = tl.full([], block_k, tl.int64) * up_stride_k
    gate = tl.zeros([block_m, block_n], dtype=tl.float32)
    up = tl.zeros([block_m, block_n], dtype=tl.float32)
    for first in range(0, depth, block_k):
        has_depth = lane < depth - first
        x = tl.load(x_pointers, mask=has_row & has_depth[None, :], other=0.0)
        gate_weight = tl.load(gate_pointers, mask=has_depth[:, None] & has_column, other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up_weight = tl.load(up_pointers, mask=has_depth[:, None] & has_column, other=0.0)
        up = tl.dot(x, up_weight, up, input_precision="ieee")
        x_pointers += block_k
        gate_pointers += gate_step
        up_pointers += up_step
    product = activated(gate, activation) * up
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_pointer + at, product.to(out_pointer.dtype.element_ty), mask=has_row & has_column)


def launch(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    activation: str,
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gated products of all assignments into ``out``, sorted by expert, on the current stream.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        gate_weight: ``[experts, hidden, intermediate]`` of the same dtype, with any strides.
        up_weight: as ``gate_weight``, with strides of its own.
        order: ``[tokens * top_k]`` of int32 or int64, a permutation, as `expert_routing` makes it.
        ends: ``[experts]`` of int32, where each expert's rows end; not decreasing, the last is ``tokens * top_k``.
        top_k: experts of a token.
        activation: of the gate, ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        out: ``[tokens * top_k, intermediate]``, as ``x``; written, shares no memory with any other argument.
        config: how to launch; chosen by the rows that an expert has on average if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    rows = _check(x, gate_weight, up_weight, order, ends, top_k, activation)
    experts, depth, columns = gate_weight.shape
    check_tensor(NAME, "out", out, (rows, columns), x.dtype, x.device)
    read = {"x": x, "gate_weight": gate_weight, "up_weight": up_weight, "order": order, "ends": ends}
    check_apart(NAME, {"out": out}, read)
    check_device(NAME, grouped_gated_linear_kernel, x)
    if out.numel() == 0:
        return
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, experts, gate_weight, up_weight))
    block_m, block_n = config.constants["block_m"], config.constants["block_n"]
    with torch.accelerator.device_index(x.device.index):
        grouped_gated_linear_kernel[(count_tiles(rows, experts, columns, block_m, block_n),)](
            x, gate_weight, up_weight, order, ends, out, *gate_weight.stride(), *up_weight.stride(), top_k=top_k,
            experts=experts, depth=depth, columns=columns, activation=activation,
            block_experts=triton.next_power_of_2(experts), **config.options,
        )  # fmt: skip


def _check(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    activation: str,
) -> int:
    """The number of rows. Raises ExecutionError for what cannot be computed."""
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    hidden = x.shape[-1]
    check_tensor(NAME, "gate_weight", gate_weight, (None, hidden, None), x.dtype, x.device, row_major=False)
    check_tensor(NAME, "up_weight", up_weight, gate_weight.shape, x.dtype, x.device, row_major=False)
    if top_k < 1:
        raise fail(NAME, f"needs top_k from 1; got {top_k}")
    if activation not in GATES:
        raise fail(NAME, f"needs an activation of {', '.join(GATES)}; got {activation!r}")
    rows = x.shape[:-1].numel() * top_k
    check_tensor(NAME, "order", order, (rows,), INDICES, x.device)
    check_ends(NAME, ends, gate_weight.shape[0], rows, x.device)
    return rows


def allocate(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    activation: str,
) -> tuple[torch.Tensor]:
    """New ``(out,)``, not filled. Raises ExecutionError as ``launch`` does."""
    rows = _check(x, gate_weight, up_weight, order, ends, top_k, activation)
    return (x.new_empty(rows, gate_weight.shape[2]),)


def reference(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    activation: str,
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    wide = matrix_of(x)[tokens_of(order, top_k)].to(torch.float32)
    products = []
    for part, *weights in zip(torch.split(wide, counts_of(ends, len(wide))), gate_weight, up_weight, strict=True):
        gate, up = (part @ weight.to(torch.float32) for weight in weights)
        products.append((ACTIVATIONS[activation](gate) * up).to(x.dtype))
    return (torch.cat(products),)


def eager(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    activation: str,
) -> Any:
    """A loop over experts that gathers, multiplies and concatenates; the host waits for the counts."""
    rows = matrix_of(x)[tokens_of(order, top_k)]
    counts = counts_of(ends, len(rows))
    products = [
        ACTIVATIONS[activation](part @ gate) * (part @ up)
        for part, gate, up in zip(torch.split(rows, counts), gate_weight, up_weight, strict=True)
    ]
    return torch.cat(products)


def cost(dtype: str, tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> Cost:
    """Flops and bytes for ``tokens`` with ``top_k`` experts each.

    Every operand once: x, the weights of the experts that can have rows, order and ends read, ``out`` written.
    Activation and product count as two flops an element.
    """
    rows = tokens * top_k
    elements = tokens * hidden + 2 * min(rows, experts) * hidden * intermediate + rows * intermediate
    flops = rows * intermediate * (4 * hidden + 2)
    return Cost(flops, elements * DTYPE_BYTES[dtype] + 4 * (rows + experts))


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
    activation: str = "silu",
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    _, order, ends = sorted_by_expert(random, tokens, experts, top_k)
    scale = max(hidden, 1) ** -0.5
    return {
        "x": random(tokens, hidden).to(dtype),
        "gate_weight": (random(experts, hidden, intermediate) * scale).to(dtype),
        "up_weight": (random(experts, hidden, intermediate) * scale).to(dtype),
        "order": order,
        "ends": ends,
        "top_k": top_k,
        "activation": activation,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph multiplies an activated ``torch._grouped_mm`` by another, of rows ``x[order // top_k]``.

    Both may be halves of one product. ``order`` has to come from a sort, so that it is certain to be a permutation.
    """
    walk = Walk(graph)
    found = []
    for out in walk.results("mul"):
        if len(out.shape) != 2 or out.dtype not in map(dtype_name, FLOATS):
            continue
        for factors in walk.find(call("mul", any_tensor("gate"), any_tensor("up")), out):
            up = grouped_product(walk, walk.uncast(factors["up"], out.dtype))
            if up is None:
                continue
            for activation, inner in activations(walk, factors["gate"], *GATES):
                gate = grouped_product(walk, walk.uncast(inner, out.dtype))
                if gate is not None and (gate.x, gate.ends) == (up.x, up.ends):
                    found.append(_match(walk, gate, up, activation, out))
    return tuple(match for match in found if match is not None)


def _match(walk: Walk, gate: GroupedProduct, up: GroupedProduct, activation: str, out: Tensor) -> Match | None:
    source = gathered(walk, gate.x)
    index = None if source is None else tokens(walk, source[1])
    if source is None or index is None:
        return None
    x, (order, top_k) = source[0], index
    if len(x.shape) != 2 or len(gate.weight.shape) != 3 or not is_row_major(x):
        return None
    (tokens_of_x, hidden), (experts, depth, columns) = x.shape, gate.weight.shape
    shapes = ((experts, hidden, columns), (experts,), (tokens_of_x * top_k,), (tokens_of_x * top_k, columns))
    if (up.weight.shape, gate.ends.shape, order.shape, out.shape) != shapes or depth != hidden or x.dtype != out.dtype:
        return None
    arguments = {"x": x, "gate_weight": gate.weight, "up_weight": up.weight, "order": order, "ends": gate.ends}
    launch_cost = cost(out.dtype, tokens_of_x, experts, top_k, hidden, columns)
    return walk.match(NAME, {**arguments, "top_k": top_k, "activation": activation}, (out,), launch_cost)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, gate_weight, up_weight, order, ends, ctx.top_k, ctx.activation = inputs
    ctx.save_for_backward(x, gate_weight, up_weight, order, ends)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x and both weights. Gate and up are computed once more: kept, they would take most of the memory."""
    x, gate_weight, up_weight, order, ends = ctx.saved_tensors
    rows = matrix_of(x)[tokens_of(order, ctx.top_k)]
    gate, up = (GROUPED_LINEAR(rows, weight, ends) for weight in (gate_weight, up_weight))
    gradients = GATED_ACTIVATION_BACKWARD(gate, up, gradient.contiguous(), ctx.activation, False)[:2]
    of_x, of_gate, of_up, *_ = ctx.needs_input_grad
    x_gradient = None
    if of_x:
        ones = torch.ones(*x.shape[:-1], ctx.top_k, device=x.device)
        parts = [
            GROUPED_LINEAR_SCATTER(part, weight.transpose(1, 2), order, ends, ones)
            for part, weight in zip(gradients, (gate_weight, up_weight), strict=True)
        ]
        x_gradient = parts[0] + parts[1]
    weight_gradients = (
        GROUPED_LINEAR_WEIGHT_GRADIENT(rows, part, ends) if needed else None
        for part, needed in zip(gradients, (of_gate, of_up), strict=True)
    )
    return x_gradient, *weight_gradients, None, None, None, None


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
