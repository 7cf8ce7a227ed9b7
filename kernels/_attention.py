"""Attention over a paged cache in plain PyTorch: what the kernel computes, and what a model says instead."""

from __future__ import annotations

import math

import torch

__all__ = ["attend", "gathered", "spelled"]


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
    grouped = q.unflatten(1, (keys.shape[2], -1)).float()
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
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attended: torch.Tensor,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """As models say it, of keys and values ``[sequences, kv_heads, tokens, dim]``."""
    query, mask = q[:, :, None], attended[:, None, None]
    if soft_cap <= 0:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]
    keys, values = (cache.repeat_interleave(q.shape[1] // keys.shape[1], 1) for cache in (keys, values))
    scores = soft_cap * torch.tanh(query @ keys.transpose(2, 3) * (scale / soft_cap))
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ values)[:, :, 0]
