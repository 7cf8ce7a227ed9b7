"""Both gradients of LoRA's up-projection in one pass over the gradient of the output.

    grad_s = scale * grad_y @ b.T
    grad_b = scale * s.T @ grad_y

the third kernel of LoRAFusion (Zhu and others, arXiv 2510.00206). A program takes some tokens by some columns of
``grad_y``: what it adds to ``grad_s`` it writes for each block of tokens, what it adds to ``grad_b`` at its end, both
in float32 into scratch memory. Second launches sum those pieces in order, multiply by ``scale`` and round once: no
atomics, the same bits every time.

With ``offsets`` tokens are sorted by adapter and ``b`` holds a matrix for each (`_lora` says how); tokens without an
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
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._lora import (
    as_matrix,
    check_adapter,
    even_offsets,
    layout_of,
    owners,
    split_segment,
    strides,
    sum_pieces,
    token_splits,
)
from ._match import Cost, Match

__all__ = ["KERNEL"]

NAME = "lora_backward_down"
CONFIGS = Configs.beside(__file__)
#: Columns of a piece in any configuration: scratch memory is allocated for all of them.
WIDTHS = sorted({row.constants["block_n"] for rows in CONFIGS.rows.values() for row in rows})


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def lora_backward_down_kernel(
    grad_y_pointer: tl.tensor,
    s_pointer: tl.tensor,
    b_pointer: tl.tensor,
    offsets_pointer: tl.tensor,
    s_pieces_pointer: tl.tensor,
    b_pieces_pointer: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    stride_b: tl.tensor,
    stride_b_r: tl.tensor,
    stride_b_n: tl.tensor,
    columns: tl.constexpr,
    rank: tl.constexpr,
    adapters: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
) -> None:
    """Walk one part of an adapter's tokens in ``block_n`` columns of ``grad_y``.

    The grid has an axis for columns, one for the parts of all adapters, and one for columns of ``s``.
    """
    piece = tl.program_id(0)
    adapter = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    column = piece * block_n + tl.arange(0, block_n)
    lane = tl.program_id(2) * block_r + tl.arange(0, block_r)
    has_column = column < columns
    has_lane = (lane < rank)[None, :]
    inside = has_column[:, None] & has_lane
    b_first = b_pointer + tl.full([], adapter, tl.int64) * stride_b
    b_pointers = b_first + column.to(tl.int64)[:, None] * stride_b_n + lane.to(tl.int64)[None, :] * stride_b_r
    b = tl.load(b_pointers, mask=inside, other=0.0)
    total = tl.zeros([block_n, block_r], tl.float32)
    start, stop = split_segment(offsets_pointer, adapter, split, splits, tokens, block_m)
    for first in range(start, stop, block_m):
        row = (first + tl.arange(0, block_m)).to(tl.int64)
        has_row = (row < stop)[:, None]
        grad_y = tl.load(
            grad_y_pointer + row[:, None] * columns + column[None, :], mask=has_row & has_column[None, :], other=0.0
        )
        low = row[:, None] * rank + lane[None, :]
        s = tl.load(s_pointer + low, mask=has_row & has_lane, other=0.0)
        grad_s = tl.dot(grad_y, b, input_precision="ieee")
        total = tl.dot(tl.trans(grad_y), s, total, input_precision="ieee")
        tl.store(s_pieces_pointer + piece.to(tl.int64) * tokens * rank + low, grad_s, mask=has_row & has_lane)
    part = (split * adapters + adapter).to(tl.int64) * rank
    tl.store(b_pieces_pointer + (part + lane)[None, :] * columns + column[:, None], total, mask=inside)


def launch(
    grad_y: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    grad_s: torch.Tensor,
    grad_b: torch.Tensor,
    pieces: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``scale * grad_y @ b.T`` into ``grad_s``, ``scale * s.T @ grad_y`` into ``grad_b``, on the current stream.

    Args:
        grad_y: ``[..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        s: ``[..., rank]`` of grad_y's dtype, row-major: what the forward's ``lora_down`` wrote.
        b: ``[rank, columns]`` of grad_y's dtype and any strides; with ``offsets`` ``[adapters, rank, columns]``.
        offsets: int32 or int64 ``[adapters + 1]``, ascending; or None.
        scale: that of the forward.
        grad_s: as ``s``; written, shares no memory with any other argument.
        grad_b: b's shape and dtype, row-major; written, shares no memory with any other argument.
        pieces: scratch memory as ``allocate`` makes it, float32; shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or a written one overlaps something.
    """
    _check(grad_y, s, b, offsets)
    check_tensor(NAME, "grad_s", grad_s, s.shape, s.dtype, s.device)
    check_tensor(NAME, "grad_b", grad_b, b.shape, b.dtype, b.device)
    columns, rank, adapters = grad_y.shape[-1], s.shape[-1], 1 if offsets is None else b.shape[0]
    tokens = math.prod(grad_y.shape[:-1])
    sizes = {"tokens": tokens, "columns": columns, "rank": rank}
    config = config or CONFIGS.choose(grad_y.device, grad_y.dtype, **sizes, **layout_of(grad_y))
    wide, splits = _grid(tokens, columns, adapters, config.constants["block_n"])
    needed = wide * grad_s.numel() + splits * grad_b.numel()
    check_tensor(NAME, "pieces", pieces, (None,), torch.float32, grad_y.device)
    if pieces.numel() < needed:
        raise fail(NAME, f"needs pieces of {needed} elements; got {pieces.numel()}")
    read = {"grad_y": grad_y, "s": s, "b": b, "offsets": offsets}
    written = {"grad_s": grad_s, "grad_b": grad_b, "pieces": pieces}
    check_apart(NAME, written, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, lora_backward_down_kernel, grad_y)
    if grad_s.numel() == grad_b.numel() == 0:
        return
    s_pieces, b_pieces = pieces[: wide * grad_s.numel()], pieces[wide * grad_s.numel() :]
    with torch.accelerator.device_index(grad_y.device.index):
        if wide:
            lora_backward_down_kernel[(wide, adapters * splits, triton.cdiv(rank, config.constants["block_r"]))](
                grad_y,
                s,
                b,
                offsets,
                s_pieces,
                b_pieces,
                tokens,
                splits,
                *strides(b),
                columns=columns,
                rank=rank,
                adapters=adapters,
                **config.options,
            )
            sum_pieces(b_pieces, splits, grad_b, scale)
        if tokens:
            sum_pieces(s_pieces, wide, grad_s, scale, offsets)


def _grid(tokens: int, columns: int, adapters: int, block_n: int) -> tuple[int, int]:
    """Pieces along the columns, and parts of each adapter's tokens."""
    wide = triton.cdiv(columns, block_n)
    return wide, token_splits(tokens, wide * adapters)


def _check(grad_y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None) -> None:
    check_tensor(NAME, "grad_y", grad_y, (*[None] * max(grad_y.dim(), 1),), FLOATS, grad_y.device)
    check_adapter(NAME, "b", b, (None, grad_y.shape[-1]), offsets, grad_y)
    check_tensor(NAME, "s", s, (*grad_y.shape[:-1], b.shape[-2]), grad_y.dtype, grad_y.device)


def allocate(
    grad_y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(grad_s, grad_b, pieces)``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(grad_y, s, b, offsets)
    adapters = 1 if offsets is None else b.shape[0]
    grids = [_grid(math.prod(s.shape[:-1]), grad_y.shape[-1], adapters, block_n) for block_n in WIDTHS]
    most = max(wide for wide, _ in grids) * s.numel() + max(splits for _, splits in grids) * b.numel()
    pieces = grad_y.new_empty(most, dtype=torch.float32)
    return torch.empty_like(s), b.new_empty(b.shape), pieces


def reference(
    grad_y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(grad_s, grad_b)`` by plain PyTorch on any device, each rounded once; shapes as ``launch``."""
    wide, low = as_matrix(grad_y).float(), as_matrix(s).float()
    owner = owners(offsets, len(low), low.device)[:, None]
    grad_s, grad_b = torch.zeros_like(low), []
    for adapter, matrix in enumerate(b if offsets is not None else b[None]):
        grad_s = torch.where(owner == adapter, wide @ matrix.float().t(), grad_s)
        grad_b.append(torch.where(owner == adapter, low, 0.0).t() @ wide)
    return (scale * grad_s).to(s.dtype).view(s.shape), (scale * torch.stack(grad_b)).to(b.dtype).view(b.shape)


def eager(
    grad_y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What autograd does behind PEFT's layer: a scaling and two products, for each adapter."""
    scaled, low = (scale * grad_y).flatten(0, -2), s.flatten(0, -2)
    if offsets is None:
        return (scaled @ b.t()).view(s.shape), low.t() @ scaled
    grad_s, grad_b, bounds = torch.zeros_like(low), torch.empty_like(b), offsets.tolist()
    for adapter, (begin, end) in enumerate(pairwise(bounds)):
        grad_s[begin:end] = scaled[begin:end] @ b[adapter].t()
        grad_b[adapter] = low[begin:end].t() @ scaled[begin:end]
    return grad_s.view(s.shape), grad_b


def cost(dtype: str, tokens: int, columns: int, rank: int, adapters: int = 0) -> Cost:
    """Flops and bytes of one launch: two products, and a scaling of either result.

    Bytes are compulsory, each tensor read or written once; the pieces in scratch memory are not counted.
    """
    matrix = max(adapters, 1) * rank * columns
    flops = 4 * tokens * columns * rank + tokens * rank + matrix
    return Cost(flops, (tokens * (columns + 2 * rank) + 2 * matrix) * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    columns: int,
    rank: int,
    adapters: int = 0,
    scale: float = 0.3,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; ``b`` is PEFT's weight, transposed."""
    random = normal(device, seed)
    matrices = (random(max(adapters, 1), columns, rank) / math.sqrt(max(columns, 1))).to(dtype).transpose(1, 2)
    return {
        "grad_y": random(tokens, columns).to(dtype),
        "s": (random(tokens, rank) / math.sqrt(max(tokens, 1))).to(dtype),
        "b": matrices if adapters else matrices[0],
        "offsets": even_offsets(tokens, adapters, device),
        "scale": scale,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """None: autograd of PyTorch's layers computes the gradient of their weight, the transpose of ``grad_b``.

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
        Workload("Llama-3 8B query, rank 16, 4096 tokens", {"tokens": 4096, "columns": 4096, "rank": 16}),
        Workload("Llama-3 8B MLP up, rank 64, 8192 tokens", {"tokens": 8192, "columns": 14336, "rank": 64}),
        Workload("Llama-3 70B query, rank 64, 8192 tokens", {"tokens": 8192, "columns": 8192, "rank": 64}),
        Workload(
            "Llama-3 8B query, 4 adapters of rank 16, 8192 tokens",
            {"tokens": 8192, "columns": 4096, "rank": 16, "adapters": 4},
        ),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("pieces",),
)
