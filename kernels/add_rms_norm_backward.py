"""Gradients of residual addition and RMS normalisation, in one pass over memory.

    scale = rsqrt(mean(hidden ** 2) + epsilon)
    weighted = out_gradient * weight
    gradient = scale * weighted - hidden * scale ** 3 * mean(hidden * weighted) + hidden_gradient
    weight_gradient = sum over rows of out_gradient * hidden * scale

``hidden`` is what ``add_rms_norm`` wrote and ``gradient`` is that of both addends. ``scale`` is computed again: the row
is read anyway. All arithmetic is in float32 and each result is rounded once. Sums over rows are done in a fixed order:
every program writes those of its rows to ``partials``, which a second launch adds up; the same inputs give the same
bits.
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

NAME = "add_rms_norm_backward"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _gradient(
    hidden: tl.tensor,
    weighted: tl.tensor,
    scale: tl.tensor,
    mean: tl.tensor,
    hidden_gradient_pointer: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """The gradient of the sum; ``mean`` is that of ``hidden * weighted``."""
    gradient = scale * (weighted - hidden * (scale * scale * mean))
    if hidden_gradient_pointer is not None:
        gradient += loaded(hidden_gradient_pointer, place, inside)
    return gradient


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_rms_norm_backward_kernel(
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
    partials_pointer += program * width
    if columns <= block:
        inside = lane < columns
        weight = loaded(weight_pointer, lane, inside)
        partial = tl.zeros([block], dtype=tl.float32)
        for row in range(program, rows, tl.num_programs(0)):
            place = row * width + lane
            hidden = loaded(hidden_pointer, place, inside)
            out_gradient = loaded(out_gradient_pointer, place, inside)
            scale = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / columns + epsilon)
            weighted = out_gradient * weight
            mean = tl.sum(hidden * weighted, axis=0) / columns
            gradient = _gradient(hidden, weighted, scale, mean, hidden_gradient_pointer, place, inside)
            tl.store(gradient_pointer + place, gradient.to(gradient_pointer.dtype.element_ty), mask=inside)
            partial += out_gradient * hidden * scale
        tl.store(partials_pointer + lane, partial, mask=inside)
    else:
        for row in range(program, rows, tl.num_programs(0)):
            first_place = row * width + lane
            squares = tl.zeros([block], dtype=tl.float32)
            products = tl.zeros([block], dtype=tl.float32)
            for first in range(0, columns, block):
                inside = first + lane < columns
                hidden = loaded(hidden_pointer, first_place + first, inside)
                weight = loaded(weight_pointer, first + lane, inside)
                squares += hidden * hidden
                products += hidden * (loaded(out_gradient_pointer, first_place + first, inside) * weight)
            scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + epsilon)
            mean = tl.sum(products, axis=0) / columns
            for first in range(0, columns, block):
                inside = first + lane < columns
                place = first_place + first
                hidden = loaded(hidden_pointer, place, inside)
                out_gradient = loaded(out_gradient_pointer, place, inside)
                weighted = out_gradient * loaded(weight_pointer, first + lane, inside)
                gradient = _gradient(hidden, weighted, scale, mean, hidden_gradient_pointer, place, inside)
                tl.store(gradient_pointer + place, gradient.to(gradient_pointer.dtype.element_ty), mask=inside)
                partial = tl.load(partials_pointer + first + lane, mask=inside & (row != program), other=0.0)
                tl.store(partials_pointer + first + lane, partial + out_gradient * hidden * scale, mask=inside)
            tl.debug_barrier()  # the next row may read, in one thread, partials that another stored in this one


def launch(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    gradient: torch.Tensor,
    weight_gradient: torch.Tensor,
    partials: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gradients of both addends, which are the same, and of the weight, on the current stream.

    Args:
        out_gradient: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        hidden_gradient: as ``out_gradient``: what reaches the sum by other ways; none if nothing else reads the sum.
        hidden: as ``out_gradient``: the sum.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: as in the forward pass.
        gradient: as ``out_gradient``; written, as are the next two. None shares memory with any other argument.
        weight_gradient: as ``weight``.
        partials: scratch, float32 ``[programs, columns]``: one program for each row, but not more than 264.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(out_gradient, hidden_gradient, hidden, weight)
    check_tensor(NAME, "gradient", gradient, hidden.shape, hidden.dtype, hidden.device)
    check_tensor(NAME, "weight_gradient", weight_gradient, weight.shape, weight.dtype, hidden.device)
    check_tensor(NAME, "partials", partials, partial_shape(hidden), torch.float32, hidden.device)
    written = {"gradient": gradient, "weight_gradient": weight_gradient, "partials": partials}
    read = {"out_gradient": out_gradient, "hidden": hidden, "weight": weight}
    check_apart(NAME, written, read if hidden_gradient is None else {**read, "hidden_gradient": hidden_gradient})
    check_device(NAME, add_rms_norm_backward_kernel, hidden)
    if hidden.numel() == 0:
        weight_gradient.zero_()  # a sum over no row
        return
    programs, columns = partials.shape
    config = config or CONFIGS.choose(hidden.device, hidden.dtype, columns=columns)
    with torch.accelerator.device_index(hidden.device.index):
        add_rms_norm_backward_kernel[(programs,)](
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
        add_up(partials, weight_gradient)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(gradient, weight_gradient, partials)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(out_gradient, hidden_gradient, hidden, weight)
    return (
        torch.empty_like(hidden),
        torch.empty_like(weight),
        hidden.new_empty(partial_shape(hidden), dtype=torch.float32),
    )


def reference(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(gradient, weight_gradient)`` by plain PyTorch on any device, with the kernel's roundings."""
    wide, incoming = hidden.to(torch.float32), out_gradient.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    weighted = incoming * weight.to(torch.float32)
    gradient = scale * (weighted - wide * (scale.square() * (wide * weighted).mean(-1, keepdim=True)))
    if hidden_gradient is not None:
        gradient = gradient + hidden_gradient.to(torch.float32)
    columns = hidden.shape[-1]
    products = (incoming * wide * scale).reshape(hidden.numel() // columns if columns else 0, columns)
    return gradient.to(hidden.dtype), products.sum(0).to(weight.dtype)


def eager(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> Any:
    """What PyTorch decomposes the backward pass to, then the addition of the two gradients of the sum."""
    wide, incoming = hidden.to(torch.float32), out_gradient.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normalized = wide * scale
    weighted = incoming * weight
    gradient = (scale * (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True))).to(hidden.dtype)
    weight_gradient = (incoming * normalized).flatten(0, -2).sum(0).to(weight.dtype)
    return gradient if hidden_gradient is None else gradient + hidden_gradient, weight_gradient


def cost(dtype: str, rows: int, columns: int, weight_dtype: str | None = None, *, hidden_gradient: bool = True) -> Cost:
    """Flops and bytes of one launch over ``rows`` x ``columns`` elements.

    Bytes are compulsory: two or three matrices and the weight read, one matrix and the weight's gradient written, each
    once. Partial sums are not counted: they are few and stay in cache.
    """
    matrix = rows * columns * DTYPE_BYTES[dtype]
    # An element: five for both sums over its row (the last addition stands for the mean's division), three for the
    # sum's gradient and one more where another comes in, two and an addition to the row before for the weight's. A
    # row: epsilon, rsqrt, and two products.
    flops = rows * ((10 + hidden_gradient) * columns + 4) + max(rows - 1, 0) * columns
    return Cost(flops, (3 + hidden_gradient) * matrix + 2 * columns * DTYPE_BYTES[weight_dtype or dtype])


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
    """Where a graph computes both gradients by the formula, as `eager` and ATen's decomposition say it.

    A backward pass that is given ``scale`` instead of computing it has lost epsilon, and is not matched; training gets
    here through ``add_rms_norm``'s own gradient.
    """
    return gradient_matches(graph, NAME, "rms", cost)


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
        Workload("Llama-3 8B, 4096 tokens", {"rows": 4096, "columns": 4096}),
        Workload("Llama-3 70B, 8192 tokens", {"rows": 8192, "columns": 8192}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("partials",),
)
