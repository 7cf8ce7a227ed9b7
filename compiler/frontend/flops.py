"""Arithmetic of one ATen call: multiplications plus additions, from shapes alone.

Matrix products, convolutions and attention are counted exactly (two per multiply-accumulate; bias and scaling are
left out, as in ``torch.utils.flop_counter``, whose registry answers for the operators it knows). Everything else counts
one per element: of the input for a reduction, of the outputs otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .aten import bind_arguments, tensors_in

__all__ = ["count_flops"]

_POOLING = frozenset(
    {
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool2d_with_indices",
        "max_pool3d",
        "max_pool3d_with_indices",
    }
)
_MORE_REDUCTIONS = frozenset({"max", "min", "argmax", "argmin", "logsumexp", "median", "cross_entropy_loss"})


def count_flops(
    target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[torch.Tensor]
) -> int:
    """Multiplications and additions of ``target(*args, **kwargs)``, which returns ``outputs``; reads shapes only."""
    name = target._schema.name.removeprefix("aten::")
    counter = _COUNTERS.get(name)
    if counter is not None:
        return counter(bind_arguments(target, args, kwargs), outputs[0])
    known = flop_registry.get(target.overloadpacket)
    if known is not None:
        return int(known(*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else tuple(outputs)))
    if torch.Tag.reduction in target.tags or name in _MORE_REDUCTIONS or name in _POOLING:
        return max((t.numel() for t in tensors_in([*args, *kwargs.values()])), default=0)
    return sum(t.numel() for t in outputs)


def _linear(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    return 2 * int(out.numel()) * int(bound["input"].shape[-1])


def _matmul(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    return 2 * int(out.numel()) * int(bound["self"].shape[-1])


def _convolution(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    """Each output element takes one multiply-accumulate per kernel element of its group (weight: out, in/groups, k)."""
    return 2 * int(out.numel()) * int(math.prod(bound["weight"].shape[1:]))


def _transposed_convolution(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    """Each input element is scattered through the kernel of its group (weight: in, out/groups, k...)."""
    return 2 * int(bound["input"].numel()) * int(math.prod(bound["weight"].shape[1:]))


def _any_convolution(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    return (_transposed_convolution if bound["transposed"] else _convolution)(bound, out)


def _attention(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    """Two products over ``batch x heads`` of the query; masks and causality skip nothing."""
    query, key, value = bound["query"], bound["key"], bound["value"]
    scores = int(math.prod(query.shape[:-1])) * int(key.shape[-2])
    return 2 * scores * (int(query.shape[-1]) + int(value.shape[-1]))


def _einsum(bound: Mapping[str, Any], out: torch.Tensor) -> int:
    """Product of the extents of all indices, twice; an upper bound when three or more operands are contracted."""
    terms = bound["equation"].replace(" ", "").partition("->")[0].split(",")
    extents: dict[str, int] = {}
    for term, operand in zip(terms, bound["tensors"], strict=True):
        before, dots, after = term.partition("...")
        shape = list(operand.shape)
        split = len(shape) - len(after)
        extents.update(zip(before, shape[: len(before)], strict=True))
        extents.update(zip(after, shape[split:], strict=True))
        if dots:
            hidden = shape[len(before) : split]
            for place, extent in enumerate(reversed(hidden)):
                extents[f"...{place}"] = max(extent, extents.get(f"...{place}", 1))
    return 2 * math.prod(extents.values())


_COUNTERS: Mapping[str, Callable[[Mapping[str, Any], torch.Tensor], int]] = MappingProxyType(
    {
        "linear": _linear,
        "matmul": _matmul,
        "mv": _matmul,
        "dot": _matmul,
        "conv1d": _convolution,
        "conv2d": _convolution,
        "conv3d": _convolution,
        "conv_transpose1d": _transposed_convolution,
        "conv_transpose2d": _transposed_convolution,
        "conv_transpose3d": _transposed_convolution,
        "convolution": _any_convolution,
        "_convolution": _any_convolution,
        "einsum": _einsum,
        "scaled_dot_product_attention": _attention,
        "_scaled_dot_product_attention_math": _attention,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
    }
)
