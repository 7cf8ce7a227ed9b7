"""What the LoRA kernels share: several adapters in one batch, the main loop, and checks.

Several adapters take tokens sorted by adapter: ``offsets`` ``[adapters + 1]`` holds where the tokens of each begin,
and where those of the last end. Tokens before the first and behind the last have none. Without ``offsets`` one
adapter has all tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._checks import check_tensor, fail

__all__ = [
    "accumulated",
    "as_matrix",
    "check_adapter",
    "check_dropout",
    "check_offsets",
    "even_offsets",
    "layout_of",
    "owners",
    "segment",
    "split_segment",
    "strides",
    "sum_pieces",
    "token_splits",
    "touched",
]


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def segment(offsets_pointer: tl.tensor, adapter: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The first token of an adapter and the one behind its last, never outside of ``tokens``."""
    if offsets_pointer is None:
        return 0, tokens
    else:
        begin = tl.load(offsets_pointer + adapter).to(tl.int32)
        end = tl.load(offsets_pointer + adapter + 1).to(tl.int32)
        return tl.maximum(begin, 0), tl.minimum(end, tokens)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def split_segment(
    offsets_pointer: tl.tensor,
    adapter: tl.tensor,
    split: tl.tensor,
    splits: tl.tensor,
    tokens: tl.tensor,
    block_m: tl.constexpr,
) -> tl.tensor:
    """The first token and the one behind the last in one of ``splits`` parts of an adapter's: whole blocks each."""
    begin, end = segment(offsets_pointer, adapter, tokens)
    span = tl.cdiv(tl.cdiv(end - begin, splits), block_m) * block_m
    start = begin + split * span
    return start, tl.minimum(end, start + span)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def touched(
    offsets_pointer: tl.tensor, first: tl.tensor, count: tl.constexpr, adapters: tl.constexpr, block: tl.constexpr
) -> tl.tensor:
    """The first of the adapters that have any of ``count`` tokens from ``first`` on, and the one behind the last.

    ``block`` is a power of two and at least ``adapters``.
    """
    if offsets_pointer is None:
        return 0, 1
    else:
        lane = tl.arange(0, block)
        begin = tl.load(offsets_pointer + lane, mask=lane < adapters, other=2147483647)
        end = tl.load(offsets_pointer + lane + 1, mask=lane < adapters, other=2147483647)
        before = tl.sum((end <= first).to(tl.int32), axis=0)
        return before, tl.sum((begin < first + count).to(tl.int32), axis=0)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def accumulated(
    total: tl.tensor,
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    block_k: tl.constexpr,
) -> tl.tensor:
    """``total + x[row] @ weight[:, column]`` in float32; ``x`` is row-major, ``weight`` has any strides."""
    lane = tl.arange(0, block_k)
    x_pointers = x_pointer + row.to(tl.int64)[:, None] * depth + lane[None, :]
    weight_pointers = weight_pointer + lane.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_n
    step = tl.full([], block_k, tl.int64) * stride_k
    has_row = (row < rows)[:, None]
    has_column = (column < columns)[None, :]
    for first in range(0, depth, block_k):
        has_depth = lane < depth - first
        x = tl.load(x_pointers, mask=has_row & has_depth[None, :], other=0.0)
        weight = tl.load(weight_pointers, mask=has_depth[:, None] & has_column, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_pointers += block_k
        weight_pointers += step
    return total


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def lora_sum_kernel(
    pieces_pointer: tl.tensor,
    offsets_pointer: tl.tensor,
    out_pointer: tl.tensor,
    elements: tl.tensor,
    pieces: tl.tensor,
    scale: tl.tensor,
    rank: tl.constexpr,
    adapters: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write ``scale`` times the sum of ``pieces`` float32 tensors, from the first to the last, into ``out``.

    With offsets ``out`` is ``[tokens, rank]``, and zero for tokens without an adapter, of which no piece says anything.
    """
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < elements
    known = inside
    if offsets_pointer is not None:
        token = index // rank
        known = inside & (token >= tl.load(offsets_pointer)) & (token < tl.load(offsets_pointer + adapters))
    total = tl.zeros([block], tl.float32)
    pointers = pieces_pointer + index
    for _ in range(0, pieces):
        total += tl.load(pointers, mask=known, other=0.0)
        pointers += elements
    tl.store(out_pointer + index, (total * scale).to(out_pointer.dtype.element_ty), mask=inside)


def sum_pieces(
    pieces: torch.Tensor, count: int, out: torch.Tensor, scale: float, offsets: torch.Tensor | None = None
) -> None:
    """Launch `lora_sum_kernel` on the first ``count`` tensors of out's size in ``pieces``."""
    block = 512
    lora_sum_kernel[(triton.cdiv(out.numel(), block),)](
        pieces,
        offsets,
        out,
        out.numel(),
        count,
        scale,
        rank=out.shape[-1],
        adapters=1 if offsets is None else len(offsets) - 1,
        block=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def token_splits(tokens: int, programs: int) -> int:
    """Into how many the tokens are split so that ``programs`` for each make about two a multiprocessor of an H100."""
    return max(1, min(264 // max(programs, 1), -(-tokens // 128)))


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """``x`` with all but its last dimension made one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def layout_of(x: torch.Tensor, *weights: torch.Tensor, columns: int = 0) -> dict[str, int]:
    """By what configurations are chosen besides sizes: ``element_bytes`` and ``ragged``.

    ``ragged`` is 1 where rows of ``x``, of a result with ``columns``, or a weight cannot be read 16 bytes at a time;
    loads then go element by element and through registers, which large tiles have no room for.
    """
    strides = [stride for weight in weights for stride in weight.stride()]
    lengths = [x.shape[-1], columns, *(stride for stride in strides if stride != 1)]
    ragged = any(length * x.element_size() % 16 for length in lengths) or any(1 not in w.stride() for w in weights)
    return {"element_bytes": x.element_size(), "ragged": int(ragged)}


def owners(offsets: torch.Tensor | None, tokens: int, device: torch.device) -> torch.Tensor:
    """The adapter of each token as int64, -1 where it has none; all 0 without ``offsets``."""
    if offsets is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device)
    token = torch.arange(tokens, device=device)
    wide = offsets.long()
    owner = torch.searchsorted(wide[1:], token, right=True)
    return torch.where((token >= wide[0]) & (owner < len(wide) - 1), owner, -1)


def even_offsets(tokens: int, adapters: int, device: str) -> torch.Tensor | None:
    """Offsets of adapters that have the same number of tokens, but for the last; None for no adapters."""
    if not adapters:
        return None
    if device == "meta":
        return torch.empty(adapters + 1, dtype=torch.int32, device=device)
    ends = [tokens * i // adapters for i in range(adapters + 1)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def strides(adapter: torch.Tensor) -> tuple[int, ...]:
    """Those of a matrix for each adapter, 0 from one to the next where there is only one."""
    return adapter.stride() if adapter.dim() == 3 else (0, *adapter.stride())


def check_adapter(
    kernel: str,
    name: str,
    tensor: torch.Tensor,
    extents: tuple[int | None, int | None],
    offsets: torch.Tensor | None,
    like: torch.Tensor,
) -> None:
    """Raise ExecutionError unless ``tensor`` is one matrix, or with ``offsets`` one for each adapter, as ``like``."""
    check_offsets(kernel, offsets, like.device)
    wanted = extents if offsets is None else (len(offsets) - 1, *extents)
    check_tensor(kernel, name, tensor, wanted, like.dtype, like.device, row_major=False)


def check_offsets(kernel: str, offsets: torch.Tensor | None, device: torch.device) -> None:
    """Raise ExecutionError unless ``offsets``, if there are any, can be those of one adapter or more."""
    if offsets is None:
        return
    check_tensor(kernel, "offsets", offsets, (None,), (torch.int32, torch.int64), device)
    if len(offsets) < 2:
        raise fail(kernel, f"needs offsets of at least one adapter, and where it ends; got {list(offsets.shape)}")


def check_dropout(kernel: str, p: float, seed: torch.Tensor | None, device: torch.device) -> None:
    """Raise ExecutionError unless ``p`` is a probability and, if it is not 0, there is a seed."""
    if not 0 <= p <= 1:
        raise fail(kernel, f"needs a dropout probability from 0 to 1; got {p}")
    if seed is not None:
        check_tensor(kernel, "seed", seed, (1,), torch.int64, device)
    elif p > 0:
        raise fail(kernel, f"needs a seed to drop out with p = {p}", hint="give an int64 tensor of one element")
