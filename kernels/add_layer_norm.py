"""Residual addition and layer normalisation in one pass over memory.

    hidden = x + residual
    out = (hidden - mean(hidden)) * rsqrt(variance(hidden) + epsilon) * weight + bias

over the last dimension, the variance without Bessel's correction: layer normalisation of Ba, Kiros and Hinton (2016)
behind the residual addition of a transformer block. ``hidden`` is rounded to the tensors' dtype before it is
normalised, as it is when two operators do it; all arithmetic is in float32 and ``out`` is rounded once. The variance
is the mean of squared distances from the mean, which were formed after the mean was known: rows far from zero lose
no digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from . import add_layer_norm_backward
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk
from ._patterns import norms, sums
from ._rows import loaded

__all__ = ["KERNEL"]

NAME = "add_layer_norm"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_layer_norm_kernel(
    x_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    bias_pointer: tl.tensor,
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
        total = loaded(x_pointer, row + lane, inside) + loaded(residual_pointer, row + lane, inside)
        stored = total.to(hidden_pointer.dtype.element_ty)
        tl.store(hidden_pointer + row + lane, stored, mask=inside)
        hidden = stored.to(tl.float32)
        centered = tl.where(inside, hidden - tl.sum(hidden, axis=0) / columns, 0.0)
        scale = tl.rsqrt(tl.sum(centered * centered, axis=0) / columns + epsilon)
        normalized = centered * scale * loaded(weight_pointer, lane, inside) + loaded(bias_pointer, lane, inside)
        tl.store(out_pointer + row + lane, normalized.to(out_pointer.dtype.element_ty), mask=inside)
    else:
        sums = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            total = loaded(x_pointer, row + column, inside) + loaded(residual_pointer, row + column, inside)
            stored = total.to(hidden_pointer.dtype.element_ty)
            tl.store(hidden_pointer + row + column, stored, mask=inside)
            sums += stored.to(tl.float32)
        mean = tl.sum(sums, axis=0) / columns
        tl.debug_barrier()  # the next walks may read, in one thread, what another stored in the first
        squares = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            inside = first + lane < columns
            centered = tl.where(inside, loaded(hidden_pointer, row + first + lane, inside) - mean, 0.0)
            squares += centered * centered
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + epsilon)
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            centered = loaded(hidden_pointer, row + column, inside) - mean
            weight, bias = loaded(weight_pointer, column, inside), loaded(bias_pointer, column, inside)
            normalized = centered * scale * weight + bias
            tl.store(out_pointer + row + column, normalized.to(out_pointer.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
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
        bias: as ``weight``.
        epsilon: added to the variance.
        hidden: as ``x``; written, shares no memory with any other argument.
        out: as ``x``; written, shares no memory with any other argument.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, residual, weight, bias)
    for name, tensor in {"hidden": hidden, "out": out}.items():
        check_tensor(NAME, name, tensor, x.shape, x.dtype, x.device)
    read = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    check_apart(NAME, {"hidden": hidden, "out": out}, read)
    check_device(NAME, add_layer_norm_kernel, x)
    if x.numel() == 0:
        return
    columns = x.shape[-1]
    config = config or CONFIGS.choose(x.device, x.dtype, columns=columns)
    with torch.accelerator.device_index(x.device.index):
        add_layer_norm_kernel[(x.numel() // columns,)](
            x, residual, weight, bias, hidden, out, epsilon, columns=columns, **config.options
        )


def _check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "residual", residual, x.shape, x.dtype, x.device)
    check_tensor(NAME, "weight", weight, x.shape[-1:], FLOATS, x.device)
    check_tensor(NAME, "bias", bias, x.shape[-1:], weight.dtype, x.device)


def allocate(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(hidden, out)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, residual, weight, bias)
    return torch.empty_like(x), torch.empty_like(x)


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(hidden, out)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    hidden = x + residual
    wide = hidden.to(torch.float32)
    centered = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + epsilon)
    return hidden, (centered * scale * weight.to(torch.float32) + bias.to(torch.float32)).to(x.dtype)


def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> Any:
    """What a model says: an addition and a normalisation."""
    hidden = x + residual
    return hidden, torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, epsilon)


def cost(dtype: str, rows: int, columns: int, weight_dtype: str | None = None) -> Cost:
    """Flops and bytes of one launch over ``rows`` x ``columns`` elements.

    Bytes are compulsory: two matrices, weight and bias read, two matrices written, each once. A row wider than every
    block is read twice more, soon after it was written and so mostly from cache; that is not counted.
    """
    matrix = rows * columns * DTYPE_BYTES[dtype]
    # add, sum (one less), distance, square, sum (one less), two products and the bias; two means, epsilon and rsqrt
    flops = rows * (8 * columns + 2)
    return Cost(flops, 4 * matrix + 2 * columns * DTYPE_BYTES[weight_dtype or dtype])


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
    parameter_dtype = getattr(torch, weight_dtype) if weight_dtype else dtype
    return {
        "x": random(rows, columns).to(dtype),
        "residual": random(rows, columns).to(dtype),
        "weight": (1 + random(columns) / 8).to(parameter_dtype),
        "bias": (random(columns) / 8).to(parameter_dtype),
        "epsilon": 1e-5,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds two tensors and normalises the sum.

    The addition is ``aten.add`` of equal shapes. The sum may have other readers: the kernel writes it.
    """
    walk = Walk(graph)
    found = []
    for out in walk.results("add", "layer_norm", "native_layer_norm", "_to_copy", "to", "convert_element_type"):
        if out.dtype not in map(dtype_name, FLOATS) or not out.shape or out.name != out.buffer:
            continue
        for norm in norms(walk, out, "layer"):
            if norm.bias is None or {norm.weight.dtype, norm.bias.dtype} != {out.dtype}:
                continue
            for x, residual, hidden in sums(walk, norm.x):
                operands = {"x": x, "residual": residual, "weight": norm.weight, "bias": norm.bias}
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
        Workload("GPT-2 XL, 8192 tokens", {"rows": 8192, "columns": 1600}),
        Workload("OPT 6.7B, decoding 16 sequences", {"rows": 16, "columns": 4096}),
        Workload("OPT 6.7B, 4096 tokens", {"rows": 4096, "columns": 4096}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, _, ctx.epsilon = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, hidden_gradient: torch.Tensor | None, out_gradient: torch.Tensor | None) -> tuple[Any, ...]:
    hidden, weight = ctx.saved_tensors
    if out_gradient is None:
        return hidden_gradient, hidden_gradient, None, None, None
    gradient, weight_gradient, bias_gradient = add_layer_norm_backward.KERNEL(
        out_gradient.contiguous(),
        None if hidden_gradient is None else hidden_gradient.contiguous(),
        hidden,
        weight,
        ctx.epsilon,
    )
    return gradient, gradient, weight_gradient, bias_gradient, None


KERNEL.operator.register_autograd(_backward, setup_context=_keep)
