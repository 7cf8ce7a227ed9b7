"""Bias and squared ReLU: ``out = max(x + bias, 0) ** 2``, the activation of Primer (So et al., arXiv 2109.08668).

The sum is not rounded to the tensors' dtype before it is squared, as it is when three operators compute it: all
arithmetic is in float32, and ``out`` is rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from opweave.kernels.authoring import (
    FLOATS,
    Config,
    Configs,
    Cost,
    Graph,
    Kernel,
    Match,
    Walk,
    Workload,
    any_tensor,
    call,
    check_apart,
    check_device,
    check_tensor,
    dtype_name,
    either,
    is_row_major,
    normal,
    reshaped,
)

__all__ = ["KERNEL"]

NAME = "squared_relu"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def squared_relu_kernel(
    x_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    out_pointer: tl.tensor,
    elements: tl.tensor,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One block of a row-major tensor; the grid covers ``elements``."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < elements
    x = tl.load(x_pointer + index, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_pointer + index % columns, mask=inside, other=0.0).to(tl.float32)
    positive = tl.maximum(x + bias, 0.0)
    tl.store(out_pointer + index, (positive * positive).to(out_pointer.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, bias: torch.Tensor, *, out: torch.Tensor, config: Config | None = None) -> None:
    """Write the activation of ``x + bias`` into ``out``, on the current stream.

    Args:
        x: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        bias: ``[columns]``, as ``x``.
        out: as ``x``; written, shares no memory with the others.
        config: how to launch; chosen by the number of elements if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or ``out`` overlaps something.
    """
    _check(x, bias)
    check_tensor(NAME, "out", out, x.shape, x.dtype, x.device)
    check_apart(NAME, {"out": out}, {"x": x, "bias": bias})
    check_device(NAME, squared_relu_kernel, x)
    elements = x.numel()
    if elements == 0:
        return
    config = config or CONFIGS.choose(x.device, elements=elements)
    grid = (triton.cdiv(elements, config.constants["block"]),)
    with torch.accelerator.device_index(x.device.index):
        squared_relu_kernel[grid](x, bias, out, elements, columns=x.shape[-1], **config.options)


def _check(x: torch.Tensor, bias: torch.Tensor) -> None:
    check_tensor(NAME, "x", x, [None] * max(x.dim(), 1), FLOATS, x.device)
    check_tensor(NAME, "bias", bias, x.shape[-1:], x.dtype, x.device)


def allocate(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor]:
    """A new ``out``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, bias)
    return (torch.empty_like(x),)


def reference(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's rounding."""
    return ((x.float() + bias.float()).clamp(min=0).square().to(x.dtype),)


def eager(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What a model says."""
    return torch.relu(x + bias).square()


def cost(dtype: str, rows: int, columns: int) -> Cost:
    """Flops and bytes of one launch: a sum, a maximum and a product an element; ``x`` read, ``out`` written."""
    itemsize = getattr(torch, dtype).itemsize
    return Cost(3 * rows * columns, (2 * rows + 1) * columns * itemsize)


def arguments(
    dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, rows: int, columns: int
) -> dict[str, torch.Tensor]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    return {"x": random(rows, columns).to(dtype), "bias": random(columns).to(dtype)}


_SUM = call("relu", call("add", any_tensor("x"), any_tensor("bias")))
_PATTERN = either(call("square", _SUM), call("pow", _SUM, 2), call("mul", _SUM, _SUM))


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds a vector along the last dimension, and squares the positive part of the sum."""
    walk = Walk(graph)
    found: list[Match] = []
    for out in walk.results("square", "pow", "mul", "_to_copy", "convert_element_type"):
        if out.dtype not in map(dtype_name, FLOATS) or not out.shape:
            continue
        for bound in walk.find(_PATTERN, out):
            x, bias = reshaped(bound["x"], out.shape), bound["bias"]
            plain = x is not None and x.dtype == bias.dtype == out.dtype and is_row_major(x)
            if x is None or not plain or bias.shape != out.shape[-1:] or not is_row_major(bias):
                continue
            launch_cost = cost(out.dtype, math.prod(out.shape[:-1]), out.shape[-1])
            match = walk.match(NAME, {"x": x, "bias": bias}, (out,), launch_cost)
            found += [match] if match is not None else []
    return tuple(found)


def _setup(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, bias = ctx.saved_tensors
    dx = gradient * 2 * torch.relu(x + bias)
    return dx, dx.flatten(0, -2).sum(0)


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
        Workload("Primer, 2048 tokens", {"rows": 2048, "columns": 3072}),
        Workload("Primer, 16384 tokens", {"rows": 16384, "columns": 3072}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
KERNEL.operator.register_autograd(_backward, setup_context=_setup)
