"""Residual addition and RMS normalisation in one pass over memory.

    hidden = x + residual
    out = hidden * rsqrt(mean(hidden ** 2) + epsilon) * weight

with the mean over the last dimension: RMSNorm of Zhang and Sennrich (NeurIPS 2019) behind the residual addition of a
transformer block. ``hidden`` is rounded to the tensors' dtype before it is normalised, as it is when two operators do
it; all arithmetic is in float32 and ``out`` is rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Op
from ..errors import ExecutionError
from ._match import Cost, Match, Walk, is_row_major, operands, replaceable
from ._rms_norm import RmsNorm, rms_norms

__all__ = [
    "CONFIGS",
    "DTYPES",
    "WIDE_ROWS",
    "Config",
    "add_rms_norm_kernel",
    "config_for",
    "cost",
    "launch",
    "matches",
    "operator",
    "reference",
]

#: Of all tensors but the weight, which may have another of these.
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Config:
    """How one row is computed: ``block`` columns at a time, by one program of ``num_warps`` warps."""

    block: int
    num_warps: int


#: For a row that one block covers, narrowest first. Chosen for sm_90 by registers (the test compiles each and finds no
#: spills), not by timing; other architectures take the same.
CONFIGS = (
    Config(256, 1),
    Config(1024, 4),
    Config(2048, 4),
    Config(4096, 8),
    Config(8192, 8),
    Config(16384, 16),
)
#: For wider rows, walked block by block. The compiler keeps addresses of both walks: wider blocks spill.
WIDE_ROWS = Config(4096, 16)


def config_for(columns: int) -> Config:
    """The narrowest configuration whose block covers a row, else that for wide rows."""
    return next((config for config in CONFIGS if columns <= config.block), WIDE_ROWS)


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
) -> None:
    """Write ``x + residual`` into ``hidden`` and its normalisation into ``out``, on the current stream.

    Args:
        x: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        residual: as ``x``.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: added to the mean of squares.
        hidden: as ``x``; written, shares no memory with any other argument.
        out: as ``x``; written, shares no memory with any other argument.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    _check(x, residual, weight, hidden, out)
    _check_overlap({"x": x, "residual": residual, "weight": weight, "hidden": hidden, "out": out})
    if not x.is_cuda and isinstance(add_rms_norm_kernel, triton.JITFunction):
        raise ExecutionError(
            f"kernel add_rms_norm needs tensors on a CUDA device; they are on {x.device}",
            hint="without a GPU, use `reference`, or Triton's interpreter as the tests do",
        )
    if x.numel() == 0:
        return
    columns = x.shape[-1]
    config = config_for(columns)
    with torch.accelerator.device_index(x.device.index):
        add_rms_norm_kernel[(x.numel() // columns,)](
            x,
            residual,
            weight,
            hidden,
            out,
            epsilon,
            columns=columns,
            block=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=True,  # Triton's default is about to change
        )


def _check(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor
) -> None:
    names = [str(dtype).removeprefix("torch.") for dtype in (x.dtype, weight.dtype)]
    if x.dim() == 0 or not set(names) <= set(DTYPES):
        raise ExecutionError(
            f"kernel add_rms_norm takes x [..., columns] and weight of {', '.join(DTYPES)}; "
            f"got {x.dim()} dimensions of {names[0]}, weight {names[1]}"
        )
    wanted = {"residual": (residual, x.shape, x.dtype), "weight": (weight, x.shape[-1:], weight.dtype)}
    wanted |= {"hidden": (hidden, x.shape, x.dtype), "out": (out, x.shape, x.dtype)}
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ExecutionError(
                f"kernel add_rms_norm needs {name} {list(shape)} {dtype} on {x.device}; "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    for name, tensor in {"x": x, **{name: tensor for name, (tensor, _, _) in wanted.items()}}.items():
        if not tensor.is_contiguous():
            raise ExecutionError(
                f"kernel add_rms_norm needs row-major tensors; {name} {list(tensor.shape)} has strides "
                f"{list(tensor.stride())}",
                hint="call .contiguous() on inputs; outputs must be allocated row-major",
            )


def _check_overlap(tensors: dict[str, torch.Tensor]) -> None:
    spans = {name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in tensors.items()}
    for output in ("hidden", "out"):
        begin, end = spans[output]
        for name, (other_begin, other_end) in spans.items():
            if name != output and max(begin, other_begin) < min(end, other_end):
                raise ExecutionError(f"kernel add_rms_norm needs {output} in memory of its own; it overlaps {name}")


@torch.library.custom_op("opweave::add_rms_norm_out", mutates_args=("hidden", "out"))
def operator(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    hidden: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``launch`` as the PyTorch operator ``opweave::add_rms_norm_out``, so that compiled graphs can hold it."""
    launch(x, residual, weight, epsilon, hidden=hidden, out=out)


@operator.register_fake
def _fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    hidden: torch.Tensor,
    out: torch.Tensor,
) -> None:
    _check(x, residual, weight, hidden, out)


def reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(hidden, out)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    hidden = x + residual
    wide = hidden.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return hidden, (wide * scale * weight.to(torch.float32)).to(x.dtype)


def cost(rows: int, columns: int, dtype: str, weight_dtype: str | None = None) -> Cost:
    """Flops and bytes of one launch over ``rows`` x ``columns`` elements.

    Bytes are compulsory: two matrices and the weight read, two matrices written, each once. A row wider than every
    block is read once more, soon after it was written and so mostly from cache; that is not counted.
    """
    matrix = rows * columns * DTYPE_BYTES[dtype]
    flops = rows * (5 * columns + 2)  # add, square, sum (one less), two products; the row's mean, epsilon and rsqrt
    return Cost(flops, 4 * matrix + columns * DTYPE_BYTES[weight_dtype or dtype])


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds two tensors and normalises the sum, in program order; no operator is in two matches.

    The addition is ``aten.add.Tensor`` without broadcasting or scaling; `rms_norms` says which normalisations are
    known. Where a model rounds before it multiplies by the weight, as Llama does, the kernel rounds once less. The
    sum may have other readers: the kernel writes it.
    """
    walk = Walk(graph)
    found: list[Match] = []
    taken: set[str] = set()
    for add in graph.ops:
        addends = _addends(graph, add)
        if addends is None:
            continue
        hidden = add.outputs[0]
        for norm in rms_norms(walk, hidden):
            ops = (add, *norm.ops)
            names = {op.name for op in ops}
            if names & taken or not _fits(graph, norm, hidden) or not replaceable(graph, ops, (hidden, norm.out)):
                continue
            taken |= names
            found.append(_match(graph, names, (*addends, norm.weight), hidden, norm))
    return tuple(found)


def _match(graph: Graph, names: set[str], inputs: tuple[str, ...], hidden: str, norm: RmsNorm) -> Match:
    shape, dtype = graph.tensor[hidden].shape, graph.tensor[hidden].dtype
    in_order = tuple(op.name for op in graph.ops if op.name in names)
    launch_cost = cost(math.prod(shape[:-1]), shape[-1], dtype)
    return Match(in_order, inputs, (hidden, norm.out), {"epsilon": norm.epsilon}, launch_cost)


def _addends(graph: Graph, op: Op) -> tuple[str, ...] | None:
    """The two operands of an addition that the kernel can do."""
    addends = operands(op) if op.target == "aten.add.Tensor" and len(op.outputs) == 1 else None
    if addends is None:
        return None
    total = graph.tensor[op.outputs[0]]
    fits = total.dtype in DTYPES and total.shape and len(addends) == 2
    same = all((graph.tensor[a].shape, graph.tensor[a].dtype) == (total.shape, total.dtype) for a in addends)
    return addends if fits and same and all(is_row_major(graph.tensor[a]) for a in addends) else None


def _fits(graph: Graph, norm: RmsNorm, hidden: str) -> bool:
    """Whether the normalisation has the shapes, dtypes and layouts that the kernel computes."""
    source, weight, out = (graph.tensor[name] for name in (hidden, norm.weight, norm.out))
    return (
        (weight.shape, weight.dtype) == (source.shape[-1:], source.dtype)
        and is_row_major(weight)
        and (out.shape, out.dtype) == (source.shape, source.dtype)
    )
