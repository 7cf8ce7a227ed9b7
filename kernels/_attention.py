"""Attention over a paged cache in plain PyTorch: what the kernel computes, what models say instead, and where."""

from __future__ import annotations

import math

import torch

from ..compiler.graph import Tensor
from ._match import Walk, any_tensor, call, either, is_row_major, number, reshaped

__all__ = ["attend", "gathered", "masked", "paged", "spelled"]


def gathered(
    key_cache: torch.Tensor, value_cache: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values ``[sequences, tokens, kv_heads, dim]`` out of their pages, and which tokens are attended to."""
    token = torch.arange(page_table.shape[1] * key_cache.shape[1], device=lengths.device)
    attended = token < lengths[:, None]
    if window > 0:
        attended = attended & (token >= lengths[:, None] - window)
    pages = page_table.clamp(0, key_cache.shape[0] - 1)  # entries behind a sequence may be anything
    return key_cache[pages].flatten(1, 2), value_cache[pages].flatten(1, 2), attended


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attended: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """Attention of ``[sequences, heads, dim]``, in float32; zeros where a sequence has no token.

    Probabilities are rounded to the dtype of ``q`` before they meet the values, as the kernel rounds them, but relative
    to the largest score of the whole sequence instead of the largest so far.
    """
    if not attended.numel() or not q.numel():
        return q.new_zeros(q.shape)
    sequences, heads, dim = q.shape
    grouped = q.reshape(sequences, keys.shape[2], heads // keys.shape[2], dim).float()
    scores = torch.einsum("skgd,stkd->skgt", grouped, keys.float()) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = torch.where(attended[:, None, None], scores, -math.inf)
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    probability = torch.exp(scores - largest)
    total = probability.sum(-1, keepdim=True)
    out = torch.einsum("skgt,stkd->skgd", probability.to(q.dtype).float(), values.float())
    return (out / torch.where(total == 0, 1.0, total)).flatten(1, 2).to(q.dtype)


def spelled(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """As models say it, of ``[sequences, heads, 1, dim]``, keys and values ``[sequences, kv_heads, tokens, dim]``."""
    if soft_cap <= 0:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    keys, values = (cache.repeat_interleave(query.shape[1] // keys.shape[1], 1) for cache in (keys, values))
    scores = soft_cap * torch.tanh(query @ keys.transpose(2, 3) * (scale / soft_cap))
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ values


_TABLE, _LAST = any_tensor("table"), number("last")
_CLAMPED = either(call("clamp", _TABLE, 0, _LAST), call("clamp_max", call("clamp_min", _TABLE, 0), _LAST))
_COUNT, _LENGTHS = any_tensor("count"), any_tensor("lengths")
_WITHIN = call("lt", _COUNT, _LENGTHS)
_RECENT = call("ge", _COUNT, call("sub", _LENGTHS, number("window")))
_REACH = either(
    _WITHIN,
    *(
        call(name, *parts)
        for name in ("__and__", "bitwise_and", "logical_and")
        for parts in ((_WITHIN, _RECENT), (_RECENT, _WITHIN))
    ),
)


def paged(walk: Walk, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The cache and the page table that ``rows`` ``[sequences, kv_heads, tokens, dim]`` were gathered with."""
    base = walk.graph.buffers[rows.buffer]
    made = walk.writer(base)
    match walk.arguments(made[0])[0] if made is not None and made[0].target == "aten.index.Tensor" else []:
        case [Tensor() as cache, [Tensor() as pages]] if len(cache.shape) == 4 and len(pages.shape) == 2:
            sequences, width = pages.shape
        case _:
            return None
    count, page_size, kv_heads, dim = cache.shape
    tokens = width * page_size
    wanted = (sequences, kv_heads, tokens, dim), (tokens * kv_heads * dim, dim, kv_heads * dim, 1)
    if (rows.shape, rows.element_strides) != wanted or rows.offset_bytes or not is_row_major(base):
        return None
    for found in walk.find(_CLAMPED, pages):
        if found.literals["last"] == count - 1 and found["table"].shape == pages.shape:
            return cache, found["table"]
    return None


def masked(walk: Walk, mask: Tensor) -> tuple[Tensor, int] | None:
    """Lengths ``[sequences]`` and window, or 0, that a mask ``[sequences, 1, 1, tokens]`` says, as bool or as -inf."""
    made = walk.writer(mask)
    if made is not None and made[0].target == "aten.where.self":
        condition, *rest = walk.arguments(made[0])[0]
        if [_filled(walk, item) for item in rest] != [0.0, -math.inf]:
            return None
        mask = condition
    if len(mask.shape) != 4 or mask.shape[1:3] != (1, 1) or mask.dtype != "bool":
        return None
    tokens = mask.shape[3]
    for found in walk.find(_REACH, mask):
        window, lengths = found.literals.get("window", 0), reshaped(found["lengths"], mask.shape[:1])
        broadcast = found["lengths"].shape == (mask.shape[0], 1) and found["count"].shape == (tokens,)
        if (
            broadcast
            and lengths is not None
            and _counts(walk, found["count"])
            and (window > 0 or "window" not in found.literals)
        ):
            return lengths, window
    return None


def _filled(walk: Walk, tensor: Tensor) -> float | None:
    """The number that all elements of a tensor are."""
    made = walk.writer(tensor)
    if made is None or made[0].target not in ("aten.scalar_tensor.default", "aten.full.default"):
        return None
    return float(walk.arguments(made[0])[0][-1])


def _counts(walk: Walk, tensor: Tensor) -> bool:
    """Whether a tensor ``[n]`` is 0, 1, 2, ..."""
    made = walk.writer(tensor)
    arguments, keywords = walk.arguments(made[0]) if made is not None else ([], {})
    (count,) = tensor.shape
    match made[0].target if made is not None else "":
        case "aten.arange.default":
            return arguments == [count]
        case "aten.arange.start":
            return arguments == [0, count]
        case "prims.iota.default":
            return arguments == [count] and (keywords.get("start"), keywords.get("step")) == (0, 1)
    return False
