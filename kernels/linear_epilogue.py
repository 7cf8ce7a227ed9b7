"""A linear layer with bias, activation and residual addition in its epilogue: one pass, one rounding.

    out = activation(x @ weight + bias) + residual

with bias and residual optional and the activation one of ReLU, GELU (Hendrycks and Gimpel, 2016; with erf, or the
tanh that approximates it), SiLU, or none. Products are summed in float32, the epilogue is computed in float32, and
``out`` is rounded once, where separate operators round after each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._activations import ACTIVATIONS
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._epilogues import addends, outermost
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk, is_row_major, reshaped
from ._matmul import finish, multiplied, sizes_of
from ._patterns import activations, linears
from ._tiles import swizzled

__all__ = ["KERNEL"]

NAME = "linear_epilogue"
CONFIGS = Configs.beside(__file__)
#: What the kernel computes behind the bias.
KNOWN = ("none", "relu", "gelu", "gelu_tanh", "silu")


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def linear_epilogue_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    out_pointer: tl.tensor,
    rows: tl.tensor,
    stride_k: tl.constexpr,
    stride_n: tl.constexpr,
    stride_bias: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    activation: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of row-major ``out``; the grid is the number of tiles. A pointer that is None adds nothing."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(rows, block_m), tl.cdiv(columns, block_n), group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    value = multiplied(x_pointer, weight_pointer, row, column, rows, stride_k, stride_n, columns, depth, block_k)
    finish(
        value,
        row,
        tile_n * block_n,
        bias_pointer,
        None,
        None,
        None,
        None,
        residual_pointer,
        out_pointer,
        0.0,
        rows,
        stride_bias,
        columns,
        activation,
        residual_first=False,
    )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``activation(x @ weight + bias) + residual`` into ``out``, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        weight: ``[depth, columns]`` of x's dtype and any strides: ``linear.weight.t()`` of a torch Linear.
        bias: ``[columns]``, of any of the three dtypes and any stride, or None.
        residual: as ``out``, or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        out: ``[..., columns]`` of x's dtype, row-major; written, shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, the output overlaps something, or there is
            no such activation.
    """
    _check(x, weight, bias, residual, activation)
    columns, depth = weight.shape[1], weight.shape[0]
    check_tensor(NAME, "out", out, (*x.shape[:-1], columns), x.dtype, x.device)
    read = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    check_apart(NAME, {"out": out}, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, linear_epilogue_kernel, x)
    if out.numel() == 0:
        return
    rows = out.numel() // columns
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, weight))
    tiles = -(-rows // config.constants["block_m"]) * -(-columns // config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        linear_epilogue_kernel[(tiles,)](
            x,
            weight,
            bias,
            residual,
            out,
            rows,
            stride_k=weight.stride(0),
            stride_n=weight.stride(1),
            stride_bias=bias.stride(0) if bias is not None else 0,
            columns=columns,
            depth=depth,
            activation=activation,
            **config.options,
        )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "weight", weight, (x.shape[-1], None), x.dtype, x.device, row_major=False)
    columns = weight.shape[1]
    if bias is not None:
        check_tensor(NAME, "bias", bias, (columns,), FLOATS, x.device, row_major=False)
    if residual is not None:
        check_tensor(NAME, "residual", residual, (*x.shape[:-1], columns), x.dtype, x.device)
    if activation not in KNOWN:
        raise fail(NAME, f"knows the activations {', '.join(KNOWN)}; got {activation!r}")


def allocate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> tuple[torch.Tensor]:
    """A new ``out``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, weight, bias, residual, activation)
    return (x.new_empty(*x.shape[:-1], weight.shape[1]),)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's one rounding; shapes as ``launch``."""
    value = x.float() @ weight.float()
    if bias is not None:
        value = value + bias.float()
    value = ACTIVATIONS[activation](value)
    if residual is not None:
        value = value + residual.float()
    return (value.to(x.dtype),)


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """What a model says: a linear layer, an activation and an addition."""
    value = ACTIVATIONS[activation](torch.nn.functional.linear(x, weight.t(), bias))
    return value if residual is None else value + residual


def cost(
    dtype: str,
    rows: int,
    depth: int,
    columns: int,
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
) -> Cost:
    """Flops and bytes of one launch: a multiplication and an addition for each of ``rows x depth x columns``.

    Behind them, bias, activation and residual count one operation each for every element. Bytes are compulsory, each
    tensor read or written once; tiles read operands again, mostly from the L2 cache.
    """
    elements = rows * columns
    epilogue = bias + residual + (activation != "none")
    values = rows * depth + depth * columns + elements * (1 + residual) + columns * bias
    return Cost(elements * (2 * depth + epilogue), values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    depth: int,
    columns: int,
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; the weight is a torch Linear's, transposed."""
    random = normal(device, seed)
    return {
        "x": random(rows, depth).to(dtype),
        "weight": (random(columns, depth) / math.sqrt(max(depth, 1))).to(dtype).t(),
        "bias": random(columns).to(dtype) if bias else None,
        "residual": random(rows, columns).to(dtype) if residual else None,
        "activation": activation,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph activates a linear layer, adds a tensor of its shape to it, or both.

    A product and a bias alone are left to the vendor's library. Of launches that replace the same operators, those that
    replace most are returned.
    """
    walk = Walk(graph)
    if not any(walk.results("linear", "addmm", "mm", "matmul")):
        return ()
    tensors = (graph.tensor[op.outputs[0]] for op in graph.ops if op.outputs)
    floats = {dtype_name(dtype) for dtype in FLOATS}
    found = (match for out in tensors if out.dtype in floats and out.shape for match in _ending(walk, out))
    return outermost(found)


def _ending(walk: Walk, out: Tensor) -> Iterator[Match]:
    """Launches that compute ``out``."""
    columns = out.shape[-1]
    for inner, residual in ((out, None), *addends(walk, out)):
        for activation, before in (("none", inner), *activations(walk, inner, *KNOWN[1:])):
            product = reshaped(before, out.shape)
            if product is None or (residual is None and activation == "none"):
                continue
            if residual is not None and not is_row_major(residual):
                continue
            for linear in linears(walk, product):
                depth, bias = linear.weight.shape[0], linear.bias is not None
                more: dict[str, Any] = {"activation": activation, "bias": bias, "residual": residual is not None}
                launch_cost = cost(out.dtype, math.prod(out.shape[:-1]), depth, columns, **more)
                operands = {"x": linear.x, "weight": linear.weight, "bias": linear.bias, "residual": residual}
                match = walk.match(NAME, {**operands, "activation": activation}, (out,), launch_cost)
                if match is not None:
                    yield match


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
        Workload(
            "Llama-3 8B attention output + residual, decoding 16 sequences",
            {"rows": 16, "depth": 4096, "columns": 4096, "bias": False, "residual": True},
        ),
        Workload(
            "Llama-3 8B MLP down + residual, 4096 tokens",
            {"rows": 4096, "depth": 14336, "columns": 4096, "bias": False, "residual": True},
        ),
        Workload(
            "Llama-3 70B MLP down + residual, 8192 tokens",
            {"rows": 8192, "depth": 28672, "columns": 8192, "bias": False, "residual": True},
        ),
        Workload("Qwen2.5-7B query, key and value + bias, 4096 tokens", {"rows": 4096, "depth": 3584, "columns": 4608}),
        Workload(
            "ConvNeXt-L stage 3 MLP up + GELU, batch 64",
            {"rows": 12544, "depth": 768, "columns": 3072, "activation": "gelu"},
        ),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
