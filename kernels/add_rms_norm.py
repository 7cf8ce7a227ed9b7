"""Residual addition and RMS normalisation in one pass over memory.

    hidden = x + residual
    out = hidden * rsqrt(mean(hidden ** 2) + epsilon) * weight

with the mean over the last dimension: RMSNorm of Zhang and Sennrich (NeurIPS 2019) behind the residual addition of a
transformer block. ``hidden`` is rounded to the tensors' dtype before it is normalised, as it is when two operators do
it; all arithmetic is in float32 and ``out`` is rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from . import add_rms_norm_backward
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk
from ._patterns import norms, sums

__all__ = ["KERNEL"]

NAME = "add_rms_norm"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_rms_norm_kernel(
    x_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    hidden_pointer: tl.tensor,
    out_pointer: tl.tensor,
    epsilon: tl.tensor,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Normalise one row of row-major matrices; the grid is the number of rows."""
    row = tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, block)
    if columns <= block:
        inside = lane < columns
        x = tl.load(x_pointer + row + lane, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_pointer + row + lane, mask=inside, other=0.0).to(tl.float32)
        stored = (x + residual).to(hidden_pointer.dtype.element_ty)
        tl.store(hidden_pointer + row + lane, stored, mask=inside)
        hidden = stored.to(tl.float32)
        scale = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / columns + epsilon)
        weight = tl.load(weight_pointer + lane, mask=inside, other=0.0).to(tl.float32)
        normalized = hidden * scale * weight
        tl.store(out_pointer + row + lane, normalized.to(out_pointer.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            x = tl.load(x_pointer + row + column, mask=inside, other=0.0).to(tl.float32)
            residual = tl.load(residual_pointer + row + column, mask=inside, other=0.0).to(tl.float32)
            stored = (x + residual).to(hidden_pointer.dtype.element_ty)
            tl.store(hidden_pointer + row + column, stored, mask=inside)
            hidden = stored.to(tl.float32)
            squares += hidden * hidden
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + epsilon)
        tl.debug_barrier()  # the second walk may read, in one thread, what another stored in the first
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            hidden = tl.load(hidden_pointer + row + column, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
            normalized = hidden * scale * weight
            tl.store(out_pointer + row + column, normalized.to(out_pointer.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    hidden: torch.Tensor,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``x + residual`` into ``hidden`` and its normalisation into ``out``, on the current stream.

    Args:
        x: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        residual: as ``x``.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: added to the mean of squares.
        hidden: as ``x``; written, shares no memory with any other argument.
        out: as ``x``; written, shares no memory with any other argument.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, residual, weight)
    for name, tensor in {"hidden": hidden, "out": out}.items():
        check_tensor(NAME, name, tensor, x.shape, x.dtype, x.device)
    check_apart(NAME, {"hidden": hidden, "out": out}, {"x": x, "residual": residual, "weight": weight})
    check_device(NAME, add_rms_norm_kernel, x)
    if x.numel() == 0:
        return
    columns = x.shape[-1]
    config = config or CONFIGS.choose(x.device, x.dtype, columns=columns)
    with torch.accelerator.device_index(x.device.index):
        add_rms_norm_kernel[(x.numel() // columns,)](
            x, residual, weight, hidden, out, epsilon, columns=columns, **config.options
        )


def _check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "residual", residual, x.shape, x.dtype, x.device)
    check_tensor(NAME, "weight", weight, x.shape[-1:], FLOATS, x.device)


def allocate(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(hidden, out)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, residual, weight)
    return torch.empty_like(x), torch.empty_like(x)


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(hidden, out)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    hidden = x + residual
    wide = hidden.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return hidden, (wide * scale * weight.to(torch.float32)).to(x.dtype)


def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Any:
    """What a model says: an addition and a normalisation."""
    hidden = x + residual
    return hidden, torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)


def cost(dtype: str, rows: int, columns: int, weight_dtype: str | None = None) -> Cost:
    """Flops and bytes of one launch over ``rows`` x ``columns`` elements.

    Bytes are compulsory: two matrices and the weight read, two matrices written, each once. A row wider than every
    block is read once more, soon after it was written and so mostly from cache; that is not counted.
    """
    matrix = rows * columns * DTYPE_BYTES[dtype]
    flops = rows * (5 * columns + 2)  # add, square, sum (one less), two products; the row's mean, epsilon and rsqrt
    return Cost(flops, 4 * matrix + columns * DTYPE_BYTES[weight_dtype or dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    columns: int,
    weight_dtype: str | None = None,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    weight = (1 + random(columns) / 8).to(getattr(torch, weight_dtype) if weight_dtype else dtype)
    return {
        "x": random(rows, columns).to(dtype),
        "residual": random(rows, columns).to(dtype),
        "weight": weight,
        "epsilon": 1e-5,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds two tensors and normalises the sum.

    The addition is ``aten.add`` of equal shapes. Where a model rounds before it multiplies by the weight, as Llama
    does, the kernel rounds once less. The sum may have other readers: the kernel writes it.
    """
    walk = Walk(graph)
    found = []
    for out in walk.results("mul", "rms_norm", "_fused_rms_norm", "_to_copy", "to", "convert_element_type"):
        if out.dtype not in map(dtype_name, FLOATS) or not out.shape or out.name != out.buffer:
            continue
        for norm in norms(walk, out, "rms"):
            for x, residual, hidden in sums(walk, norm.x):
                operands = {"x": x, "residual": residual, "weight": norm.weight}
                if norm.weight.dtype != out.dtype:
                    continue
                launch_cost = cost(out.dtype, math.prod(out.shape[:-1]), out.shape[-1])
                match = walk.match(NAME, {**operands, "epsilon": norm.epsilon}, (hidden, out), launch_cost)
                if match is not None:
                    found.append(match)
    return tuple(found)


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
        Workload("Llama-3 8B, decoding 16 sequences", {"rows": 16, "columns": 4096}),
        Workload("Llama-3 8B, 4096 tokens", {"rows": 4096, "columns": 4096}),
        Workload("Llama-3 70B, 8192 tokens", {"rows": 8192, "columns": 8192}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, ctx.epsilon = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, hidden_gradient: torch.Tensor | None, out_gradient: torch.Tensor | None) -> tuple[Any, ...]:
    hidden, weight = ctx.saved_tensors
    if out_gradient is None:
        return hidden_gradient, hidden_gradient, None, None
    gradient, weight_gradient = add_rms_norm_backward.KERNEL(
        out_gradient.contiguous(),
        None if hidden_gradient is None else hidden_gradient.contiguous(),
        hidden,
        weight,
        ctx.epsilon,
    )
    return gradient, gradient, weight_gradient, None


KERNEL.operator.register_autograd(_backward, setup_context=_keep)
