"""Activation functions of epilogues: in Triton on float32 tiles, and the same in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch.nn import functional

__all__ = ["ACTIVATIONS", "activated", "activated_with_slope", "slope_of"]

#: By the names that kernels take. `activated` computes the same.
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "none": lambda value: value,
        "relu": functional.relu,
        "relu6": functional.relu6,
        "gelu": functional.gelu,
        "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
        "silu": functional.silu,
        "hardswish": functional.hardswish,
    }
)

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal distribution, at zero
_TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))  # the tanh in GELU is 2 sigmoid(2 u) - 1 of u = root * (...)
_CUBE, _THRICE_CUBE = tl.constexpr(0.044715), tl.constexpr(3 * 0.044715)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def activated(value: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """One of `ACTIVATIONS` of float32 values. Comparisons, not ``tl.maximum``, keep NaN as PyTorch does."""
    if activation == "relu":
        value = tl.where(value < 0.0, 0.0, value)
    elif activation == "relu6":
        value = tl.where(value < 0.0, 0.0, tl.where(value > 6.0, 6.0, value))
    elif activation == "gelu":
        value = 0.5 * value * (1.0 + tl.math.erf(value * _ROOT_HALF))
    elif activation == "gelu_tanh":
        value = value * tl.sigmoid(value * _TWICE_ROOT * (1.0 + value * value * _CUBE))
    elif activation == "silu":
        value = value * tl.sigmoid(value)
    elif activation == "hardswish":
        gate = value + 3.0
        value = value * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) * (1.0 / 6.0)
    else:
        tl.static_assert(activation == "none", "no such activation")
    return value


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def activated_with_slope(value: tl.tensor, activation: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation of float32 values and its derivative there; for the activations of gated products only."""
    if activation == "relu":
        result = tl.where(value < 0.0, 0.0, value)
        slope = tl.where(value > 0.0, 1.0, 0.0)
    elif activation == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(value * _ROOT_HALF))
        result = value * share
        slope = share + value * _DENSITY * tl.exp(-0.5 * value * value)
    elif activation == "gelu_tanh":
        share = tl.sigmoid(value * _TWICE_ROOT * (1.0 + value * value * _CUBE))
        result = value * share
        slope = share + value * share * (1.0 - share) * _TWICE_ROOT * (1.0 + value * value * _THRICE_CUBE)
    else:
        tl.static_assert(activation == "silu", "no such activation of a gated product")
        share = tl.sigmoid(value)
        result = value * share
        slope = share * (1.0 + value * (1.0 - share))
    return result, slope


def slope_of(value: torch.Tensor, activation: str) -> torch.Tensor:
    """The derivative of an activation at ``value``, by PyTorch's own formula for its backward."""
    one = torch.ones_like(value)
    if activation == "relu":
        return (value > 0).to(value.dtype)
    if activation == "silu":
        slope: torch.Tensor = torch.ops.aten.silu_backward(one, value)
        return slope
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    slope = torch.ops.aten.gelu_backward(one, value, approximate=approximate)
    return slope
