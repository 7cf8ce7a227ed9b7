"""Residual addition, RMS normalisation and quantisation of each row to 8 bits, in one pass over memory.

    hidden = x + residual
    normalized = hidden * rsqrt(mean(hidden ** 2) + epsilon) * weight
    scale = max(max(abs(normalized)) / limit, least_scale)
    out = round(normalized / scale)

``add_rms_norm`` for what is multiplied in 8 bits next: ``out`` is int8 (``limit`` 127, so that -128 is not used) or
float8_e4m3fn (``limit`` 448), and ``out * scale`` is ``normalized`` again, with one float32 ``scale`` a row: the
dynamic per-token quantisation of SmoothQuant (Xiao and others, ICML 2023) and of FP8 inference. ``least_scale`` is for
those who divide by the scale later; it may be zero.

* ``hidden`` is rounded to the tensors' dtype before it is normalised, as it is when two operators do it. All arithmetic
  is in float32; ``normalized`` is not rounded in between, which separate operators would do.
* The division is exact and ``out`` is rounded to nearest, ties to even. The largest element of a row becomes
  ``limit``; what rounding would put beyond saturates (only where a scale is a subnormal number can that be).
* A row of zeros gives zeros, and ``least_scale`` as its scale. Where the scale is zero, ``out`` is not divided by it.
* A row whose normalisation holds a NaN gives the scale NaN. Its elements are NaN in float8 and unspecified in int8. An
  infinity in ``hidden`` makes such a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.fusion import Scalar
from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs, architecture_of
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk
from ._patterns import norms, sums
from ._quantisations import quantisations
from ._rows import loaded

__all__ = ["KERNEL", "LIMITS"]

NAME = "add_rms_norm_quantize"
CONFIGS = Configs.beside(__file__)

#: What a row can be quantised to, and its largest value there.
LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}

_FLOAT8_ARCHITECTURE = 89


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _larger(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """The larger one, or NaN if one of them is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _quantized(values: tl.tensor, scale: tl.tensor, limit: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """``values / scale`` rounded to ``dtype``, to nearest and ties to even."""
    quotient = tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale))
    quotient = tl.clamp(quotient, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if dtype.is_int():
        # Next to 1.5 * 2**23 floats are integers, and the addition rounds as every addition does.
        quotient = (quotient + 12582912.0) - 12582912.0
    return quotient.to(dtype)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def add_rms_norm_quantize_kernel(
    x_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    hidden_pointer: tl.tensor,
    out_pointer: tl.tensor,
    scale_pointer: tl.tensor,
    epsilon: tl.tensor,
    least_scale: tl.tensor,
    limit: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Normalise and quantise one row of row-major matrices; the grid is the number of rows."""
    row = tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, block)
    if columns <= block:
        inside = lane < columns
        total = loaded(x_pointer, row + lane, inside) + loaded(residual_pointer, row + lane, inside)
        stored = total.to(hidden_pointer.dtype.element_ty)
        tl.store(hidden_pointer + row + lane, stored, mask=inside)
        hidden = stored.to(tl.float32)
        root = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / columns + epsilon)
        normalized = hidden * root * loaded(weight_pointer, lane, inside)
        largest = tl.reduce(tl.abs(normalized), 0, _larger)
        scale = _larger(tl.div_rn(largest, tl.full([], limit, dtype=tl.float32)), least_scale)
        quantized = _quantized(normalized, scale, limit, out_pointer.dtype.element_ty)
        tl.store(out_pointer + row + lane, quantized, mask=inside)
    else:
        squares = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            total = loaded(x_pointer, row + column, inside) + loaded(residual_pointer, row + column, inside)
            stored = total.to(hidden_pointer.dtype.element_ty)
            tl.store(hidden_pointer + row + column, stored, mask=inside)
            hidden = stored.to(tl.float32)
            squares += hidden * hidden
        root = tl.rsqrt(tl.sum(squares, axis=0) / columns + epsilon)
        tl.debug_barrier()  # the next walks may read, in one thread, what another stored in the first
        larger = tl.zeros([block], dtype=tl.float32)
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            normalized = loaded(hidden_pointer, row + column, inside) * root * loaded(weight_pointer, column, inside)
            larger = _larger(larger, tl.abs(normalized))
        largest = tl.reduce(larger, 0, _larger)
        scale = _larger(tl.div_rn(largest, tl.full([], limit, dtype=tl.float32)), least_scale)
        for first in range(0, columns, block):
            column = first + lane
            inside = column < columns
            normalized = loaded(hidden_pointer, row + column, inside) * root * loaded(weight_pointer, column, inside)
            quantized = _quantized(normalized, scale, limit, out_pointer.dtype.element_ty)
            tl.store(out_pointer + row + column, quantized, mask=inside)
    tl.store(scale_pointer + tl.program_id(0), scale)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    least_scale: float,
    dtype: str,
    *,
    hidden: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``x + residual`` into ``hidden`` and its quantised normalisation into ``out``, on the current stream.

    Args:
        x: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        residual: as ``x``.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: added to the mean of squares.
        least_scale: below which no scale falls, zero or more.
        dtype: of ``out``: ``int8``, or ``float8_e4m3fn``, which compute capability 8.9 and later can convert to.
        hidden: as ``x``; written, as are the next two. None shares memory with any other argument.
        out: the shape of ``x`` in ``dtype``.
        scale: float32, ``[..., 1]``.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, an output overlaps something, or the GPU
            cannot convert to ``dtype``.
    """
    _check(x, residual, weight, least_scale, dtype)
    check_tensor(NAME, "hidden", hidden, x.shape, x.dtype, x.device)
    check_tensor(NAME, "out", out, x.shape, getattr(torch, dtype), x.device)
    check_tensor(NAME, "scale", scale, (*x.shape[:-1], 1), torch.float32, x.device)
    written = {"hidden": hidden, "out": out, "scale": scale}
    check_apart(NAME, written, {"x": x, "residual": residual, "weight": weight})
    check_device(NAME, add_rms_norm_quantize_kernel, x)
    architecture = architecture_of(x.device)
    if dtype != "int8" and architecture < _FLOAT8_ARCHITECTURE:
        raise fail(
            NAME,
            f"needs compute capability 8.9 or later to write {dtype}; this GPU has {architecture / 10}",
            hint="quantise to int8",
        )
    if x.numel() == 0:
        scale.fill_(least_scale)  # rows without columns
        return
    columns = x.shape[-1]
    config = config or CONFIGS.choose(x.device, x.dtype, columns=columns)
    with torch.accelerator.device_index(x.device.index):
        add_rms_norm_quantize_kernel[(x.numel() // columns,)](
            x,
            residual,
            weight,
            hidden,
            out,
            scale,
            epsilon,
            least_scale,
            limit=LIMITS[dtype],
            columns=columns,
            **config.options,
        )


def _check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, least_scale: float, dtype: str) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "residual", residual, x.shape, x.dtype, x.device)
    check_tensor(NAME, "weight", weight, x.shape[-1:], FLOATS, x.device)
    if dtype not in LIMITS:
        raise fail(NAME, f"quantises to {' or '.join(LIMITS)}; got {dtype!r}")
    if not least_scale >= 0:
        raise fail(NAME, f"needs a least scale of zero or more; got {least_scale}")


def allocate(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, least_scale: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(hidden, out, scale)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, residual, weight, least_scale, dtype)
    out = torch.empty_like(x, dtype=getattr(torch, dtype))
    return torch.empty_like(x), out, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, least_scale: float, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(hidden, out, scale)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    hidden = x + residual
    wide, limit = hidden.to(torch.float32), LIMITS[dtype]
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normalized = wide * root * weight.to(torch.float32)
    if x.shape[-1] == 0:
        return hidden, normalized.to(getattr(torch, dtype)), wide.new_full((*x.shape[:-1], 1), least_scale)
    scale = (normalized.abs().amax(-1, keepdim=True) / limit).clamp(min=least_scale)
    quotient = (normalized / torch.where(scale == 0, 1.0, scale)).clamp(-limit, limit)
    return hidden, (quotient.round() if dtype == "int8" else quotient).to(getattr(torch, dtype)), scale


def eager(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, least_scale: float, dtype: str
) -> Any:
    """What a model says: an addition, a normalisation and a quantisation in float32."""
    hidden, limit = x + residual, LIMITS[dtype]
    wide = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon).to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) / limit
    if least_scale > 0:
        scale = scale.clamp(min=least_scale)
        quotient = (wide / scale).clamp(-limit, limit)
    else:
        quotient = (wide / torch.where(scale == 0, 1.0, scale)).clamp(-limit, limit)
    return hidden, (quotient.round() if dtype == "int8" else quotient).to(getattr(torch, dtype)), scale


def cost(dtype: str, rows: int, columns: int, weight_dtype: str | None = None, quantized: str = "int8") -> Cost:
    """Flops and bytes of one launch over ``rows`` x ``columns`` elements, quantised to ``quantized``.

    Bytes are compulsory: two matrices and the weight read, two matrices and a scale for each row written, each once. A
    row wider than every block is read twice more, soon after it was written and so mostly from cache; that is not
    counted.
    """
    elements = rows * columns
    # Add, square, sum (one less), two products, absolute value, maximum (one less), division and rounding; the row's
    # mean, epsilon, rsqrt and scale.
    flops = rows * (9 * columns + 2)
    matrices = elements * (3 * DTYPE_BYTES[dtype] + DTYPE_BYTES[quantized])
    return Cost(flops, matrices + columns * DTYPE_BYTES[weight_dtype or dtype] + 4 * rows)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    rows: int,
    columns: int,
    weight_dtype: str | None = None,
    quantized: str = "int8",
    least_scale: float = 0.0,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    weight = (1 + random(columns) / 8).to(getattr(torch, weight_dtype) if weight_dtype else dtype)
    return {
        "x": random(rows, columns).to(dtype),
        "residual": random(rows, columns).to(dtype),
        "weight": weight,
        "epsilon": 1e-5,
        "least_scale": least_scale,
        "dtype": quantized,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds two tensors, normalises the sum and quantises that row by row.

    Scales are ``amax(abs(y), -1, keepdim=True) / limit``, in float32, bounded from below or replaced by one where they
    are zero before ``y`` is divided by them; quotients are clamped to the limits and, for int8, rounded. Where a model
    rounds the normalisation to 16 bits before it quantises, the kernel rounds once less.
    """
    walk = Walk(graph)
    found = []
    for out in walk.results("_to_copy", "to", "convert_element_type"):
        for y, scale, least_scale in quantisations(walk, out, LIMITS[out.dtype]) if out.dtype in LIMITS else ():
            if (scale.shape, scale.dtype) != ((*out.shape[:-1], 1), "float32"):
                continue
            if any(t.name != t.buffer for t in (out, scale)):
                continue  # written over something else
            for norm in (norm for dtype in FLOATS for norm in norms(walk, y, "rms", result=dtype_name(dtype))):
                for x, residual, hidden in sums(walk, norm.x):
                    operands = {"x": x, "residual": residual, "weight": norm.weight}
                    scalars: dict[str, Scalar] = {
                        "epsilon": norm.epsilon,
                        "least_scale": least_scale,
                        "dtype": out.dtype,
                    }
                    rows, columns = math.prod(out.shape[:-1]), out.shape[-1]
                    launch_cost = cost(x.dtype, rows, columns, norm.weight.dtype, out.dtype)
                    match = walk.match(NAME, {**operands, **scalars}, (hidden, out, scale), launch_cost)
                    if match is not None and hidden.shape == out.shape and norm.weight.dtype == x.dtype:
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
        Workload("Llama-3 8B, decoding 16 sequences, int8", {"rows": 16, "columns": 4096}),
        Workload("Llama-3 8B, 4096 tokens, int8", {"rows": 4096, "columns": 4096}),
        Workload("Llama-3 70B, 8192 tokens, float8", {"rows": 8192, "columns": 8192, "quantized": "float8_e4m3fn"}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
