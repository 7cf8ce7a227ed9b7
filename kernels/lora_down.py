"""Dropout and LoRA's down-projection in one pass over the activations.

    s = dropout(x, p) @ a

of Hu and others (ICLR 2022), to the rank-r tensor ``s`` at which LoRAFusion (Zhu and others, arXiv 2510.00206) splits
the layer: it is small enough to be written, and all else is fused around it. The dropped-out activations are never
stored: `_dropout` says how the mask follows from ``seed``, and the backward computes it again. Products are summed in
float32, multiplied by ``1 / (1 - p)`` there, and ``s`` is rounded once; ``p = 0`` is the plain product. Where PyTorch
rounds the kept elements after scaling them, this does not.

With ``offsets`` tokens are sorted by adapter and ``a`` holds a matrix for each (`_lora` says how); tokens without an
adapter get zeros.
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
from ._dropout import kept, mask, scaling, threshold
from ._kernel import Kernel, Workload, normal
from ._lora import as_matrix, check_adapter, check_dropout, even_offsets, layout_of, owners, segment, strides, touched
from ._match import Cost, Match

__all__ = ["KERNEL"]

NAME = "lora_down"
CONFIGS = Configs.beside(__file__)


@triton.jit(do_not_specialize=["least"])  # type: ignore[untyped-decorator] # triton ships no types
def lora_down_kernel(
    x_pointer: tl.tensor,
    a_pointer: tl.tensor,
    seed_pointer: tl.tensor,
    offsets_pointer: tl.tensor,
    s_pointer: tl.tensor,
    tokens: tl.tensor,
    stride_a: tl.tensor,
    stride_k: tl.tensor,
    stride_r: tl.tensor,
    least: tl.tensor,
    scale: tl.tensor,
    depth: tl.constexpr,
    rank: tl.constexpr,
    adapters: tl.constexpr,
    block_adapters: tl.constexpr,
    dropout: tl.constexpr,
    block_m: tl.constexpr,
    block_r: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Compute ``block_m`` tokens by ``block_r`` columns of row-major ``s``; the grid has an axis for each.

    A tile that several adapters share is computed once for each of them, and each writes its own rows.
    """
    start = tl.program_id(0) * block_m
    row = start + tl.arange(0, block_m)
    column = tl.program_id(1) * block_r + tl.arange(0, block_r)
    lane = tl.arange(0, block_k)
    has_column = (column < rank)[None, :]
    at = row.to(tl.int64)[:, None] * rank + column[None, :]
    if dropout:
        seed = tl.load(seed_pointer)
    if offsets_pointer is not None:
        # Not the names of the loop below: offsets may have 64 bits, what it finds has 32.
        first_token = tl.load(offsets_pointer)
        behind = tl.load(offsets_pointer + adapters)
        orphan = (row < tokens) & ((row < first_token) | (row >= behind))
        nothing = tl.zeros([block_m, block_r], s_pointer.dtype.element_ty)
        tl.store(s_pointer + at, nothing, mask=orphan[:, None] & has_column)
    first_adapter, last_adapter = touched(offsets_pointer, start, block_m, adapters, block_adapters)
    for adapter in range(first_adapter, last_adapter):
        begin, end = segment(offsets_pointer, adapter, tokens)
        mine = ((row >= begin) & (row < end))[:, None]
        x_pointers = x_pointer + row.to(tl.int64)[:, None] * depth + lane[None, :]
        a_pointers = a_pointer + tl.full([], adapter, tl.int64) * stride_a
        a_pointers += lane.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_r
        step = tl.full([], block_k, tl.int64) * stride_k
        total = tl.zeros([block_m, block_r], tl.float32)
        for first in range(0, depth, block_k):
            has_depth = lane < depth - first
            x = tl.load(x_pointers, mask=mine & has_depth[None, :], other=0.0)
            if dropout:
                x = tl.where(kept(seed, row, first, least, block_k), x, 0.0)
            a = tl.load(a_pointers, mask=has_depth[:, None] & has_column, other=0.0)
            total = tl.dot(x, a, total, input_precision="ieee")
            x_pointers += block_k
            a_pointers += step
        tl.store(s_pointer + at, (total * scale).to(s_pointer.dtype.element_ty), mask=mine & has_column)


def launch(
    x: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
    *,
    s: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``dropout(x, p) @ a`` into ``s``, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        a: ``[depth, rank]`` of x's dtype and any strides: ``lora_A.weight.t()`` of PEFT. With ``offsets``
            ``[adapters, depth, rank]``.
        seed: int64 ``[1]``; says which elements are dropped. Not read where ``p`` is 0.
        offsets: int32 or int64 ``[adapters + 1]``, ascending; or None.
        p: the probability with which an element is dropped.
        s: ``[..., rank]`` of x's dtype, row-major; written, shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, the output overlaps something, or ``p``
            is no probability.
    """
    _check(x, a, seed, offsets, p)
    depth, rank = a.shape[-2:]
    check_tensor(NAME, "s", s, (*x.shape[:-1], rank), x.dtype, x.device)
    read = {"x": x, "a": a, "seed": seed, "offsets": offsets}
    check_apart(NAME, {"s": s}, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, lora_down_kernel, x)
    if s.numel() == 0:
        return
    tokens, adapters = s.numel() // rank, 1 if offsets is None else a.shape[0]
    config = config or CONFIGS.choose(x.device, x.dtype, tokens=tokens, depth=depth, rank=rank, **layout_of(x, a))
    grid = (triton.cdiv(tokens, config.constants["block_m"]), triton.cdiv(rank, config.constants["block_r"]))
    with torch.accelerator.device_index(x.device.index):
        lora_down_kernel[grid](
            x,
            a,
            seed,
            offsets,
            s,
            tokens,
            *strides(a),
            threshold(p),
            scaling(p),
            depth=depth,
            rank=rank,
            adapters=adapters,
            block_adapters=triton.next_power_of_2(adapters),
            dropout=p > 0,
            **config.options,
        )


def _check(x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, offsets: torch.Tensor | None, p: float) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_adapter(NAME, "a", a, (x.shape[-1], None), offsets, x)
    check_dropout(NAME, p, seed, x.device)


def allocate(
    x: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> tuple[torch.Tensor]:
    """A new ``s``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, a, seed, offsets, p)
    return (x.new_empty(*x.shape[:-1], a.shape[-1]),)


def reference(
    x: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> tuple[torch.Tensor]:
    """``(s,)`` by plain PyTorch on any device, with the kernel's mask and its one rounding; shapes as ``launch``."""
    wide = as_matrix(x).float()
    if p > 0 and seed is not None:
        wide = torch.where(mask(wide.shape, p, seed), wide, 0.0)
    owner = owners(offsets, len(wide), x.device)[:, None]
    total = wide.new_zeros(len(wide), a.shape[-1])
    for adapter, matrix in enumerate(a if offsets is not None else a[None]):
        total = torch.where(owner == adapter, wide @ matrix.float(), total)
    return ((total * scaling(p)).to(x.dtype).reshape(*x.shape[:-1], a.shape[-1]),)


def eager(
    x: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """What PEFT says, with PyTorch's own generator; several adapters one after the other."""
    dropped = torch.nn.functional.dropout(x, p)
    if offsets is None:
        return torch.nn.functional.linear(dropped, a.t())
    s, rows = x.new_zeros(*x.shape[:-1], a.shape[-1]), dropped.flatten(0, -2)
    bounds = offsets.tolist()
    for matrix, (begin, end) in zip(a, pairwise(bounds), strict=True):
        s.view(-1, a.shape[-1])[begin:end] = torch.nn.functional.linear(rows[begin:end], matrix.t())
    return s


def cost(dtype: str, tokens: int, depth: int, rank: int, adapters: int = 0, p: float = 0.0) -> Cost:
    """Flops and bytes of one launch: the product, and with dropout one scaling for each element of ``s``.

    Random numbers are integers and no flops. Bytes are compulsory, each tensor read or written once.
    """
    flops = tokens * rank * (2 * depth + (p > 0))
    return Cost(flops, (tokens * (depth + rank) + max(adapters, 1) * depth * rank) * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    depth: int,
    rank: int,
    adapters: int = 0,
    p: float = 0.0,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; ``a`` is PEFT's weight, transposed."""
    random = normal(device, seed)
    matrices = (random(max(adapters, 1), rank, depth) / math.sqrt(max(depth, 1))).to(dtype).transpose(1, 2)
    return {
        "x": random(tokens, depth).to(dtype),
        "a": matrices if adapters else matrices[0],
        "seed": torch.full((1,), seed + 7, dtype=torch.int64, device=device),
        "offsets": even_offsets(tokens, adapters, device),
        "p": p,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """None: without dropout this is a plain product, and PyTorch's dropout draws other masks.

    The operator is called directly, or by `lora`.
    """
    return ()


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
        Workload("Llama-3 8B attention, rank 16, 4096 tokens", {"tokens": 4096, "depth": 4096, "rank": 16, "p": 0.1}),
        Workload("Llama-3 8B MLP down, rank 64, 8192 tokens", {"tokens": 8192, "depth": 14336, "rank": 64, "p": 0.1}),
        Workload("Llama-3 70B attention, rank 64, 8192 tokens", {"tokens": 8192, "depth": 8192, "rank": 64, "p": 0.1}),
        Workload(
            "Llama-3 8B attention, 4 adapters of rank 16, 8192 tokens",
            {"tokens": 8192, "depth": 4096, "rank": 16, "adapters": 4, "p": 0.1},
        ),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
