"""A linear layer whose weights are 4-bit integers, dequantised in registers while they are multiplied.

    out = x @ ((integers - zeros) * scales).T + bias

``integers`` 0 to 15 are ``[columns, depth]``; each ``group`` of them along the depth shares a scale and, if it is
asymmetric, a zero point, otherwise 8: the weight-only quantisation of GPTQ and AWQ, in a kernel after MARLIN (Frantar
et al., 2024) and split-K of Hoque et al. (arXiv 2402.00025). Products are summed in float32. A dequantised weight is
rounded to the dtype of ``x`` before it is multiplied. Where one group spans the whole depth no weight is rounded:
``integers - zeros`` is exact, and the scale multiplies the sum. ``out`` is rounded once.

`_packing` says how ``packed`` is laid out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match
from ._packing import BLOCK, Packed, pack, pack_integers, unpack, words_of
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

__all__ = ["KERNEL", "Packed", "pack", "pack_integers", "unpack"]

NAME = "w4a16_linear"
CONFIGS = Configs.beside(__file__)
_SYMMETRIC = 8


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def w4a16_linear_kernel(
    x_pointer: tl.tensor,
    packed_pointer: tl.tensor,
    scales_pointer: tl.tensor,
    zeros_pointer: tl.tensor,
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
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of ``out``, or one split's sum of it; the grid is tiles x splits. Zeros, bias may be None."""
    m, n = quantized_tile(rows, columns, block_m, block_n, group_m)
    lane = tl.arange(0, 32)
    blocks: tl.constexpr = (depth + 255) // 256
    grouped: tl.constexpr = group < depth
    span: tl.constexpr = min(group, 256)  # weights of a block that share a scale
    word_pointers = packed_pointer + n.to(tl.int64)[:, None] * (blocks * 32) + lane[None, :]
    x_pointers = x_pointer + m.to(tl.int64)[None, :] * stride_m
    total = tl.zeros([block_n, block_m], dtype=tl.float32)
    first, last = quantized_split(blocks, splits)
    for block in range(first, last):
        scales = _of_groups(scales_pointer if grouped else None, 1.0, block, n, columns, depth, group, span)
        zeros = _of_groups(zeros_pointer, 8.0, block, n, columns, depth, group, span)
        word = tl.load(word_pointers + block * 32, mask=(n < columns)[:, None], other=0)
        for part in tl.static_range(8):
            k = block * 256 + part * 32 + lane
            inside = (k < depth)[:, None] & (m < rows)[None, :]
            x = tl.load(x_pointers + k.to(tl.int64)[:, None] * stride_k, mask=inside, other=0.0)
            weight = _dequantized(word, scales[part * 32 // span], zeros[part * 32 // span], part, grouped)
            total = tl.dot(weight.to(x.dtype), x, total)
    quantized_store(
        total, scales_pointer, bias_pointer, out_pointer, partial_pointer, m, n, rows, columns, grouped, splits
    )


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _of_groups(
    pointer: tl.tensor,
    default: tl.constexpr,
    block: tl.tensor,
    n: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    span: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Scales or zero points of the groups in a block, each a float32 for each of columns ``n``."""
    values = ()
    for start in tl.static_range(0, 256, span):
        if pointer is None:
            values += (tl.full([n.shape[0]], default, tl.float32),)  # type: ignore[assignment] # it grows
        else:
            index = (block * 256 + start) // group
            inside = (n < columns) & (index * group < depth)
            at = index * columns + n  # of a 32nd of the weights at most: 32 bits will do
            value = tl.load(pointer + at, mask=inside, other=0)
            values += (value.to(tl.float32),)  # type: ignore[assignment] # it grows
    return values


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _dequantized(
    word: tl.tensor, scale: tl.tensor, zero: tl.tensor, part: tl.constexpr, grouped: tl.constexpr
) -> tl.tensor:
    """``(integer - zero) * scale`` in float32, exactly, for nibble ``part`` of each word.

    The nibble is put into the mantissa of a float32: at bit ``position``, below an exponent of ``23 - position``, it
    reads ``offset + integer``. Three nibbles stand right after one shift. From bit 11 on that number has 13 digits and
    its product with a scale of fp16's 11 is exact, so one multiplication and addition dequantises.
    """
    position: tl.constexpr = 11 + 4 * (part % 3)
    offset: tl.constexpr = 1 << (23 - position)
    if part < 3:
        moved = word << 11
    elif part < 6:
        moved = word >> 1
    else:
        moved = word >> 13
    bits = (moved & (15 << position)) | ((127 + 23 - position) << 23)
    number = bits.to(tl.float32, bitcast=True)
    lowest = -offset - zero
    if grouped:
        return tl.fma(number, scale[:, None], (lowest * scale)[:, None])
    return number + lowest[:, None]


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    *,
    out: torch.Tensor,
    partial: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``x @ ((integers - zeros) * scales).T + bias`` into ``out``, on the current stream.

    Args:
        x: ``[..., depth]``, float16 or bfloat16, on a CUDA device; rows at equal distances.
        packed: ``[columns, 32 * ceil(depth / 256)]``, int32, of `pack` or `pack_integers`.
        scales: ``[groups, columns]``, float16 or bfloat16, row-major.
        zeros: as ``scales``, uint8; None is 8 everywhere.
        bias: ``[columns]``, float32, float16 or bfloat16, or None.
        group: how many weights along the depth share a scale: a power of two from 32 on, or ``depth`` and more.
        out: ``[..., columns]`` of x's dtype, row-major; written, shares no memory with any other argument.
        partial: ``[splits, rows, columns]``, float32: scratch.
        config: how to launch; chosen by sizes if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, packed, scales, zeros, bias, group)
    columns, depth = packed.shape[0], x.shape[-1]
    check_tensor(NAME, "out", out, (*x.shape[:-1], columns), x.dtype, x.device)
    check_tensor(NAME, "partial", partial, (None, x.numel() // depth, columns), torch.float32, x.device)
    read = {"x": x, "packed": packed, "scales": scales, "zeros": zeros, "bias": bias}
    present = {name: tensor for name, tensor in read.items() if tensor is not None}
    check_apart(NAME, {"out": out, "partial": partial}, present)
    check_device(NAME, w4a16_linear_kernel, x)
    if out.numel() == 0:
        return
    rows = out.numel() // columns
    config = config or CONFIGS.choose(x.device, x.dtype, rows=rows, depth=depth, columns=columns)
    constants = {"group": min(group, depth)}
    blocks = -(-depth // BLOCK)
    launch_product(w4a16_linear_kernel, x, (packed, scales, zeros), bias, out, partial, blocks, constants, config)


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> None:
    columns = packed.shape[0] if packed.dim() else 0
    groups = check_product(NAME, x, columns, scales, bias, group)
    check_tensor(NAME, "packed", packed, (None, words_of(x.shape[-1])), torch.int32, x.device)
    if zeros is not None:
        check_tensor(NAME, "zeros", zeros, (groups, columns), torch.uint8, x.device)


def allocate(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(out, partial)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, packed, scales, zeros, bias, group)
    return x.new_empty((*x.shape[:-1], packed.shape[0])), scratch_for(x, packed.shape[0])


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    depth = x.shape[-1]
    integers = unpack(packed, depth).to(torch.float32)
    integers = integers - (_SYMMETRIC if zeros is None else spread(zeros, group, depth))
    return (product_reference(x, integers, scales, bias, group),)


def eager(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """Dequantise, then multiply: what one writes without a kernel."""
    depth = x.shape[-1]
    integers = unpack(packed, depth).to(x.dtype)
    centred = integers - (_SYMMETRIC if zeros is None else spread(zeros, group, depth).to(x.dtype))
    weight = centred * spread(scales, group, depth).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def cost(
    dtype: str, rows: int, depth: int, columns: int, group: int = 128, asymmetric: bool = False, bias: bool = False
) -> Cost:
    """Flops and bytes of one launch: those of the product and the bias.

    Dequantisation is not counted, nor are sums of splits, which are written and read soon after, mostly in cache. Each
    operand is moved once; ``packed`` with what fills its last block up.
    """
    groups = -(-depth // group)
    size = DTYPE_BYTES[dtype]
    weights = columns * (words_of(depth) * 4 + groups * (size + asymmetric))
    elements = rows * columns
    return Cost(elements * (2 * depth + bias), (rows * depth + elements + columns * bias) * size + weights)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    depth: int,
    columns: int,
    group: int = 128,
    asymmetric: bool = False,
    bias: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name: any integers, scales as of a layer that keeps variance."""
    random = normal(device, seed)
    shape = (-(-depth // group), columns)
    words = (columns, words_of(depth))
    if device == "meta":
        packed = torch.empty(words, dtype=torch.int32, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed + 1)
        packed = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, generator=generator, device=device)
    scales = (1 + random(*shape).abs()) / (8 * math.sqrt(max(depth, 1)))
    return {
        "x": random(rows, depth).to(dtype),
        "packed": packed,
        "scales": scales.to(dtype),
        "zeros": (8 + 2 * random(*shape)).clamp(0, 15).to(torch.uint8) if asymmetric else None,
        "bias": random(columns).to(dtype) if bias else None,
        "group": group,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """None: ATen has no integers of 4 bits, and every library packs them in a layout of its own.

    A model calls the operator; `opweave.kernels.quantized.quantized_linear` makes a layer that does.
    """
    return ()


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
