"""The gradient of a LoRA layer's input: a linear layer's and the adapter's in one accumulator.

    grad_x = grad_y @ w.T + mask / (1 - p) * (grad_s @ a.T)

the last kernel of LoRAFusion (Zhu and others, arXiv 2510.00206). ``grad_s`` is what ``lora_backward_down`` writes, the
mask is that of ``lora_down``, computed again from ``seed``. The product of rank r comes first; mask and scaling are
applied while nothing else is in the accumulator, and the main loop over ``grad_y @ w.T`` goes on from there. All sums
are in float32 and ``grad_x`` is rounded once, where separate operators round both products and their sum.

With ``offsets`` tokens are sorted by adapter and ``a`` holds a matrix for each (`_lora` says how).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._dropout import dropped, mask, scaling, threshold
from ._kernel import Kernel, Workload, normal
from ._lora import (
    accumulated,
    as_matrix,
    check_adapter,
    check_dropout,
    even_offsets,
    layout_of,
    owners,
    segment,
    strides,
    touched,
)
from ._match import Cost, Match
from ._tiles import swizzled

__all__ = ["KERNEL"]

NAME = "lora_backward_input"
CONFIGS = Configs.beside(__file__)


@triton.jit(do_not_specialize=["least"])  # type: ignore[untyped-decorator] # triton ships no types
def lora_backward_input_kernel(
    grad_y_pointer: tl.tensor,
    w_pointer: tl.tensor,
    grad_s_pointer: tl.tensor,
    a_pointer: tl.tensor,
    seed_pointer: tl.tensor,
    offsets_pointer: tl.tensor,
    grad_x_pointer: tl.tensor,
    tokens: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    stride_a: tl.tensor,
    stride_a_k: tl.tensor,
    stride_a_r: tl.tensor,
    least: tl.tensor,
    scale: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    rank: tl.constexpr,
    adapters: tl.constexpr,
    block_adapters: tl.constexpr,
    dropout: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_r: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of row-major ``grad_x``; the grid is the number of tiles."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(tokens, block_m), tl.cdiv(depth, block_n), group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    has_column = (column < depth)[None, :]
    total = tl.zeros([block_m, block_n], tl.float32)
    first_adapter, last_adapter = touched(offsets_pointer, tile_m * block_m, block_m, adapters, block_adapters)
    for adapter in range(first_adapter, last_adapter):
        begin, end = segment(offsets_pointer, adapter, tokens)
        mine = ((row >= begin) & (row < end))[:, None]
        a_first = a_pointer + tl.full([], adapter, tl.int64) * stride_a
        for first in range(0, rank, block_r):
            lane = first + tl.arange(0, block_r)
            grad_s = tl.load(
                grad_s_pointer + row.to(tl.int64)[:, None] * rank + lane[None, :],
                mask=mine & (lane < rank)[None, :],
                other=0.0,
            )
            a = tl.load(
                a_first + lane.to(tl.int64)[:, None] * stride_a_r + column.to(tl.int64)[None, :] * stride_a_k,
                mask=(lane < rank)[:, None] & has_column,
                other=0.0,
            )
            total = tl.dot(grad_s, a, total, input_precision="ieee")
    if dropout:
        total = dropped(total * scale, tl.load(seed_pointer), row, tile_n * block_n, least, block_n)
    total = accumulated(
        total, grad_y_pointer, w_pointer, row, column, tokens, stride_n, stride_k, depth, columns, block_k
    )
    at = row.to(tl.int64)[:, None] * depth + column[None, :]
    tl.store(grad_x_pointer + at, total.to(grad_x_pointer.dtype.element_ty), mask=(row < tokens)[:, None] & has_column)


def launch(
    grad_y: torch.Tensor,
    w: torch.Tensor,
    grad_s: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
    *,
    grad_x: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``grad_y @ w.T + mask / (1 - p) * (grad_s @ a.T)`` into ``grad_x``, on the current stream.

    Args:
        grad_y: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        w: ``[depth, columns]`` of grad_y's dtype and any strides.
        grad_s: ``[..., rank]`` of grad_y's dtype, row-major, with its leading dimensions.
        a: ``[depth, rank]`` of grad_y's dtype and any strides; with ``offsets`` ``[adapters, depth, rank]``.
        seed: int64 ``[1]``, that of the forward. Not read where ``p`` is 0.
        offsets: int32 or int64 ``[adapters + 1]``, ascending; or None.
        p: the probability with which the forward dropped an element.
        grad_x: ``[..., depth]`` of grad_y's dtype, row-major; written, shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, the output overlaps something, or ``p``
            is no probability.
    """
    _check(grad_y, w, grad_s, a, seed, offsets, p)
    (depth, columns), rank = w.shape, grad_s.shape[-1]
    check_tensor(NAME, "grad_x", grad_x, (*grad_y.shape[:-1], depth), grad_y.dtype, grad_y.device)
    read = {"grad_y": grad_y, "w": w, "grad_s": grad_s, "a": a, "seed": seed, "offsets": offsets}
    check_apart(NAME, {"grad_x": grad_x}, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, lora_backward_input_kernel, grad_y)
    if grad_x.numel() == 0:
        return
    tokens, adapters = grad_x.numel() // depth, 1 if offsets is None else a.shape[0]
    config = config or CONFIGS.choose(
        grad_y.device,
        grad_y.dtype,
        tokens=tokens,
        columns=columns,
        depth=depth,
        rank=rank,
        **layout_of(grad_y, w, columns=depth),
    )
    tiles = triton.cdiv(tokens, config.constants["block_m"]) * triton.cdiv(depth, config.constants["block_n"])
    with torch.accelerator.device_index(grad_y.device.index):
        lora_backward_input_kernel[(tiles,)](
            grad_y,
            w,
            grad_s,
            a,
            seed,
            offsets,
            grad_x,
            tokens,
            *w.stride(),
            *strides(a),
            threshold(p),
            scaling(p),
            columns=columns,
            depth=depth,
            rank=rank,
            adapters=adapters,
            block_adapters=triton.next_power_of_2(adapters),
            dropout=p > 0,
            **config.options,
        )


def _check(
    grad_y: torch.Tensor,
    w: torch.Tensor,
    grad_s: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None,
    offsets: torch.Tensor | None,
    p: float,
) -> None:
    check_tensor(NAME, "grad_y", grad_y, (*[None] * max(grad_y.dim(), 1),), FLOATS, grad_y.device)
    check_tensor(NAME, "w", w, (None, grad_y.shape[-1]), grad_y.dtype, grad_y.device, row_major=False)
    check_adapter(NAME, "a", a, (w.shape[0], None), offsets, grad_y)
    check_tensor(NAME, "grad_s", grad_s, (*grad_y.shape[:-1], a.shape[-1]), grad_y.dtype, grad_y.device)
    check_dropout(NAME, p, seed, grad_y.device)


def allocate(
    grad_y: torch.Tensor,
    w: torch.Tensor,
    grad_s: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> tuple[torch.Tensor]:
    """A new ``grad_x``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(grad_y, w, grad_s, a, seed, offsets, p)
    return (grad_y.new_empty(*grad_y.shape[:-1], w.shape[0]),)


def reference(
    grad_y: torch.Tensor,
    w: torch.Tensor,
    grad_s: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> tuple[torch.Tensor]:
    """``(grad_x,)`` by plain PyTorch on any device, with the kernel's mask and its one rounding."""
    low = as_matrix(grad_s).float()
    owner = owners(offsets, len(low), low.device)[:, None]
    part = low.new_zeros(len(low), w.shape[0])
    for adapter, matrix in enumerate(a if offsets is not None else a[None]):
        part += torch.where(owner == adapter, low, 0.0) @ matrix.float().t()
    if p > 0 and seed is not None:
        part = torch.where(mask(part.shape, p, seed), part * scaling(p), 0.0)
    total = as_matrix(grad_y).float() @ w.float().t() + part
    return (total.to(grad_y.dtype).reshape(*grad_y.shape[:-1], w.shape[0]),)


def eager(
    grad_y: torch.Tensor,
    w: torch.Tensor,
    grad_s: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """What autograd does behind PEFT's layer: two products, the mask, a sum; the mask is drawn instead of stored."""
    if offsets is None:
        part = grad_s @ a.t()
    else:
        part, bounds = grad_y.new_empty(*grad_y.shape[:-1], w.shape[0]), offsets.tolist()
        part.zero_()
        for matrix, (begin, end) in zip(a, pairwise(bounds), strict=True):
            part.flatten(0, -2)[begin:end] = grad_s.flatten(0, -2)[begin:end] @ matrix.t()
    return grad_y @ w.t() + torch.nn.functional.dropout(part, p)


def cost(dtype: str, tokens: int, depth: int, columns: int, rank: int, adapters: int = 0, p: float = 0.0) -> Cost:
    """Flops and bytes of one launch: two products and, with dropout, a scaling; each tensor read or written once.

    The second product adds to what the first left, so it counts as many additions as multiplications.
    """
    elements = tokens * depth
    values = tokens * (columns + rank) + depth * columns + max(adapters, 1) * rank * depth + elements
    return Cost(elements * (2 * columns + 2 * rank + (p > 0)), values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    depth: int,
    columns: int,
    rank: int,
    adapters: int = 0,
    p: float = 0.0,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; ``w`` and ``a`` are weights of torch layers, transposed."""
    random = normal(device, seed)
    matrices = (random(max(adapters, 1), rank, depth) / math.sqrt(max(rank, 1))).to(dtype).transpose(1, 2)
    return {
        "grad_y": random(tokens, columns).to(dtype),
        "w": (random(columns, depth) / math.sqrt(max(columns, 1))).to(dtype).t(),
        "grad_s": random(tokens, rank).to(dtype),
        "a": matrices if adapters else matrices[0],
        "seed": torch.full((1,), seed + 7, dtype=torch.int64, device=device),
        "offsets": even_offsets(tokens, adapters, device),
        "p": p,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """None: autograd emits this sum for PyTorch's dropout, with a stored mask of another generator.

    Without dropout it is a sum that `lora_linear` matches. The operator is called directly, or by `lora`'s autograd.
    """
    return ()


def _workload(name: str, tokens: int, depth: int, columns: int, rank: int, adapters: int = 0) -> Workload:
    sizes = {"tokens": tokens, "depth": depth, "columns": columns, "rank": rank, "adapters": adapters}
    return Workload(name, {**sizes, "p": 0.1})


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
        _workload("Llama-3 8B query, rank 16, 4096 tokens", 4096, 4096, 4096, 16),
        _workload("Llama-3 8B MLP up, rank 64, 8192 tokens", 8192, 4096, 14336, 64),
        _workload("Llama-3 70B query, rank 64, 8192 tokens", 8192, 8192, 8192, 64),
        _workload("Llama-3 8B query, 4 adapters of rank 16, 8192 tokens", 8192, 4096, 4096, 16, 4),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
