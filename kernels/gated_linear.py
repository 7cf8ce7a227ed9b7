"""A gated linear unit as one kernel: two matrix products in one main loop, and their gated product.

    out = activation(x @ gate) * (x @ up)

SwiGLU, GeGLU and ReGLU of Shazeer ("GLU variants improve transformer", 2020). Each tile of ``x`` is read once for both
products, which are summed in float32 side by side; neither is ever written. ``out`` is rounded once, where separate
operators round after each. The backward computes both products again instead of keeping them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from msgspec.structs import replace

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor, contiguous_strides
from ._activations import ACTIVATIONS, activated
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk, any_tensor, call, reshaped
from ._matmul import sizes_of
from ._patterns import activations, linears
from ._tiles import swizzled
from .gated_activation_backward import GATES
from .gated_activation_backward import KERNEL as GATED_ACTIVATION_BACKWARD

__all__ = ["KERNEL"]

NAME = "gated_linear"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def gated_linear_kernel(
    x_pointer: tl.tensor,
    gate_pointer: tl.tensor,
    up_pointer: tl.tensor,
    out_pointer: tl.tensor,
    rows: tl.tensor,
    gate_stride_k: tl.constexpr,
    gate_stride_n: tl.constexpr,
    up_stride_k: tl.constexpr,
    up_stride_n: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    activation: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of row-major ``out``; the grid is the number of tiles."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(rows, block_m), tl.cdiv(columns, block_n), group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    lane = tl.arange(0, block_k)
    wide_row, wide_column, wide_lane = row.to(tl.int64), column.to(tl.int64), lane.to(tl.int64)
    x_pointers = x_pointer + wide_row[:, None] * depth + lane[None, :]
    gate_pointers = gate_pointer + wide_lane[:, None] * gate_stride_k + wide_column[None, :] * gate_stride_n
    up_pointers = up_pointer + wide_lane[:, None] * up_stride_k + wide_column[None, :] * up_stride_n
    has_row, has_column = (row < rows)[:, None], (column < columns)[None, :]
    gate_total = tl.zeros([block_m, block_n], dtype=tl.float32)
    up_total = tl.zeros([block_m, block_n], dtype=tl.float32)
    for first in range(0, depth, block_k):
        has_depth = lane < depth - first
        x = tl.load(x_pointers, mask=has_row & has_depth[None, :], other=0.0)
        gate = tl.load(gate_pointers, mask=has_depth[:, None] & has_column, other=0.0)
        gate_total = tl.dot(x, gate, gate_total, input_precision="ieee")
        up = tl.load(up_pointers, mask=has_depth[:, None] & has_column, other=0.0)
        up_total = tl.dot(x, up, up_total, input_precision="ieee")
        x_pointers += block_k
        gate_pointers += block_k * gate_stride_k
        up_pointers += block_k * up_stride_k
    value = activated(gate_total, activation) * up_total
    at = wide_row[:, None] * columns + column[None, :]
    tl.store(out_pointer + at, value.to(out_pointer.dtype.element_ty), mask=has_row & has_column)


def launch(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``activation(x @ gate) * (x @ up)`` into ``out``, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        gate: ``[depth, columns]`` of x's dtype and any strides: ``linear.weight.t()`` of a torch Linear, or half of a
            packed weight, as in ``gate, up = packed.t().chunk(2, dim=1)``.
        up: likewise; it may have other strides.
        activation: of the gate; ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``.
        out: ``[..., columns]`` of x's dtype, row-major; written, shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, the output overlaps something, or there is
            no such activation.
    """
    _check(x, gate, up, activation)
    depth, columns = gate.shape
    check_tensor(NAME, "out", out, (*x.shape[:-1], columns), x.dtype, x.device)
    check_apart(NAME, {"out": out}, {"x": x, "gate": gate, "up": up})
    check_device(NAME, gated_linear_kernel, x)
    if out.numel() == 0:
        return
    rows = out.numel() // columns
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, gate, up))
    tiles = -(-rows // config.constants["block_m"]) * -(-columns // config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        gated_linear_kernel[(tiles,)](
            x,
            gate,
            up,
            out,
            rows,
            gate_stride_k=gate.stride(0),
            gate_stride_n=gate.stride(1),
            up_stride_k=up.stride(0),
            up_stride_n=up.stride(1),
            columns=columns,
            depth=depth,
            activation=activation,
            **config.options,
        )


def _check(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "gate", gate, (x.shape[-1], None), x.dtype, x.device, row_major=False)
    check_tensor(NAME, "up", up, gate.shape, x.dtype, x.device, row_major=False)
    if activation not in GATES:
        raise fail(NAME, f"knows the activations {', '.join(GATES)}; got {activation!r}")


def allocate(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> tuple[torch.Tensor]:
    """A new ``out``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, gate, up, activation)
    return (x.new_empty(*x.shape[:-1], gate.shape[1]),)


def reference(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's one rounding; shapes as ``launch``."""
    wide = x.float()
    return ((ACTIVATIONS[activation](wide @ gate.float()) * (wide @ up.float())).to(x.dtype),)


def eager(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """What a model says: two linear layers, an activation and a product."""
    linear = torch.nn.functional.linear
    return ACTIVATIONS[activation](linear(x, gate.t())) * linear(x, up.t())


def cost(dtype: str, rows: int, depth: int, columns: int, activation: str = "silu", packed: bool = False) -> Cost:
    """Flops and bytes of one launch: a multiplication and an addition for each of ``2 x rows x depth x columns``.

    Activation and product count one operation each for every element. Bytes are compulsory, each tensor read or written
    once; tiles read operands again, mostly from the L2 cache.
    """
    elements = rows * columns
    values = rows * depth + 2 * depth * columns + elements
    return Cost(elements * (4 * depth + 2), values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    depth: int,
    columns: int,
    activation: str = "silu",
    packed: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; weights are a torch Linear's, or halves of one."""
    random = normal(device, seed)
    x = random(rows, depth).to(dtype)
    weight = (random(2 * columns, depth) / math.sqrt(max(depth, 1))).to(dtype)
    gate, up = weight.chunk(2)
    if not packed:
        gate, up = gate.clone(), up.clone()
    return {"x": x, "gate": gate.t(), "up": up.t(), "activation": activation}


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph multiplies a linear layer by another one of the same tensor that is activated, both without bias.

    Both may be parts of one linear layer, as where a model packs its weights.
    """
    walk = Walk(graph)
    if not any(walk.results("linear", "mm", "matmul")):
        return ()
    found: list[Match] = []
    for out in walk.results("mul", "_to_copy", "to", "convert_element_type"):
        if out.dtype not in map(dtype_name, FLOATS) or not out.shape:
            continue
        for factors in walk.find(call("mul", any_tensor("opened"), any_tensor("passed")), out):
            opened, passed = (reshaped(factors[name], out.shape) for name in ("opened", "passed"))
            if opened is None or passed is None:
                continue
            for activation, inner in activations(walk, opened, *GATES, result=out.dtype):
                for x, gate in _projections(walk, inner, out):
                    for other, up in _projections(walk, passed, out):
                        if other == x and gate.shape == up.shape:
                            found += _matched(walk, x, gate, up, activation, out)
    return tuple(found)


def _projections(walk: Walk, tensor: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``x`` and ``weight`` of linear layers without bias whose columns, all or some, ``tensor`` may be."""
    base = walk.graph.buffers[tensor.buffer]
    columns, all_columns = out.shape[-1], base.shape[-1] if base.shape else 0
    begin, is_part = tensor.offset_bytes // DTYPE_BYTES[tensor.dtype], all_columns > columns
    whole = tensor
    if is_part:  # rows as long as those of all columns, of which it has neighbours
        strides = (*contiguous_strides((*out.shape[:-1], all_columns))[:-1], 1)
        whole = reshaped(base, (*out.shape[:-1], all_columns)) or base
        if (tensor.shape, tensor.element_strides) != (out.shape, strides) or begin + columns > all_columns:
            return
    elif tensor.shape != out.shape:
        return
    for linear in linears(walk, whole):
        if linear.bias is None and linear.x.dtype == out.dtype:
            yield linear.x, _columns(linear.weight, begin, columns) if is_part else linear.weight


def _columns(weight: Tensor, begin: int, count: int) -> Tensor:
    """A view of neighbouring columns."""
    offset = weight.offset_bytes + begin * weight.element_strides[1] * DTYPE_BYTES[weight.dtype]
    strides = weight.element_strides
    return replace(weight, name="", shape=(weight.shape[0], count), strides=strides, offset_bytes=offset)


def _matched(walk: Walk, x: Tensor, gate: Tensor, up: Tensor, activation: str, out: Tensor) -> list[Match]:
    depth, columns = gate.shape
    launch_cost = cost(out.dtype, math.prod(out.shape[:-1]), depth, columns, activation)
    arguments: dict[str, Any] = {"x": x, "gate": gate, "up": up, "activation": activation}
    match = walk.match(NAME, arguments, (out,), launch_cost)
    return [] if match is None else [match]


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
        Workload("Llama-3 8B, decoding 16 sequences", {"rows": 16, "depth": 4096, "columns": 14336}),
        Workload("Llama-3 8B, 4096 tokens", {"rows": 4096, "depth": 4096, "columns": 14336}),
        Workload("Llama-3 70B, 8192 tokens", {"rows": 8192, "depth": 8192, "columns": 28672}),
        Workload("Qwen2.5-7B, 4096 tokens", {"rows": 4096, "depth": 3584, "columns": 18944, "packed": True}),
        Workload("Gemma 7B, 4096 tokens", {"rows": 4096, "depth": 3072, "columns": 24576, "activation": "gelu_tanh"}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, gate, up, ctx.activation = inputs
    ctx.save_for_backward(x, gate, up)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Both products again, the kernel between them, and the products that each gradient is."""
    x, gate, up = ctx.saved_tensors
    x_wanted, gate_wanted, up_wanted, *_ = ctx.needs_input_grad
    rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).contiguous()
    gate_gradient, up_gradient, _ = GATED_ACTIVATION_BACKWARD(rows @ gate, rows @ up, gradient, ctx.activation, False)
    return (
        torch.addmm(gate_gradient @ gate.t(), up_gradient, up.t()).view_as(x) if x_wanted else None,
        rows.t() @ gate_gradient if gate_wanted else None,
        rows.t() @ up_gradient if up_wanted else None,
        None,
    )


KERNEL.operator.register_autograd(_backward, setup_context=_keep)
