"""Definitions in place of operators that only CUDA has, or that are not in float64; and graphs of single operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The ATen graph of a function that returns a tuple."""
    return make_fx(function, tracing_mode="fake")(*inputs)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Logits [batch, heads, queries, keys]; a causal mask is aligned with the first query and key."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias if bias.is_floating_point() else scores.masked_fill(~bias, -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Result and logarithms of the sums of exponentials."""
    scores = _scores(query, key, bias, causal, scale)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return torch.softmax(scores, -1) @ value, scores.logsumexp(-1)


def gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logarithms: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values, of probabilities that the logarithms of whole rows give."""
    groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    chances = torch.exp(_scores(query, key, bias, causal, scale) - logarithms[..., None])
    long_key, long_value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    inner = chances * (gradient @ long_value.transpose(-1, -2) - (gradient * out).sum(-1, keepdim=True))

    def grouped(x: Tensor) -> Tensor:
        return x.view(x.shape[0], groups, repeats, *x.shape[2:]).sum(2)

    by_key = grouped(inner.transpose(-1, -2) @ query) * factor
    return inner @ long_key * factor, by_key, grouped(chances.transpose(-1, -2) @ gradient)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None
) -> tuple[Any, ...]:
    out, logarithms = attend(query, key, value, None, is_causal, scale)
    none = torch.zeros(())
    return out, logarithms, None, None, query.shape[2], key.shape[2], none, none, none


def _flash_back(*given: Any, scale: Any = None) -> tuple[Tensor, ...]:
    gradient, query, key, value, out, logsumexp, _, _, max_q, max_k, _, causal, *_ = given
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.is_contiguous()
    return gradients(gradient, query, key, value, out, logsumexp, None, causal, scale)


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, compute: bool, dropout_p: float = 0.0, is_causal: bool = False
) -> tuple[Any, ...]:
    out, logarithms = attend(query, key, value, bias, is_causal)
    padded = torch.nn.functional.pad(logarithms, (0, -query.shape[2] % 32), value=torch.inf)
    return out, padded if compute else padded[..., :0], torch.zeros(()), torch.zeros(())


def _efficient_back(*given: Any) -> tuple[Any, ...]:
    gradient, query, key, value, bias, out, logsumexp, _, _, _, _, *causal = given
    assert logsumexp.is_contiguous()
    assert logsumexp.shape[-1] == -(-query.shape[2] // 32) * 32
    assert bool((logsumexp[..., query.shape[2] :] == torch.inf).all())
    logarithms = logsumexp[..., : query.shape[2]]
    return (*gradients(gradient, query, key, value, out, logarithms, bias, bool(causal and causal[0])), None)


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, compute: bool, dropout_p: float = 0.0, is_causal: bool = False
) -> tuple[Any, ...]:
    out, logarithms = attend(query, key, value, bias, is_causal)
    none = torch.zeros(())
    return out, logarithms[..., None], None, None, query.shape[2], key.shape[2], none, none, none


def _cudnn_back(*given: Any) -> tuple[Tensor, ...]:
    gradient, query, key, value, out, logsumexp, _, _, bias, _, _, max_q, max_k, _, causal = given
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.is_contiguous()
    return gradients(gradient, query, key, value, out, logsumexp[..., 0], bias, causal)


def _cast(x: Tensor, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    """As casts do, but nothing becomes less precise than float64."""
    return x if dtype is None else x.to(torch.float64 if dtype.is_floating_point else dtype)


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Runs of rows times a matrix each; or, of two matrices, a product for each run of what they share."""
    starts = [0, *ends.tolist()[:-1]]
    runs = [slice(*run) for run in zip(starts, ends.tolist(), strict=True)]
    if weights.dim() == 2:
        return torch.stack([rows[:, run] @ weights[run] for run in runs])
    return torch.cat([rows[run] @ matrix for run, matrix in zip(runs, weights, strict=True)])


def _rms_norm_back(
    gradient: Tensor, x: Tensor, shape: Any, spread: Tensor, weight: Tensor, wanted: Any
) -> tuple[Tensor, ...]:
    """Of a norm over the last dimension; ``spread`` is the inverse of the root mean square."""
    assert spread.is_contiguous()
    scaled, normal = gradient * weight, x * spread
    own = spread * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return own, (gradient * normal).flatten(0, -2).sum(0)


#: Definitions of operators that a CPU lacks, all in the precision of the inputs.
REPLACED: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _cast,
    torch.ops.prims.convert_element_type.default: _cast,
    aten._grouped_mm.default: _grouped,
    aten._fused_rms_norm_backward.default: _rms_norm_back,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_back,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_back,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_back,
}


def forwards(kind: str, causal: bool) -> Callable[..., Any]:
    """Queries, keys, values (and a mask) to result and logarithms, by one of the operators."""

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        if kind == "cpu":
            operator = aten._scaled_dot_product_flash_attention_for_cpu
            return operator(query, key, value, 0.0, causal, attn_mask=mask)
        if kind == "flash":
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[:2]
        operator = getattr(aten, f"_scaled_dot_product_{kind}_attention")
        return operator(query, key, value, mask, True, 0.0, causal)[:2]

    return run


def trained(kind: str, causal: bool) -> Callable[..., Any]:
    """Result and gradients of queries, keys and values; the last input is the gradient of the result."""

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Any:
        *masks, gradient = rest
        mask = masks[0] if masks else None
        inputs = (gradient, query, key, value)
        if kind == "cpu":
            out, logs = forwards(kind, causal)(query, key, value, mask)
            back = aten._scaled_dot_product_flash_attention_for_cpu_backward
            return (out, *back(*inputs, out, logs, 0.0, causal, attn_mask=mask))
        if kind == "flash":
            made = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)
            out, logs, first, second, rows, columns, seed, offset, _ = made
            back = aten._scaled_dot_product_flash_attention_backward
            return (out, *back(*inputs, out, logs, first, second, rows, columns, 0.0, causal, seed, offset))
        if kind == "efficient":
            made = aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, 0.0, causal)
            wanted = [True, True, True, False]
            back = aten._scaled_dot_product_efficient_attention_backward
            return (made[0], *back(*inputs, mask, *made, 0.0, wanted, causal)[:3])
        made = aten._scaled_dot_product_cudnn_attention(query, key, value, mask, True, 0.0, causal)
        out, logs, first, second, rows, columns, seed, offset, _ = made
        back = aten._scaled_dot_product_cudnn_attention_backward
        tail = (seed, offset, mask, first, second, rows, columns, 0.0, causal)
        return (out, *back(*inputs, out, logs, *tail))

    return run


def backwards(kind: str) -> Callable[..., Any]:
    """Gradients of causal attention, by one of the operators, of what its forward half left."""

    def run(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logarithms: Tensor) -> Any:
        inputs, rows, seed = (gradient, query, key, value), query.shape[2], torch.zeros(())
        if kind == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, out, logarithms, 0.0, True)
        if kind == "flash":
            back = aten._scaled_dot_product_flash_attention_backward
            return back(*inputs, out, logarithms, None, None, rows, rows, 0.0, True, seed, seed)
        if kind == "efficient":
            back = aten._scaled_dot_product_efficient_attention_backward
            return back(*inputs, None, out, logarithms, seed, seed, 0.0, [True, True, True, False], True)[:3]
        back = aten._scaled_dot_product_cudnn_attention_backward
        return back(*inputs, out, logarithms, seed, seed, None, None, None, rows, rows, 0.0, True)

    return run
