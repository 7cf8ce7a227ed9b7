"""A linear layer whose weights are 8-bit integers, dequantised in registers while they are multiplied.

    out = x @ (weight * scales).T + bias

``weight`` is ``[columns, depth]`` of int8; each ``group`` of them along the depth shares a scale. Mostly one group
spans the whole depth: a scale for each output channel, as LLM.int8 (Dettmers et al., 2022) and torchao have it. Then
the scale multiplies the sum and no weight is rounded, for both dtypes of ``x`` hold every int8. With more groups a
dequantised weight is rounded to the dtype of ``x`` before it is multiplied. Products are summed in float32, by several
programs where there are few rows (split-K), and ``out`` is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._checks import check_apart, check_device, check_tensor, dtype_name
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import CASTS, Cost, Match, Walk, any_tensor, call, either, reshaped, transposed
from ._packing import Quantized, quantize
from ._patterns import Linear, linears
from ._quantized import (
    HALVES,
    check_product,
    launch_product,
    product_reference,
    quantized_split,
    quantized_store,
    quantized_tile,
    scratch_for,
    spread,
)

__all__ = ["KERNEL", "Quantized", "quantize"]

NAME = "w8a16_linear"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def w8a16_linear_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    weight_stride_n: tl.tensor,
    weight_stride_k: tl.tensor,
    scales_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    out_pointer: tl.tensor,
    partial_pointer: tl.tensor,
    rows: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    splits: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of ``out``, or one split's sum of it; the grid is tiles x splits. A bias of None adds nothing.

    ``block_k`` divides the group, or there is but one group.
    """
    m, n = quantized_tile(rows, columns, block_m, block_n, group_m)
    lane = tl.arange(0, block_k)
    blocks: tl.constexpr = (depth + block_k - 1) // block_k
    grouped: tl.constexpr = group < depth
    weight_pointers = weight_pointer + n.to(tl.int64)[:, None] * weight_stride_n
    x_pointers = x_pointer + m.to(tl.int64)[None, :] * stride_m
    total = tl.zeros([block_n, block_m], dtype=tl.float32)
    first, last = quantized_split(blocks, splits)
    for block in range(first, last):
        k = block * block_k + lane
        wide = k.to(tl.int64)
        inside = (n < columns)[:, None] & (k < depth)[None, :]
        weight = tl.load(weight_pointers + wide[None, :] * weight_stride_k, mask=inside, other=0).to(tl.float32)
        if grouped:
            at = block * block_k // group * columns + n  # of a 32nd of the weights at most: 32 bits will do
            scale = tl.load(scales_pointer + at, mask=n < columns, other=0.0)
            weight *= scale.to(tl.float32)[:, None]
        inside = (k < depth)[:, None] & (m < rows)[None, :]
        x = tl.load(x_pointers + wide[:, None] * stride_k, mask=inside, other=0.0)
        total = tl.dot(weight.to(x.dtype), x, total)
    quantized_store(
        total, scales_pointer, bias_pointer, out_pointer, partial_pointer, m, n, rows, columns, grouped, splits
    )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    *,
    out: torch.Tensor,
    partial: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``x @ (weight * scales).T + bias`` into ``out``, on the current stream.

    Args:
        x: ``[..., depth]``, float16 or bfloat16, on a CUDA device; rows at equal distances.
        weight: ``[columns, depth]``, int8, of any strides.
        scales: ``[groups, columns]``, float16 or bfloat16, row-major.
        bias: ``[columns]``, float32, float16 or bfloat16, or None.
        group: how many weights along the depth share a scale: a power of two from 32 on, or ``depth`` and more.
        out: ``[..., columns]`` of x's dtype, row-major; written, shares no memory with any other argument.
        partial: ``[splits, rows, columns]``, float32: scratch.
        config: how to launch; chosen by sizes if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, weight, scales, bias, group)
    columns, depth = weight.shape
    check_tensor(NAME, "out", out, (*x.shape[:-1], columns), x.dtype, x.device)
    check_tensor(NAME, "partial", partial, (None, x.numel() // depth, columns), torch.float32, x.device)
    read = {"x": x, "weight": weight, "scales": scales, "bias": bias}
    present = {name: tensor for name, tensor in read.items() if tensor is not None}
    check_apart(NAME, {"out": out, "partial": partial}, present)
    check_device(NAME, w8a16_linear_kernel, x)
    if out.numel() == 0:
        return
    rows = out.numel() // columns
    config = config or CONFIGS.choose(x.device, x.dtype, rows=rows, depth=depth, columns=columns)
    block_k = config.constants["block_k"] if group >= depth else min(config.constants["block_k"], group)
    constants = {"group": min(group, depth), "block_k": block_k}
    weight_arguments = (weight, *weight.stride(), scales)
    blocks = -(-depth // block_k)
    launch_product(w8a16_linear_kernel, x, weight_arguments, bias, out, partial, blocks, constants, config)


def _check(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group: int) -> None:
    check_product(NAME, x, weight.shape[0] if weight.dim() else 0, scales, bias, group)
    check_tensor(NAME, "weight", weight, (None, x.shape[-1]), torch.int8, x.device, row_major=False)


def allocate(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(out, partial)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, weight, scales, bias, group)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), scratch_for(x, weight.shape[0])


def reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group: int
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    return (product_reference(x, weight.to(torch.float32), scales, bias, group),)


def eager(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """Dequantise, then multiply: what weight-only models say."""
    depth = x.shape[-1]
    scale = scales[0].unsqueeze(-1) if group >= depth else spread(scales, group, depth)
    dequantized = weight.to(x.dtype) * scale.to(x.dtype)
    return torch.nn.functional.linear(x, dequantized, None if bias is None else bias.to(x.dtype))


def cost(dtype: str, rows: int, depth: int, columns: int, group: int | None = None, bias: bool = False) -> Cost:
    """Flops and bytes of one launch: those of the product and the bias; no ``group`` is one for the whole depth.

    Dequantisation is not counted, nor are sums of splits, which are written and read soon after, mostly in cache. Each
    operand is moved once.
    """
    groups = -(-depth // (group or depth))
    elements = rows * columns
    values = rows * depth + elements + columns * (bias + groups)
    return Cost(elements * (2 * depth + bias), values * DTYPE_BYTES[dtype] + columns * depth)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    depth: int,
    columns: int,
    group: int | None = None,
    bias: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name: any integers, scales as of a layer that keeps variance."""
    random = normal(device, seed)
    group = group or depth
    if device == "meta":
        weight = torch.empty((columns, depth), dtype=torch.int8, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed + 1)
        weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8, generator=generator, device=device)
    scales = (1 + random(-(-depth // group), columns).abs()) / (128 * math.sqrt(max(depth, 1)))
    return {
        "x": random(rows, depth).to(dtype),
        "weight": weight,
        "scales": scales.to(dtype),
        "bias": random(columns).to(dtype) if bias else None,
        "group": group,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph multiplies by int8 weights with a scale for each output channel.

    The scale multiplies the weights, cast to the dtype of ``x``, before a linear layer, or its result, as in torchao
    and gpt-fast; a bias comes last. The kernel rounds neither the weights nor the result before it is scaled.
    """
    walk = Walk(graph)
    if not any(graph.tensor[name].dtype == "int8" for op in graph.ops for name in op.inputs):
        return ()
    halves = {dtype_name(dtype) for dtype in HALVES}
    tensors = (graph.tensor[op.outputs[0]] for op in graph.ops if op.outputs)
    found = [match for out in tensors if out.dtype in halves and out.shape for match in _ending(walk, out)]
    return tuple(match for match in found if not any({*match.ops} < {*other.ops} for other in found))


_PRODUCT, _SCALE, _BIAS = any_tensor("product"), any_tensor("scale"), any_tensor("bias")
_SCALED = call("mul", _PRODUCT, _SCALE)


def _ending(walk: Walk, out: Tensor) -> Iterator[Match]:
    """Launches that compute ``out``."""
    for linear in linears(walk, out):
        for integers, scale in _integers(walk, linear.weight):
            if scale is not None:
                yield from _match(walk, linear, integers, scale, linear.bias, out)
    for scaled in walk.find(either(_SCALED, call("add", _SCALED, _BIAS)), out):
        bias, columns = scaled.tensors.get("bias"), out.shape[-1:]
        scale, product = _vector(scaled["scale"], columns), reshaped(scaled["product"], out.shape)
        if product is None or scaled["product"].shape[-1:] != columns or scale is None:
            continue
        if bias is not None and _vector(bias, columns) is None:
            continue
        for linear in linears(walk, product):
            for integers, other in _integers(walk, linear.weight):
                if other is None and linear.bias is None:
                    yield from _match(walk, linear, integers, scale, bias, out)


def _vector(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor, if it has ``shape``, but for leading dimensions of one, and is row-major."""
    if tuple(tensor.shape[-1:]) != shape or math.prod(tensor.shape) != math.prod(shape):
        return None
    return reshaped(tensor, shape)


def _integers(walk: Walk, weight: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The int8 ``[columns, depth]`` that ``weight`` [depth, columns] was made of, and the scale, if it has one."""
    for lies, across in ((transposed(weight), False), (weight, True)):
        plain = _uncast(walk, lies)
        if plain is not None:
            yield (transposed(plain) if across else plain), None
        columns = weight.shape[1:]
        for found in walk.find(_SCALED, lies):
            plain = _uncast(walk, found["product"])
            scale = found["scale"] if across else _last_dropped(found["scale"])
            vector = None if scale is None else _vector(scale, columns)
            if plain is not None and plain.shape == lies.shape and vector is not None:
                yield (transposed(plain) if across else plain), vector


def _last_dropped(scale: Tensor) -> Tensor | None:
    """A scale ``[columns, 1]`` as a vector."""
    return reshaped(scale, scale.shape[:1]) if len(scale.shape) == 2 and scale.shape[1] == 1 else None


def _uncast(walk: Walk, tensor: Tensor) -> Tensor | None:
    """The int8 integers that were cast to make ``tensor``."""
    made = walk.writer(tensor)
    if made is None or made[0].target not in CASTS:
        return None
    source = walk.graph.tensor[made[0].inputs[0]]
    return source if source.dtype == "int8" and source.shape == tensor.shape else None


def _match(
    walk: Walk, linear: Linear, integers: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor
) -> Iterator[Match]:
    columns, depth = integers.shape
    if scale.dtype != out.dtype or (bias is not None and bias.dtype != out.dtype) or depth == 0:
        return
    launch_cost = cost(out.dtype, math.prod(out.shape[:-1]), depth, columns, bias=bias is not None)
    scales = reshaped(scale, (1, columns))
    bias = None if bias is None else reshaped(bias, (columns,))
    arguments = {"x": linear.x, "weight": integers, "scales": scales, "bias": bias, "group": depth}
    match = walk.match(NAME, arguments, (out,), launch_cost)
    if match is not None:
        yield match


#: Layers of Llama-3 8B and 70B, and of Qwen2.5-7B: name, depth, columns.
_LAYERS = (
    ("Llama-3 8B attention output", 4096, 4096),
    ("Llama-3 8B MLP down", 14336, 4096),
    ("Llama-3 70B MLP up", 8192, 28672),
    ("Qwen2.5-7B MLP up", 3584, 18944),
)

KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=tuple(
        Workload(f"{name}, {rows} token{'s' if rows > 1 else ''}", {"rows": rows, "depth": depth, "columns": columns})
        for name, depth, columns in _LAYERS
        for rows in (1, 4, 16, 64, 512, 4096)
    ),
    dtypes=HALVES,
    configs=CONFIGS,
    scratch=("partial",),
)
