"""Gradients of residual addition and layer normalisation, in one pass over memory.

    normalized = (hidden - mean(hidden)) * scale,  scale = rsqrt(variance(hidden) + epsilon)
    weighted = out_gradient * weight
    gradient = scale * (weighted - mean(weighted) - normalized * mean(normalized * weighted)) + hidden_gradient
    weight_gradient = sum over rows of out_gradient * normalized
    bias_gradient = sum over rows of out_gradient

``hidden`` is what ``add_layer_norm`` wrote and ``gradient`` is that of both addends. Mean and scale are computed again:
the row is read anyway. All arithmetic is in float32 and each result is rounded once. Sums over rows are done in a fixed
order: every program writes those of its rows to ``partials``, which a second launch adds up; the same inputs give the
same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match
from ._norm_gradients import gradient_matches
from ._rows import add_up, loaded, partial_shape

__all__ = ["KERNEL"]

NAME = "add_layer_norm_backward"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_layer_norm_backward_kernel(
    out_gradient_pointer: tl.tensor,
    hidden_gradient_pointer: tl.tensor,
    hidden_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    gradient_pointer: tl.tensor,
    partials_pointer: tl.tensor,
    rows: tl.tensor,
    epsilon: tl.tensor,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Every row whose number is the program's, modulo the grid; sums over these rows go to the program's partials."""
    program, lane = tl.program_id(0), tl.arange(0, block)
    width = tl.full([], columns, dtype=tl.int64)
    weight_sums = partials_pointer + program * width
    bias_sums = weight_sums + tl.num_programs(0) * width
    inside = lane < columns
    weight = loaded(weight_pointer, lane, inside)
    weight_sum = tl.zeros([block], dtype=tl.float32)
    bias_sum = tl.zeros([block], dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = row * width + lane
        hidden = loaded(hidden_pointer, place, inside)
        out_gradient = loaded(out_gradient_pointer, place, inside)
        centered = tl.where(inside, hidden - tl.sum(hidden, axis=0) / columns, 0.0)
        scale = tl.rsqrt(tl.sum(centered * centered, axis=0) / columns + epsilon)
        normalized, weighted = centered * scale, out_gradient * weight
        mean = tl.sum(weighted, axis=0) / columns
        gradient = scale * (weighted - mean - normalized * (tl.sum(normalized * weighted, axis=0) / columns))
        if hidden_gradient_pointer is not None:
            gradient += loaded(hidden_gradient_pointer, place, inside)
        tl.store(gradient_pointer + place, gradient.to(gradient_pointer.dtype.element_ty), mask=inside)
        weight_sum += out_gradient * normalized
        bias_sum += out_gradient
    tl.store(weight_sums + lane, weight_sum, mask=inside)
    tl.store(bias_sums + lane, bias_sum, mask=inside)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_layer_norm_backward_wide_kernel(
    out_gradient_pointer: tl.tensor,
    hidden_gradient_pointer: tl.tensor,
    hidden_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    gradient_pointer: tl.tensor,
    partials_pointer: tl.tensor,
    rows: tl.tensor,
    epsilon: tl.tensor,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Every row whose number is the program's, modulo the grid; sums over these rows go to the program's partials.

    Each row is walked three times, block by block, and so are the partials.
    """
    program, lane = tl.program_id(0), tl.arange(0, block)
    width = tl.full([], columns, dtype=tl.int64)
    weight_sums = partials_pointer + program * width
    bias_sums = weight_sums + tl.num_programs(0) * width
    for row in range(program, rows, tl.num_programs(0)):
        row_place = row * width + lane
        sums = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            sums += loaded(hidden_pointer, row_place + first, first + lane < columns)
        center = tl.sum(sums, axis=0) / columns
        squares = tl.zeros([block], dtype=tl.float32)
        sums = tl.zeros([block], dtype=tl.float32)
        products = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            inside = first + lane < columns
            centered = tl.where(inside, loaded(hidden_pointer, row_place + first, inside) - center, 0.0)
            weight = loaded(weight_pointer, first + lane, inside)
            weighted = loaded(out_gradient_pointer, row_place + first, inside) * weight
            squares += centered * centered
            sums += weighted
            products += centered * weighted
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + epsilon)
        mean, slope = tl.sum(sums, axis=0) / columns, tl.sum(products, axis=0) / columns * scale
        for first in range(0, columns, block):
            column, place = first + lane, row_place + first
            inside = column < columns
            normalized = (loaded(hidden_pointer, place, inside) - center) * scale
            out_gradient = loaded(out_gradient_pointer, place, inside)
            weighted = out_gradient * loaded(weight_pointer, column, inside)
            gradient = scale * (weighted - mean - normalized * slope)
            if hidden_gradient_pointer is not None:
                gradient += loaded(hidden_gradient_pointer, place, inside)
            tl.store(gradient_pointer + place, gradient.to(gradient_pointer.dtype.element_ty), mask=inside)
            begun = inside & (row != program)
            weight_sum = tl.load(weight_sums + column, mask=begun, other=0.0) + out_gradient * normalized
            tl.store(weight_sums + column, weight_sum, mask=inside)
            bias_sum = tl.load(bias_sums + column, mask=begun, other=0.0) + out_gradient
            tl.store(bias_sums + column, bias_sum, mask=inside)
        tl.debug_barrier()  # the next row may read, in one thread, sums that another stored in this one


def launch(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    gradient: torch.Tensor,
    weight_gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    partials: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gradients of both addends, which are the same, of the weight and of the bias, on the current stream.

    Args:
        out_gradient: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        hidden_gradient: as ``out_gradient``: what reaches the sum by other ways; none if nothing else reads the sum.
        hidden: as ``out_gradient``: the sum.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: as in the forward pass.
        gradient: as ``out_gradient``; written, as are the next three. None shares memory with any other argument.
        weight_gradient: as ``weight``.
        bias_gradient: as ``weight``.
        partials: scratch, float32 ``[2, programs, columns]``: one program for each row, but not more than 264.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(out_gradient, hidden_gradient, hidden, weight)
    check_tensor(NAME, "gradient", gradient, hidden.shape, hidden.dtype, hidden.device)
    check_tensor(NAME, "weight_gradient", weight_gradient, weight.shape, weight.dtype, hidden.device)
    check_tensor(NAME, "bias_gradient", bias_gradient, weight.shape, weight.dtype, hidden.device)
    check_tensor(NAME, "partials", partials, (2, *partial_shape(hidden)), torch.float32, hidden.device)
    written = {"gradient": gradient, "weight_gradient": weight_gradient, "bias_gradient": bias_gradient}
    read = {"out_gradient": out_gradient, "hidden": hidden, "weight": weight}
    check_apart(
        NAME,
        {**written, "partials": partials},
        read if hidden_gradient is None else {**read, "hidden_gradient": hidden_gradient},
    )
    check_device(NAME, add_layer_norm_backward_kernel, hidden)
    if hidden.numel() == 0:
        weight_gradient.zero_()  # sums over no row
        bias_gradient.zero_()
        return
    _, programs, columns = partials.shape
    config = config or CONFIGS.choose(hidden.device, hidden.dtype, columns=columns)
    with torch.accelerator.device_index(hidden.device.index):
        narrow = columns <= config.constants["block"]
        function = add_layer_norm_backward_kernel if narrow else add_layer_norm_backward_wide_kernel
        function[(programs,)](
            out_gradient,
            hidden_gradient,
            hidden,
            weight,
            gradient,
            partials,
            hidden.numel() // columns,
            epsilon,
            columns=columns,
            **config.options,
        )
        add_up(partials, weight_gradient, bias_gradient)


def _check(
    out_gradient: torch.Tensor, hidden_gradient: torch.Tensor | None, hidden: torch.Tensor, weight: torch.Tensor
) -> None:
    check_tensor(NAME, "hidden", hidden, (*[None] * max(hidden.dim(), 1),), FLOATS, hidden.device)
    check_tensor(NAME, "out_gradient", out_gradient, hidden.shape, hidden.dtype, hidden.device)
    if hidden_gradient is not None:
        check_tensor(NAME, "hidden_gradient", hidden_gradient, hidden.shape, hidden.dtype, hidden.device)
    check_tensor(NAME, "weight", weight, hidden.shape[-1:], FLOATS, hidden.device)


def allocate(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, ...]:
    """New ``(gradient, weight_gradient, bias_gradient, partials)``, not filled. Raises ExecutionError as ``launch``."""
    _check(out_gradient, hidden_gradient, hidden, weight)
    partials = hidden.new_empty((2, *partial_shape(hidden)), dtype=torch.float32)
    return torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(weight), partials


def reference(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(gradient, weight_gradient, bias_gradient)`` by plain PyTorch on any device, with the kernel's roundings."""
    wide, incoming = hidden.to(torch.float32), out_gradient.to(torch.float32)
    centered = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + epsilon)
    normalized, weighted = centered * scale, incoming * weight.to(torch.float32)
    slope = (normalized * weighted).mean(-1, keepdim=True)
    gradient = scale * (weighted - weighted.mean(-1, keepdim=True) - normalized * slope)
    if hidden_gradient is not None:
        gradient = gradient + hidden_gradient.to(torch.float32)
    columns = hidden.shape[-1]
    rows = hidden.numel() // columns if columns else 0
    sums = ((incoming * normalized).reshape(rows, columns).sum(0), incoming.reshape(rows, columns).sum(0))
    return gradient.to(hidden.dtype), sums[0].to(weight.dtype), sums[1].to(weight.dtype)


def eager(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> Any:
    """PyTorch's backward pass, then the addition of both gradients of the sum.

    Mean and scale, which its forward pass would have kept, are computed again, as the kernel does.
    """
    shape = hidden.shape[-1:]
    _, mean, scale = torch.native_layer_norm(hidden, shape, weight, weight, epsilon)
    gradient, weight_gradient, bias_gradient = torch.ops.aten.native_layer_norm_backward(
        out_gradient, hidden, shape, mean, scale, weight, weight, [True, True, True]
    )
    return gradient if hidden_gradient is None else gradient + hidden_gradient, weight_gradient, bias_gradient


def cost(dtype: str, rows: int, columns: int, weight_dtype: str | None = None, *, hidden_gradient: bool = True) -> Cost:
    """Flops and bytes of one launch over ``rows`` x ``columns`` elements.

    Bytes are compulsory: two or three matrices and the weight read, one matrix and two vectors written, each once.
    Partial sums are not counted: they are few and stay in cache.
    """
    matrix = rows * columns * DTYPE_BYTES[dtype]
    # An element: nine for four sums over its row (the last addition stands for the mean's division), four for the sum's
    # gradient and one more where another comes in, one for the weight's, and two additions to the row before. A row:
    # epsilon and rsqrt.
    flops = rows * ((14 + hidden_gradient) * columns + 2) + 2 * max(rows - 1, 0) * columns
    return Cost(flops, (3 + hidden_gradient) * matrix + 3 * columns * DTYPE_BYTES[weight_dtype or dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    columns: int,
    weight_dtype: str | None = None,
    hidden_gradient: bool = True,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    weight = (1 + random(columns) / 8).to(getattr(torch, weight_dtype) if weight_dtype else dtype)
    return {
        "out_gradient": random(rows, columns).to(dtype),
        "hidden_gradient": random(rows, columns).to(dtype) if hidden_gradient else None,
        "hidden": random(rows, columns).to(dtype),
        "weight": weight,
        "epsilon": 1e-5,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph computes all three gradients: by ATen's ``native_layer_norm_backward``, or what it decomposes to.

    Mean and scale come from ``native_layer_norm`` or from ``var_mean``. A backward pass that is given them has lost
    epsilon, and is not matched; training gets here through ``add_layer_norm``'s own gradient.
    """
    return gradient_matches(graph, NAME, "layer", cost)


KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=(
        Workload("GPT-2 XL, 8192 tokens", {"rows": 8192, "columns": 1600}),
        Workload("OPT 6.7B, 4096 tokens", {"rows": 4096, "columns": 4096}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("partials",),
)
