"""Rotary position embedding of queries and keys, and keys and values stored in a paged cache, in one launch.

    q_out = rotate(q, cos[positions], sin[positions])
    key_cache[slots] = rotate(k, cos[positions], sin[positions])
    value_cache[slots] = v

What a decoder does between its projection of q, k and v and its attention: RoFormer's embedding (Su et al., arXiv
2104.09864; ``_rope.py`` has the formula) and the paged cache of vLLM (Kwon et al., SOSP 2023). A slot counts through
all pages: slot ``s`` is row ``s % page_size`` of page ``s // page_size``. Arithmetic is in float32 and each result is
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk, any_tensor, call, either, is_row_major, number
from ._rope import INTEGERS, check_heads, check_tables, positions_of, rotate_heads, rotated, spelled, tables
from ._rotations import Rotation, rotations

__all__ = ["KERNEL"]

NAME = "rope_cache"
CONFIGS = Configs.beside(__file__)
_Item = TypeVar("_Item")


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def rope_cache_kernel(
    q_pointer: tl.tensor,
    k_pointer: tl.tensor,
    v_pointer: tl.tensor,
    cos_pointer: tl.tensor,
    sin_pointer: tl.tensor,
    position_pointer: tl.tensor,
    slot_pointer: tl.tensor,
    q_out_pointer: tl.tensor,
    key_pointer: tl.tensor,
    value_pointer: tl.tensor,
    rows: tl.tensor,
    pages: tl.tensor,
    page_size: tl.tensor,
    cos_row: tl.tensor,
    cos_column: tl.tensor,
    sin_row: tl.tensor,
    sin_column: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    key_page: tl.tensor,
    key_slot: tl.tensor,
    key_head: tl.tensor,
    value_page: tl.tensor,
    value_slot: tl.tensor,
    value_head: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    pairs: tl.constexpr,
    each: tl.constexpr,
    gathered: tl.constexpr,
    interleaved: tl.constexpr,
    wrap: tl.constexpr,
    block_dim: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
    block_heads: tl.constexpr,
) -> None:
    """Do ``block_heads`` heads of q, or of both k and v, of one token; the grid is tokens times such blocks."""
    q_blocks: tl.constexpr = (heads + block_heads - 1) // block_heads
    blocks: tl.constexpr = q_blocks + (kv_heads + block_heads - 1) // block_heads
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    position = tl.load(position_pointer + token).to(tl.int64) if gathered else token
    angles = tables(cos_pointer, sin_pointer, (cos_row, cos_column), (sin_row, sin_column), position, rows, pairs,
                    each, interleaved, block_pairs)  # fmt: skip
    lane = tl.arange(0, block_heads)
    if block < q_blocks:
        head = block * block_heads + lane
        rotate_heads(q_pointer + token * q_token, q_out_pointer + token * (heads * dim), q_head, dim, head,
                     head < heads, angles, dim, pairs, interleaved, block_heads, block_pairs, block_rest)  # fmt: skip
    else:
        slot = tl.load(slot_pointer + token)
        if wrap:
            slot = tl.where(slot < 0, slot + pages * page_size, slot)
        head = (block - q_blocks) * block_heads + lane
        kept = (head < kv_heads) & (slot >= 0) & (slot // page_size < pages)
        page, row = slot // page_size, slot % page_size
        key = key_pointer + page * key_page + row * key_slot
        rotate_heads(k_pointer + token * k_token, key, k_head, key_head, head, kept, angles,
                     dim, pairs, interleaved, block_heads, block_pairs, block_rest)  # fmt: skip
        column = tl.arange(0, block_dim)[None, :]
        inside = kept[:, None] & (column < dim)
        wide_head = head.to(tl.int64)[:, None]
        v = tl.load(v_pointer + token * v_token + wide_head * v_head + column, mask=inside, other=0.0)
        tl.store(value_pointer + page * value_page + row * value_slot + wide_head * value_head + column, v, mask=inside)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    wrap: bool,
    *,
    q_out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write rotated ``q`` into ``q_out``, rotated ``k`` and ``v`` into the caches, on the current stream.

    Args:
        q: ``[tokens, heads, dim]``, float32, float16 or bfloat16, on a CUDA device; tokens and heads may be strided.
        k: ``[tokens, kv_heads, dim]``, as ``q``.
        v: ``[tokens, kv_heads, dim]``, as ``q``.
        cos: ``[context, rotary_dim / 2]`` or, one for each element, ``[context, rotary_dim]``, float32 or of the dtype
            of ``q``; may be strided.
        sin: as ``cos``.
        positions: ``[tokens]``, int64 or int32: rows of the tables. Negative ones count from the end; outside of the
            tables, rotated elements become NaN. Without positions, tables have a row for each token.
        slots: ``[tokens]``, int64, all different. A token whose slot is outside of the cache is not stored.
        key_cache: ``[pages, page_size, kv_heads, dim]``, the dtype of ``q``; the first three may be strided; written.
        value_cache: as ``key_cache``; written. The two may alternate in memory, page by page.
        rotary_dim: how many elements of a head are rotated, the others stay.
        interleaved: whether a pair is two neighbours; else it is one element of each half.
        wrap: whether negative slots count from the end, as in PyTorch's indexing; else they are outside.
        q_out: the shape and dtype of ``q``, row-major; written, shares no memory with any other argument.
        config: how to launch; chosen by ``heads`` and ``dim`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or a written one overlaps something.
    """
    each = _check(q, k, v, cos, sin, positions, slots, key_cache, value_cache, rotary_dim)
    check_tensor(NAME, "q_out", q_out, q.shape, q.dtype, q.device)
    read = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "slots": slots}
    read |= {} if positions is None else {"positions": positions}
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_apart(NAME, {"q_out": q_out, name: cache}, read)
    if key_cache.data_ptr() == value_cache.data_ptr() and key_cache.numel() and not key_cache.is_meta:
        raise fail(NAME, "needs key_cache in memory of its own; it overlaps value_cache")
    check_device(NAME, rope_cache_kernel, q)
    if q.numel() + k.numel() == 0:
        return
    (tokens, heads, dim), kv_heads, pairs = q.shape, k.shape[1], rotary_dim // 2
    config = config or CONFIGS.choose(q.device, q.dtype, tokens=tokens, heads=max(heads, kv_heads), dim=dim)
    block_heads = config.constants["block_heads"]
    blocks = triton.cdiv(heads, block_heads) + triton.cdiv(kv_heads, block_heads)
    with torch.accelerator.device_index(q.device.index):
        rope_cache_kernel[(tokens * blocks,)](
            q, k, v, cos, sin, positions, slots, q_out, key_cache, value_cache, cos.shape[0], *key_cache.shape[:2],
            *cos.stride(), *sin.stride(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *key_cache.stride()[:3], *value_cache.stride()[:3],
            heads=heads, kv_heads=kv_heads, dim=dim, pairs=pairs, each=each, gathered=positions is not None,
            interleaved=interleaved, wrap=wrap,
            block_dim=triton.next_power_of_2(dim), block_pairs=triton.next_power_of_2(pairs),
            block_rest=triton.next_power_of_2(dim - rotary_dim) if dim > rotary_dim else 0,
            **config.options,
        )  # fmt: skip


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rotary_dim: int,
) -> bool:
    """Raise ExecutionError for what ``launch`` refuses; whether tables have a column for each element."""
    check_tensor(NAME, "q", q, (None, None, None), FLOATS, q.device, row_major=False)
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        check_heads(NAME, name, tensor, q, 1)
    each = check_tables(NAME, q, cos, sin, rotary_dim)
    if positions is not None:
        check_tensor(NAME, "positions", positions, q.shape[:1], INTEGERS, q.device)
    elif cos.shape[0] != q.shape[0]:
        raise fail(NAME, f"needs positions, or {q.shape[0]} rows of cos; got {cos.shape[0]}")
    check_tensor(NAME, "slots", slots, q.shape[:1], torch.int64, q.device)
    check_tensor(NAME, "v", v, k.shape, q.dtype, q.device, row_major=False)
    check_tensor(NAME, "key_cache", key_cache, (None, None, *k.shape[1:]), q.dtype, q.device, row_major=False)
    check_tensor(NAME, "value_cache", value_cache, key_cache.shape, q.dtype, q.device, row_major=False)
    if key_cache.shape[1] == 0:
        raise fail(NAME, "needs pages of at least one token; those of key_cache have none")
    for name, cache in {"key_cache": key_cache, "value_cache": value_cache}.items():
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise fail(NAME, f"needs the elements of each head of {name} side by side; strides {list(cache.stride())}")
    return each


def allocate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    wrap: bool,
) -> tuple[torch.Tensor]:
    """New ``q_out``, row-major, not filled. Raises ExecutionError as ``launch`` does."""
    _check(q, k, v, cos, sin, positions, slots, key_cache, value_cache, rotary_dim)
    return (q.new_empty(q.shape),)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    wrap: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(q_out, key_cache, value_cache)`` by plain PyTorch on any device, the caches new; shapes as ``launch``."""
    pages, page_size = key_cache.shape[:2]
    if positions is None:
        positions = torch.arange(len(q), device=q.device)
    if wrap:
        slots = torch.where(slots < 0, slots + pages * page_size, slots)
    stored = ((slots >= 0) & (slots < pages * page_size)).nonzero()[:, 0]
    place = (slots[stored] // page_size, slots[stored] % page_size)
    q_out, k_out = (rotated(x, cos, sin, positions, rotary_dim, interleaved) for x in (q, k))
    return q_out, key_cache.index_put(place, k_out[stored]), value_cache.index_put(place, v[stored])


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    wrap: bool,
) -> Any:
    """What a model says, and writes in place; it takes no slot outside of the cache, and wraps negative ones."""
    page_size = key_cache.shape[1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cosine, sine = cos[:, None], sin[:, None]
    place = (slots // page_size, slots % page_size)
    key_cache.index_put_(place, spelled(k, cosine, sine, rotary_dim, interleaved))
    value_cache.index_put_(place, v)
    return spelled(q, cosine, sine, rotary_dim, interleaved), key_cache, value_cache


def cost(
    dtype: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int = 0,
    table_dtype: str = "float32",
    table_bytes: int | None = None,
    **_: Any,
) -> Cost:
    """Flops and bytes of one launch in which every token is stored.

    A rotated pair takes four products, a sum and a difference. Bytes are compulsory: q, k and v read and written, and
    for each token its position, its slot, and a row of both tables.
    """
    width = rotary_dim or dim
    flops = tokens * (heads + kv_heads) * 3 * width
    moved = 2 * tokens * (heads + 2 * kv_heads) * dim * DTYPE_BYTES[dtype]
    if table_bytes is None:
        table_bytes = tokens * (width * DTYPE_BYTES[table_dtype] + 8)
    return Cost(flops, moved + table_bytes + 8 * tokens)


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int = 0,
    table_dtype: str = "float32",
    context: int = 8192,
    page_size: int = 16,
    interleaved: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; q, k and v are views of one projection.

    Slots are scattered over a cache that holds twice the tokens.
    """
    random = normal(device, seed)
    projection = random(tokens, heads + 2 * kv_heads, dim).to(dtype)
    positions, cos, sin = positions_of(random, device, seed, tokens, context, (rotary_dim or dim) // 2)
    pages = 2 * triton.cdiv(tokens, page_size) + 1
    slots = torch.empty(tokens, dtype=torch.int64, device=device)
    if device != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        slots = torch.randperm(pages * page_size, generator=generator, device=device)[:tokens].clone()
    return {
        "q": projection[:, :heads],
        "k": projection[:, heads : heads + kv_heads],
        "v": projection[:, heads + kv_heads :],
        "cos": cos.to(getattr(torch, table_dtype)),
        "sin": sin.to(getattr(torch, table_dtype)),
        "positions": positions,
        "slots": slots,
        "key_cache": random(pages, page_size, kv_heads, dim).to(dtype),
        "value_cache": random(pages, page_size, kv_heads, dim).to(dtype),
        "rotary_dim": rotary_dim or dim,
        "interleaved": interleaved,
        "wrap": False,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph rotates queries and keys by the same angles and puts keys and values into the slots of a cache.

    Rotations are those of `_rotations.py`. Slots are told by ``index_put`` of keys and of values, ``[tokens, kv_heads,
    dim]``, at ``(slots // page_size, slots % page_size)``.
    """
    walk = Walk(graph)
    turned = [r for r in rotations(walk) if len(r.x.shape) == 3 and not r.angles.heads_first]
    turned = [r for r in turned if is_row_major(r.out)]
    stored = list(_stored(walk)) if turned else []
    where = {r.out.buffer: index for index, r in enumerate(turned)}
    keys = {rows.rows.buffer for rows in stored}
    found = []
    for here, keyed in enumerate(stored):
        if keyed.rows.buffer not in where:
            continue
        index = where[keyed.rows.buffer]
        key = turned[index]
        queries = _beside(turned, index, [r.key == key.key and r.out.buffer not in keys for r in turned])
        values = _beside(stored, here, [v.place == keyed.place and v.rows.buffer not in where for v in stored])
        tried = (_match(walk, q, key, keyed, v) for q in queries for v in values)
        found.append(next((match for match in tried if match is not None), None))
    return tuple(match for match in found if match is not None)


def _beside(items: Sequence[_Item], index: int, fits: Sequence[bool]) -> list[_Item]:
    """The nearest item that fits on either side: in a model of many layers, others belong to other layers."""
    behind = next((i for i in range(index + 1, len(items)) if fits[i]), None)
    before = next((i for i in range(index - 1, -1, -1) if fits[i]), None)
    return [items[i] for i in (behind, before) if i is not None]


@dataclass(frozen=True)
class _Stored:
    """Rows ``[tokens, kv_heads, dim]`` put into ``slots`` of a cache, ``after`` which it has a new name."""

    cache: Tensor
    after: Tensor
    slots: Tensor
    rows: Tensor

    @property
    def place(self) -> tuple[object, ...]:
        """What is equal for the keys and the values of the same tokens."""
        return self.slots.buffer, self.slots.offset_bytes, self.cache.shape, self.cache.dtype, self.rows.shape


_SLOTS, _SIZE = any_tensor("slots"), number("page_size")
_PAGE = either(call("floor_divide", _SLOTS, _SIZE), call("div", _SLOTS, _SIZE, rounding_mode="floor"))
_ROW = call("remainder", _SLOTS, _SIZE)


def _stored(walk: Walk) -> Iterator[_Stored]:
    for after in walk.results("index_put"):
        made = walk.writer(after)
        match walk.arguments(made[0])[0] if made is not None else []:
            case [Tensor() as cache, [Tensor() as page, Tensor() as row], Tensor() as rows, *rest] if not any(rest):
                pass
            case _:
                continue
        for found in (both for one in walk.find(_PAGE, page) for both in walk.find(_ROW, row, one)):
            slots, page_size = found["slots"], found.literals["page_size"]
            fits = len(cache.shape) == 4 and cache.shape[1] == page_size and rows.shape[1:] == cache.shape[2:]
            fits = (
                fits and rows.shape[:1] == slots.shape and rows.dtype == cache.dtype and cache.element_strides[-1] == 1
            )
            if fits and slots.dtype == "int64" and is_row_major(slots) and rows.element_strides[-1] == 1:
                yield _Stored(cache, after, slots, rows)
                break


def _match(walk: Walk, q: Rotation, k: Rotation, keys: _Stored, values: _Stored) -> Match | None:
    angles, (tokens, kv_heads, dim) = q.angles, k.x.shape
    if keys.rows.shape != k.x.shape or keys.cache.dtype != q.x.dtype or keys.cache.buffer == values.cache.buffer:
        return None
    launch_cost = cost(q.x.dtype, tokens, q.heads, kv_heads, dim, q.rotary_dim, table_bytes=angles.moved_bytes)
    given = {
        **{"q": q.x, "k": k.x, "v": values.rows, "cos": angles.cos, "sin": angles.sin, "positions": angles.positions},
        **{"slots": keys.slots, "key_cache": keys.cache, "value_cache": values.cache},
        **{"rotary_dim": q.rotary_dim, "interleaved": q.interleaved, "wrap": True},
    }
    return walk.match(NAME, given, (q.out, keys.after, values.after), launch_cost, updates=True)


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
        Workload("Llama-3 8B, decoding 64 sequences", {"tokens": 64, "heads": 32, "kv_heads": 8, "dim": 128}),
        Workload("Llama-3 8B, 8192 tokens", {"tokens": 8192, "heads": 32, "kv_heads": 8, "dim": 128}),
        Workload("Llama-3 70B, 8192 tokens", {"tokens": 8192, "heads": 64, "kv_heads": 8, "dim": 128}),
        Workload("Qwen2.5-7B, 8192 tokens", {"tokens": 8192, "heads": 28, "kv_heads": 4, "dim": 128}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    mutates=("key_cache", "value_cache"),
)
