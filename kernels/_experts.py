"""Rows sorted by expert: how they are numbered, checked and cut into tiles, for the kernels of mixtures of experts.

``order`` lists assignments, sorted by expert: assignment ``a`` is choice ``a % top_k`` of token ``a // top_k``.
``ends`` says for each expert where its rows end: those of expert ``e`` are ``ends[e - 1]`` to ``ends[e]``, from zero
for the first. It is what ``torch._grouped_mm`` takes; ``expert_routing`` makes both. Launchers never read either, since
the host would have to wait for them: ``ends`` must not decrease and has to end at the number of rows, and ``order`` has
to be a permutation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._checks import check_tensor, fail
from ._kernel import Workload
from ._tiles import swizzled

__all__ = [
    "INDICES",
    "MOST_EXPERTS",
    "WORKLOADS",
    "check_ends",
    "count_tiles",
    "counts_of",
    "expert_tile",
    "expert_tiles",
    "matrix_of",
    "sizes_of",
    "sorted_by_expert",
    "tokens_of",
]

#: The row counts of so many experts are in the registers of one program.
MOST_EXPERTS = 512

_MIXTRAL = {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336}
_QWEN3 = {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}

WORKLOADS = (
    Workload("Mixtral 8x7B, decoding 16 sequences", {"tokens": 16, **_MIXTRAL}),
    Workload("Mixtral 8x7B, 1024 tokens", {"tokens": 1024, **_MIXTRAL}),
    Workload("Mixtral 8x7B, 8192 tokens", {"tokens": 8192, **_MIXTRAL}),
    Workload("Mixtral 8x7B, 32768 tokens", {"tokens": 32768, **_MIXTRAL}),
    Workload("Qwen3-30B-A3B, decoding 16 sequences", {"tokens": 16, **_QWEN3}),
    Workload("Qwen3-30B-A3B, 1024 tokens", {"tokens": 1024, **_QWEN3}),
    Workload("Qwen3-30B-A3B, 8192 tokens", {"tokens": 8192, **_QWEN3}),
    Workload("Qwen3-30B-A3B, 32768 tokens", {"tokens": 32768, **_QWEN3}),
)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def expert_tiles(
    ends_pointer: tl.tensor, experts: tl.constexpr, block_experts: tl.constexpr, block_m: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """For each expert its first row, the row behind its last, and its number of tiles of ``block_m`` rows."""
    lane = tl.arange(0, block_experts)
    is_expert = lane < experts
    starts = tl.load(ends_pointer + lane - 1, mask=is_expert & (lane > 0), other=0)
    ends = tl.load(ends_pointer + lane, mask=is_expert, other=0)
    return starts, ends, tl.where(is_expert, (ends - starts + block_m - 1) // block_m, 0)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def expert_tile(
    program: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    tiles: tl.tensor,
    columns: tl.constexpr,
    block_experts: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    group_m: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Which tile ``program`` computes: its expert, its block of rows, the row behind the expert's last, its columns.

    ``program`` has to be less than the number of all tiles.
    """
    tile_m, tile_n = swizzled(program, tl.sum(tiles, axis=0), tl.cdiv(columns, block_n), group_m)
    behind = tl.cumsum(tiles, axis=0)
    expert = tl.sum((behind <= tile_m).to(tl.int32), axis=0)
    is_it = tl.arange(0, block_experts) == expert
    first = tl.sum(tl.where(is_it, starts + (tile_m - behind + tiles) * block_m, 0), axis=0)
    last = tl.sum(tl.where(is_it, ends, 0), axis=0)
    return expert.to(tl.int64), first + tl.arange(0, block_m), last, tile_n * block_n + tl.arange(0, block_n)


def count_tiles(rows: int, experts: int, columns: int, block_m: int, block_n: int) -> int:
    """As many tiles as ``rows`` can have: each expert that has rows adds at most one that is not full."""
    return (rows // block_m + min(rows, experts)) * -(-columns // block_n)


def sizes_of(rows: int, experts: int, *operands: torch.Tensor) -> dict[str, int]:
    """By what configurations of a grouped product are chosen.

    ``ragged`` is 1 where some operand cannot be read in vectors of 16 elements; loads then go element by element and
    through registers, which large tiles have no room for. ``element_bytes`` tells float32, which tensor cores do not
    multiply exactly, from what they do.
    """
    matrices = [(operand.shape[-2:], operand.stride()[-2:]) for operand in operands]
    lengths = [length for _, strides in matrices for length in strides if length != 1]
    lengths += [extent for shape, _ in matrices for extent in shape[-1:]]
    lengths += [shape[0] for operand, (shape, _) in zip(operands, matrices, strict=True) if operand.dim() == 3]
    ragged = any(length % 16 for length in lengths) or any(1 not in strides for _, strides in matrices)
    sizes = {"rows_per_expert": triton.cdiv(rows, experts), "element_bytes": operands[0].element_size()}
    return {**sizes, "ragged": int(ragged)}


#: Of ``order``; that of PyTorch's own sort is the wider one.
INDICES = (torch.int32, torch.int64)


def check_ends(kernel: str, ends: torch.Tensor, experts: int, rows: int, device: torch.device) -> None:
    """Raise ExecutionError unless ``ends`` can be that of ``rows`` rows of ``experts`` experts."""
    check_tensor(kernel, "ends", ends, (experts,), torch.int32, device)
    if not 0 < experts <= MOST_EXPERTS:
        raise fail(kernel, f"needs 1 to {MOST_EXPERTS} experts; got {experts}")
    if rows >= 2**31 - 2**16:  # a tile's last row is still a number of 32 bits
        raise fail(kernel, f"needs fewer than 2**31 - 2**16 rows; got {rows}")


def sorted_by_expert(
    random: Callable[..., torch.Tensor], tokens: int, experts: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(weights, order, ends)`` of a random routing, every expert as likely as any other."""
    logits, weights = random(tokens, experts), torch.softmax(random(tokens, top_k), -1)
    if logits.is_meta:
        order, ends = (torch.empty(n, dtype=torch.int32, device="meta") for n in (tokens * top_k, experts))
        return weights, order, ends
    chosen = logits.topk(top_k, -1).indices.flatten()
    counts = torch.bincount(chosen, minlength=experts)
    return weights, chosen.argsort(stable=True).int(), counts.cumsum(0).int()


def counts_of(ends: torch.Tensor, rows: int) -> list[int]:
    """The rows of every expert, for which the host waits.

    On ``meta``, where there are no values, all are the first expert's: a loop over experts then does as much.
    """
    if ends.is_meta:
        return [rows, *[0] * (len(ends) - 1)]
    counts: list[int] = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return counts


def matrix_of(tensor: torch.Tensor) -> torch.Tensor:
    """All leading dimensions as one, also where there are no elements."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def tokens_of(order: torch.Tensor, top_k: int) -> torch.Tensor:
    """The token of every sorted row, as an index."""
    return (order // top_k).long()
