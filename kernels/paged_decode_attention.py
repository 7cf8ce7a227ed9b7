"""Attention of one query token a sequence over a paged key and value cache, split over the sequence.

    scores = scale * q @ keys.T                                   over the tokens that the sequence has
    scores = soft_cap * tanh(scores / soft_cap)                   if soft_cap > 0
    out = softmax(scores) @ values

for groups of query heads that share a key and value head (Ainslie et al., arXiv 2305.13245). The cache is vLLM's (Kwon
et al., SOSP 2023): token ``t`` of a sequence is row ``t % page_size`` of page ``page_table[sequence, t // page_size]``.
Each sequence is cut into as many parts as ``splits`` says, which are attended to side by side as in Flash-Decoding;
a second launch weighs their results by the exponential of their log-sum-exp. Products accumulate in float32, and
probabilities are rounded to the dtype of the values before they meet them, as FlashAttention does; ``out`` is rounded
once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._attention import attend, gathered, masked, paged, spelled
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk

__all__ = ["KERNEL", "choose_splits"]

NAME = "paged_decode_attention"
CONFIGS = Configs.beside(__file__)

#: Programs that run at the same time on a large GPU, two a multiprocessor, and what a split must be worth in tokens.
_PROGRAMS = 264
_LEAST_TOKENS = 256
_MOST_SPLITS = 128


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def paged_decode_attention_kernel(
    q_pointer: tl.tensor,
    key_pointer: tl.tensor,
    value_pointer: tl.tensor,
    page_table_pointer: tl.tensor,
    length_pointer: tl.tensor,
    out_pointer: tl.tensor,
    partial_pointer: tl.tensor,
    log_sum_exp_pointer: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    pages: tl.tensor,
    pages_of_sequence: tl.tensor,
    page_table_stride: tl.tensor,
    q_sequence: tl.tensor,
    q_head: tl.tensor,
    key_page: tl.tensor,
    key_slot: tl.tensor,
    key_head: tl.tensor,
    value_page: tl.tensor,
    value_slot: tl.tensor,
    value_head: tl.tensor,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    page_size: tl.constexpr,
    whole: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Attend with query heads of one key head to one part of a sequence.

    The grid is (sequences times key heads times tiles of their query heads, splits). Logarithms are to base 2.
    """
    tiles: tl.constexpr = (group + block_m - 1) // block_m
    sequence = (tl.program_id(0) // (kv_heads * tiles)).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    member = tl.program_id(0) % tiles * block_m + tl.arange(0, block_m)
    head = kv_head * group + member
    column = tl.arange(0, block_d)
    tile = (member < group)[:, None] & (column < dim)[None, :]
    q_tile = q_pointer + sequence * q_sequence + head[:, None] * q_head + column[None, :]
    q = tl.load(q_tile, mask=tile, other=0.0)

    length = tl.load(length_pointer + sequence)
    begin = tl.maximum(length - window, 0) if windowed else 0
    length = tl.minimum(length, pages_of_sequence * page_size)
    part = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), splits), block_n) * block_n
    first = begin + tl.program_id(1) * part
    last = tl.minimum(first + part, length)
    largest = tl.full([block_m], -float("inf"), dtype=tl.float32)
    total = tl.zeros([block_m], dtype=tl.float32)
    attended = tl.zeros([block_m, block_d], dtype=tl.float32)
    for start in range(first, last, block_n):
        token = start + tl.arange(0, block_n)
        inside = token < last
        entry = page_table_pointer + sequence * page_table_stride + token // page_size
        page = tl.minimum(tl.maximum(tl.load(entry, mask=inside, other=0), 0), pages - 1).to(tl.int64)
        row = token % page_size
        known = inside[:, None] & (column < dim)[None, :]
        key_row = key_pointer + page * key_page + row * key_slot + kv_head * key_head
        keys = tl.load(key_row[:, None] + column[None, :], mask=known, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if capped:  # tanh
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * scores / soft_cap) + 1.0))
        scores = tl.where(inside[None, :], scores * 1.4426950408889634, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        probability = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(probability, axis=1)
        value_row = value_pointer + page * value_page + row * value_slot + kv_head * value_head
        values = tl.load(value_row[:, None] + column[None, :], mask=known, other=0.0)
        attended = tl.dot(
            probability.to(values.dtype), values, attended * shrink[:, None], input_precision="ieee"
        )  # fmt: skip
        largest = larger

    divisor = tl.where(total == 0.0, 1.0, total)  # nothing to attend to: zeros
    attended = attended / divisor[:, None]
    target = sequence * (kv_heads * group) + head
    if whole:
        tl.store(
            out_pointer + target[:, None] * dim + column[None, :], attended.to(out_pointer.dtype.element_ty), mask=tile
        )
    else:
        target = target * splits + tl.program_id(1)
        tl.store(partial_pointer + target[:, None] * dim + column[None, :], attended, mask=tile)
        tl.store(log_sum_exp_pointer + target, largest + tl.log2(divisor), mask=member < group)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def paged_decode_attention_merge_kernel(
    partial_pointer: tl.tensor,
    log_sum_exp_pointer: tl.tensor,
    out_pointer: tl.tensor,
    splits: tl.tensor,
    dim: tl.constexpr,
    block_d: tl.constexpr,
    block_splits: tl.constexpr,
) -> None:
    """Merge the parts of one query head of one sequence; the grid is sequences times query heads."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block_d)
    largest = tl.full([], -float("inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    merged = tl.zeros([block_d], dtype=tl.float32)
    for first in range(0, splits, block_splits):
        split = first + tl.arange(0, block_splits)
        part = head * splits + split
        log_sum_exp = tl.load(log_sum_exp_pointer + part, mask=split < splits, other=-float("inf"))
        larger = tl.maximum(largest, tl.max(log_sum_exp, axis=0))
        reached = tl.where(larger == -float("inf"), 0.0, larger)  # nothing yet: all weights are 0, not NaN
        weight = tl.exp2(log_sum_exp - reached)
        shrink = tl.exp2(largest - reached)
        known = (split < splits)[:, None] & (column < dim)[None, :]
        partial = tl.load(partial_pointer + part[:, None] * dim + column[None, :], mask=known, other=0.0)
        merged = merged * shrink + tl.sum(weight[:, None] * partial, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        largest = larger
    merged = merged / tl.where(total == 0.0, 1.0, total)
    tl.store(out_pointer + head * dim + column, merged.to(out_pointer.dtype.element_ty), mask=column < dim)


def choose_splits(programs: int, tokens: int) -> int:
    """Into how many parts to cut sequences of up to ``tokens``, with ``programs`` at work on each part.

    The least number that fills the GPU almost as well as the best one does: FlashAttention's rule. It looks at shapes
    only, so that a launch can be captured and replayed; shorter sequences are cut into as many, smaller parts.
    """
    most = max(1, min(tokens // _LEAST_TOKENS, _MOST_SPLITS))
    waves = [programs * splits / _PROGRAMS for splits in range(1, most + 1)]
    filled = [wave / math.ceil(wave) if wave else 1.0 for wave in waves]
    return next(splits for splits, part in enumerate(filled, 1) if part >= 0.85 * max(filled))


def launch(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    soft_cap: float,
    window: int,
    splits: int,
    *,
    out: torch.Tensor,
    partial: torch.Tensor,
    log_sum_exp: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the attention of ``q`` over the cache into ``out``, on the current stream.

    Args:
        q: ``[sequences, heads, dim]``, or ``[sequences, heads, 1, dim]`` as PyTorch's attention takes it, float32,
            float16 or bfloat16, on a CUDA device; ``dim`` is up to 256, the first two may be strided.
        key_cache: ``[pages, page_size, kv_heads, dim]``, the dtype of ``q``; the first three may be strided. ``heads``
            is a multiple of ``kv_heads``.
        value_cache: as ``key_cache``.
        page_table: ``[sequences, pages of the longest]``, int32; rows may be strided. Entries that are no page stand
            for the nearest, and those behind the last page of a sequence, or before its window, for nothing.
        lengths: ``[sequences]``, int32: tokens of each sequence, the query's own among them. 0 gives zeros; what is
            longer than the page table ends with it.
        scale: of the scores, usually ``dim ** -0.5``.
        soft_cap: bound of the scores, or 0 for none.
        window: how many of the last tokens are attended to, or 0 for all.
        splits: how many parts to cut sequences into, or 0 to choose by shapes.
        out: the shape and dtype of ``q``, row-major; written, shares no memory with any other argument.
        partial: ``[sequences, heads, splits, dim]``, float32, row-major; scratch, without splits if there is only one.
        log_sum_exp: ``[sequences, heads, splits]``, float32; as ``partial``.
        config: how to launch; chosen by shapes if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    parts = _check(q, key_cache, value_cache, page_table, lengths, soft_cap, window, splits)
    (sequences, heads), (pages, page_size, kv_heads, dim) = q.shape[:2], key_cache.shape
    kept = parts if parts > 1 else 0
    check_tensor(NAME, "out", out, q.shape, q.dtype, q.device)
    check_tensor(NAME, "partial", partial, (sequences, heads, kept, dim), torch.float32, q.device)
    check_tensor(NAME, "log_sum_exp", log_sum_exp, (sequences, heads, kept), torch.float32, q.device)
    read = {"q": q, "key_cache": key_cache, "value_cache": value_cache, "page_table": page_table, "lengths": lengths}
    check_apart(NAME, {"out": out, "partial": partial, "log_sum_exp": log_sum_exp}, read)
    check_device(NAME, paged_decode_attention_kernel, q)
    if q.numel() == 0:
        return
    config = config or CONFIGS.choose(q.device, q.dtype, **_sizes(q, key_cache, page_table))
    group = heads // kv_heads
    block_m, block_d = _block_m(group, q.element_size()), max(16, triton.next_power_of_2(dim))
    with torch.accelerator.device_index(q.device.index):
        paged_decode_attention_kernel[(sequences * kv_heads * triton.cdiv(group, block_m), parts)](
            q, key_cache, value_cache, page_table, lengths, out, partial, log_sum_exp,
            scale, soft_cap, window, parts, pages, page_table.shape[1] if pages else 0, page_table.stride(0),
            *q.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
            kv_heads=kv_heads, group=group, dim=dim, page_size=page_size,
            whole=parts == 1, capped=soft_cap > 0, windowed=window > 0, block_m=block_m, block_d=block_d,
            **config.options,
        )  # fmt: skip
        if parts > 1:
            paged_decode_attention_merge_kernel[(sequences * heads,)](
                partial, log_sum_exp, out, parts, dim=dim, block_d=block_d, block_splits=16,
                num_warps=4, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip


def _block_m(group: int, element_bytes: int) -> int:
    """Query heads of a tile: 16 is the least that tensor cores take; more in float32 need too many registers."""
    return min(16 if element_bytes > 2 else 64, max(16, int(triton.next_power_of_2(group))))


def _sizes(q: torch.Tensor, key_cache: torch.Tensor, page_table: torch.Tensor) -> dict[str, int]:
    """What the choice of a configuration looks at."""
    return {
        "sequences": q.shape[0],
        "kv_heads": key_cache.shape[2],
        "block_m": _block_m(q.shape[1] // key_cache.shape[2], q.element_size()),
        "dim": q.shape[-1],
        "tokens": page_table.shape[1] * key_cache.shape[1],
        "element_bytes": q.element_size(),
    }


def _check(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    soft_cap: float,
    window: int,
    splits: int,
) -> int:
    """Raise ExecutionError for what ``launch`` refuses; gives the number of parts."""
    shape = (None, None, 1, None) if q.dim() == 4 else (None, None, None)
    check_tensor(NAME, "q", q, shape, FLOATS, q.device, row_major=False)
    sequences, heads, dim = q.shape[0], q.shape[1], q.shape[-1]
    check_tensor(NAME, "key_cache", key_cache, (None, None, None, dim), q.dtype, q.device, row_major=False)
    check_tensor(NAME, "value_cache", value_cache, key_cache.shape, q.dtype, q.device, row_major=False)
    check_tensor(NAME, "page_table", page_table, (sequences, None), torch.int32, q.device, row_major=False)
    check_tensor(NAME, "lengths", lengths, (sequences,), torch.int32, q.device)
    page_size, kv_heads = key_cache.shape[1:3]
    if page_size == 0 or kv_heads == 0 or heads % kv_heads:
        raise fail(
            NAME,
            f"needs heads in groups of one key head; got {heads} heads, {kv_heads} of keys, in pages of {page_size}",
        )
    if dim > 256:
        raise fail(NAME, f"takes heads of up to 256 elements; got {dim}")
    if soft_cap < 0 or window < 0 or not 0 <= splits < 2**16:
        raise fail(NAME, f"needs soft_cap, window and splits of 0 or more; got {soft_cap}, {window}, {splits}")
    for name, tensor in {"q": q, "key_cache": key_cache, "value_cache": value_cache, "page_table": page_table}.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise fail(NAME, f"needs the last dimension of {name} side by side; strides {list(tensor.stride())}")
    tokens = page_table.shape[1] * page_size
    tiles = triton.cdiv(heads // kv_heads, _block_m(heads // kv_heads, q.element_size()))
    return splits or choose_splits(sequences * kv_heads * tiles, min(tokens, window or tokens))


def allocate(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    soft_cap: float,
    window: int,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(out, partial, log_sum_exp)``, not filled. Raises ExecutionError as ``launch`` does."""
    parts = _check(q, key_cache, value_cache, page_table, lengths, soft_cap, window, splits)
    kept = (*q.shape[:2], parts if parts > 1 else 0)
    partial = q.new_empty((*kept, q.shape[-1]), dtype=torch.float32)
    return q.new_empty(q.shape), partial, q.new_empty(kept, dtype=torch.float32)


def reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    soft_cap: float,
    window: int,
    splits: int,
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, rounding as `attend` says; shapes as ``launch``."""
    rows = gathered(key_cache, value_cache, page_table, lengths, window)
    return (attend(q.reshape(*q.shape[:2], q.shape[-1]), *rows, scale, soft_cap).view(q.shape),)


def eager(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    soft_cap: float,
    window: int,
    splits: int,
) -> Any:
    """What PyTorch alone can say: gather all pages, mask, and call its attention, which knows no soft cap."""
    keys, values, attended = gathered(key_cache, value_cache, page_table, lengths, window)
    query = q[:, :, None] if q.dim() == 3 else q
    out = spelled(query, keys.transpose(1, 2), values.transpose(1, 2), attended[:, None, None], scale, soft_cap)
    return out[:, :, 0] if q.dim() == 3 else out


def cost(
    dtype: str,
    sequences: int,
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    page_size: int = 16,
    window: int = 0,
    **_: Any,
) -> Cost:
    """Flops and bytes of one launch for sequences of ``tokens`` each.

    A score takes ``dim`` products and sums, so does weighing the values by it, and its scaling, the subtraction of the
    largest and the sum three more. Bytes are compulsory: keys and values in reach once, queries, results, the page
    table and lengths. Scratch, two float32 results a split, is not counted.
    """
    reach = min(tokens, window or tokens)
    cache = 2 * sequences * kv_heads * reach * dim
    table = sequences * 4 * (triton.cdiv(tokens, page_size) + 1)
    flops = sequences * heads * reach * (4 * dim + 3)
    return Cost(flops, (cache + 2 * sequences * heads * dim) * DTYPE_BYTES[dtype] + table)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    sequences: int,
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    page_size: int = 16,
    soft_cap: float = 0.0,
    window: int = 0,
    splits: int = 0,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name: all sequences full, their pages scattered."""
    random = normal(device, seed)
    width = triton.cdiv(tokens, page_size)
    pages = sequences * width + 1
    page_table = torch.empty(sequences, width, dtype=torch.int32, device=device)
    lengths = torch.full((sequences,), tokens, dtype=torch.int32, device=device)
    if device != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        order = torch.randperm(pages, generator=generator, device=device, dtype=torch.int32)
        page_table = order[: sequences * width].view(sequences, width)
    return {
        "q": random(sequences, heads, dim).to(dtype),
        "key_cache": random(pages, page_size, kv_heads, dim).to(dtype),
        "value_cache": random(pages, page_size, kv_heads, dim).to(dtype),
        "page_table": page_table,
        "lengths": lengths,
        "scale": dim**-0.5,
        "soft_cap": soft_cap,
        "window": window,
        "splits": splits,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph gathers the pages of a cache and attends to them with one query a sequence, as ``eager`` does.

    The page table is clamped to the pages there are, keys and values are gathered by it, and the mask is ``arange <
    lengths``, alone or with ``arange >= lengths - window``. Soft caps are not sought: PyTorch's attention has none.
    """
    walk = Walk(graph)
    found = []
    for out in walk.results("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"):
        made = walk.writer(out)
        arguments, keywords = walk.arguments(made[0]) if made is not None else ([], {})
        match arguments:
            case [Tensor() as q, Tensor() as k, Tensor() as v, *rest]:
                mask = rest[0] if rest else keywords.get("attn_mask")
                plain = not any(rest[1:]) and not keywords.get("dropout_p") and not keywords.get("is_causal")
                if plain and isinstance(mask, Tensor):
                    found.append(_match(walk, q, k, v, mask, keywords.get("scale"), out))
    return tuple(match for match in found if match is not None)


def _match(walk: Walk, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, out: Tensor) -> Match | None:
    keys, values, reach = paged(walk, k), paged(walk, v), masked(walk, mask)
    if keys is None or values is None or reach is None or len(q.shape) != 4 or q.shape[2] != 1:
        return None
    (key_cache, table), (value_cache, other), (lengths, window) = keys, values, reach
    (sequences, heads, _, dim), (_, page_size, kv_heads, _) = q.shape, key_cache.shape
    same = (key_cache.shape, key_cache.dtype, table) == (value_cache.shape, value_cache.dtype, other)
    strided = any(t.element_strides[-1] != 1 for t in (q, key_cache, value_cache, table))
    if not same or strided or q.dtype != key_cache.dtype:
        return None
    if table.shape[0] != sequences or lengths.shape != (sequences,) or heads % kv_heads or dim > 256:
        return None
    if q.dtype not in map(dtype_name, FLOATS) or {table.dtype, lengths.dtype} != {"int32"} or out.shape != q.shape:
        return None
    tokens = table.shape[1] * page_size
    launch_cost = cost(q.dtype, sequences, heads, kv_heads, dim, tokens, page_size, window)
    given = {
        **{"q": q, "key_cache": key_cache, "value_cache": value_cache, "page_table": table, "lengths": lengths},
        **{"scale": dim**-0.5 if scale is None else scale, "soft_cap": 0.0, "window": window, "splits": 0},
    }
    return walk.match(NAME, given, (out,), launch_cost)


_LLAMA_8B = {"heads": 32, "kv_heads": 8, "dim": 128}  # Mixtral, too
_LLAMA_70B = {"heads": 64, "kv_heads": 8, "dim": 128}
_QWEN_7B = {"heads": 28, "kv_heads": 4, "dim": 128}

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
        Workload("Llama-3 8B, 1 sequence of 2048", {"sequences": 1, "tokens": 2048, **_LLAMA_8B}),
        Workload("Llama-3 8B, 1 sequence of 32768", {"sequences": 1, "tokens": 32768, **_LLAMA_8B}),
        Workload("Mixtral 8x7B, 16 sequences of 8192", {"sequences": 16, "tokens": 8192, **_LLAMA_8B}),
        Workload("Llama-3 70B, 16 sequences of 32768", {"sequences": 16, "tokens": 32768, **_LLAMA_70B}),
        Workload("Llama-3 70B, 64 sequences of 8192", {"sequences": 64, "tokens": 8192, **_LLAMA_70B}),
        Workload("Qwen2.5-7B, 64 sequences of 2048", {"sequences": 64, "tokens": 2048, **_QWEN_7B}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("partial", "log_sum_exp"),
)
