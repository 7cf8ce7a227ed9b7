"""The gradient of LoRA's down-projection: the dropout mask computed again, in one pass over the activations.

    grad_a = dropout(x, p).T @ grad_s

with the mask of ``lora_down`` from the same ``seed`` and ``grad_s`` of ``lora_backward_down``. A program takes some
columns of ``x`` and some tokens and sums in float32 into scratch memory; a second launch adds those pieces in order,
multiplies by ``1 / (1 - p)`` and rounds once: no atomics, the same bits every time. LoRAFusion (Zhu and others, arXiv
2510.00206) splits the graph likewise: the gradient of the input needs no ``x``.

With ``offsets`` tokens are sorted by adapter and ``grad_a`` holds a matrix for each (`_lora` says how).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._dropout import kept, mask, scaling, threshold
from ._kernel import Kernel, Workload, normal
from ._lora import (
    as_matrix,
    check_dropout,
    check_offsets,
    even_offsets,
    layout_of,
    owners,
    split_segment,
    sum_pieces,
    token_splits,
)
from ._match import Cost, Match

__all__ = ["KERNEL"]

NAME = "lora_backward_weight"
CONFIGS = Configs.beside(__file__)
#: The widest tile of any configuration, of which there are fewest and which splits tokens most.
WIDEST = max(row.constants["block_k"] for rows in CONFIGS.rows.values() for row in rows)


@triton.jit(do_not_specialize=["least"])  # type: ignore[untyped-decorator] # triton ships no types
def lora_backward_weight_kernel(
    x_pointer: tl.tensor,
    grad_s_pointer: tl.tensor,
    seed_pointer: tl.tensor,
    offsets_pointer: tl.tensor,
    pieces_pointer: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    least: tl.tensor,
    depth: tl.constexpr,
    rank: tl.constexpr,
    adapters: tl.constexpr,
    dropout: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """Walk one part of an adapter's tokens in ``block_k`` columns of ``x``.

    The grid has an axis for columns of ``x``, one for the parts of all adapters, and one for columns of ``grad_s``.
    """
    adapter = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    column = tl.program_id(0) * block_k + tl.arange(0, block_k)
    lane = tl.program_id(2) * block_r + tl.arange(0, block_r)
    has_column = column < depth
    has_lane = (lane < rank)[None, :]
    if dropout:
        seed = tl.load(seed_pointer)
    total = tl.zeros([block_k, block_r], tl.float32)
    start, stop = split_segment(offsets_pointer, adapter, split, splits, tokens, block_m)
    for first in range(start, stop, block_m):
        row = first + tl.arange(0, block_m)
        has_row = (row < stop)[:, None]
        wide = row.to(tl.int64)[:, None]
        x = tl.load(x_pointer + wide * depth + column[None, :], mask=has_row & has_column[None, :], other=0.0)
        if dropout:
            x = tl.where(kept(seed, row, tl.program_id(0) * block_k, least, block_k), x, 0.0)
        grad_s = tl.load(grad_s_pointer + wide * rank + lane[None, :], mask=has_row & has_lane, other=0.0)
        total = tl.dot(tl.trans(x), grad_s, total, input_precision="ieee")
    part = (split * adapters + adapter).to(tl.int64) * depth
    at = (part + column)[:, None] * rank + lane[None, :]
    tl.store(pieces_pointer + at, total, mask=has_column[:, None] & has_lane)


def launch(
    x: torch.Tensor,
    grad_s: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
    *,
    grad_a: torch.Tensor,
    pieces: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``dropout(x, p).T @ grad_s`` into ``grad_a``, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        grad_s: ``[..., rank]`` of x's dtype, row-major, with x's leading dimensions.
        seed: int64 ``[1]``, that of the forward. Not read where ``p`` is 0.
        offsets: int32 or int64 ``[adapters + 1]``, ascending; or None.
        p: the probability with which the forward dropped an element.
        grad_a: ``[depth, rank]`` of x's dtype, with ``offsets`` ``[adapters, depth, rank]``, row-major; written,
            shares no memory with any other argument.
        pieces: scratch memory as ``allocate`` makes it, float32; shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, a written one overlaps something, or
            ``p`` is no probability.
    """
    _check(x, grad_s, seed, offsets, p)
    check_tensor(NAME, "grad_a", grad_a, _shape(x, grad_s, offsets), x.dtype, x.device)
    depth, rank, adapters = x.shape[-1], grad_s.shape[-1], 1 if offsets is None else grad_a.shape[0]
    tokens = math.prod(x.shape[:-1])
    config = config or CONFIGS.choose(x.device, x.dtype, tokens=tokens, depth=depth, rank=rank, **layout_of(x))
    wide, splits = _grid(tokens, depth, adapters, config.constants["block_k"])
    check_tensor(NAME, "pieces", pieces, (None,), torch.float32, x.device)
    if pieces.numel() < splits * grad_a.numel():
        raise fail(NAME, f"needs pieces of {splits * grad_a.numel()} elements; got {pieces.numel()}")
    read = {"x": x, "grad_s": grad_s, "seed": seed, "offsets": offsets}
    written = {"grad_a": grad_a, "pieces": pieces}
    check_apart(NAME, written, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, lora_backward_weight_kernel, x)
    if grad_a.numel() == 0:
        return
    with torch.accelerator.device_index(x.device.index):
        lora_backward_weight_kernel[(wide, adapters * splits, triton.cdiv(rank, config.constants["block_r"]))](
            x,
            grad_s,
            seed,
            offsets,
            pieces,
            tokens,
            splits,
            threshold(p),
            depth=depth,
            rank=rank,
            adapters=adapters,
            dropout=p > 0,
            **config.options,
        )
        sum_pieces(pieces, splits, grad_a, scaling(p))


def _grid(tokens: int, depth: int, adapters: int, block_k: int) -> tuple[int, int]:
    """Pieces along the columns of ``x``, and parts of each adapter's tokens."""
    wide = triton.cdiv(depth, block_k)
    return wide, token_splits(tokens, wide * adapters)


def _shape(x: torch.Tensor, grad_s: torch.Tensor, offsets: torch.Tensor | None) -> tuple[int, ...]:
    matrix = (x.shape[-1], grad_s.shape[-1])
    return matrix if offsets is None else (len(offsets) - 1, *matrix)


def _check(
    x: torch.Tensor, grad_s: torch.Tensor, seed: torch.Tensor | None, offsets: torch.Tensor | None, p: float
) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "grad_s", grad_s, (*x.shape[:-1], None), x.dtype, x.device)
    check_offsets(NAME, offsets, x.device)
    check_dropout(NAME, p, seed, x.device)


def allocate(
    x: torch.Tensor,
    grad_s: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(grad_a, pieces)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, grad_s, seed, offsets, p)
    grad_a = x.new_empty(_shape(x, grad_s, offsets))
    adapters = 1 if offsets is None else len(offsets) - 1
    _, splits = _grid(math.prod(x.shape[:-1]), x.shape[-1], adapters, WIDEST)
    return grad_a, x.new_empty(splits * grad_a.numel(), dtype=torch.float32)


def reference(
    x: torch.Tensor,
    grad_s: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> tuple[torch.Tensor]:
    """``(grad_a,)`` by plain PyTorch on any device, with the kernel's mask and its one rounding."""
    wide, low = as_matrix(x).float(), as_matrix(grad_s).float()
    if p > 0 and seed is not None:
        wide = torch.where(mask(wide.shape, p, seed), wide, 0.0)
    owner = owners(offsets, len(low), low.device)[:, None]
    count = 1 if offsets is None else len(offsets) - 1
    grad_a = torch.stack([wide.t() @ torch.where(owner == adapter, low, 0.0) for adapter in range(count)])
    return ((scaling(p) * grad_a).to(x.dtype).view(_shape(x, grad_s, offsets)),)


def eager(
    x: torch.Tensor,
    grad_s: torch.Tensor,
    seed: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    p: float = 0.0,
) -> torch.Tensor:
    """What autograd does behind PEFT's layer, but for the mask, which is drawn instead of stored."""
    rows, low = torch.nn.functional.dropout(x, p).flatten(0, -2), grad_s.flatten(0, -2)
    if offsets is None:
        return rows.t() @ low
    bounds = offsets.tolist()
    return torch.stack([rows[i:j].t() @ low[i:j] for i, j in pairwise(bounds)])


def cost(dtype: str, tokens: int, depth: int, rank: int, adapters: int = 0, p: float = 0.0) -> Cost:
    """Flops and bytes of one launch: the product, and with dropout a scaling of the result.

    Bytes are compulsory, each tensor read or written once; the pieces in scratch memory are not counted.
    """
    matrix = max(adapters, 1) * depth * rank
    return Cost(2 * tokens * depth * rank + matrix * (p > 0), (tokens * (depth + rank) + matrix) * DTYPE_BYTES[dtype])


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
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    return {
        "x": random(tokens, depth).to(dtype),
        "grad_s": (random(tokens, rank) / math.sqrt(max(tokens, 1))).to(dtype),
        "seed": torch.full((1,), seed + 7, dtype=torch.int64, device=device),
        "offsets": even_offsets(tokens, adapters, device),
        "p": p,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """None: without dropout this is a plain product; for PyTorch's dropout autograd reads a mask of another generator.

    The operator is called directly, or by `lora`'s autograd.
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
    scratch=("pieces",),
)
