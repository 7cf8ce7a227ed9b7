"""Quantisation: to and from small integers, and integer products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..node import CannotLower, Lowered, Lowering, Node
from ..types import dtype_of
from .convolution import convolve, window_of
from .elementwise import cast

__all__ = ["TABLE"]

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)


def _spread(parameter: torch.Tensor, node: Node, x: torch.Tensor) -> torch.Tensor:
    """A scale or zero point so that it broadcasts over ``x``: one for all, one a channel, or one a block."""
    if parameter.numel() == 1 and parameter.dim() < 2:
        return parameter.reshape(())
    axis = node.axis(node.integer("axis", 1), x.dim())
    if parameter.dim() == 1:
        return parameter.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    block = node.integer("block_size", 0)
    if block < 1:
        raise CannotLower("a blocked scale without a block size")
    return torch.narrow(torch.repeat_interleave(parameter, block, axis), axis, 0, x.shape[axis])


def _requantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, to: torch.dtype) -> torch.Tensor:
    """round-half-even(x / scale) + zero, saturated to ``to``."""
    if to not in _INTEGERS:
        scaled = x / scale
        return cast(scaled if zero is None else scaled + zero.to(scaled.dtype), to)
    rounded = torch.round(x / scale)
    if zero is not None:
        rounded = rounded + zero.to(rounded.dtype)
    limits = torch.iinfo(to)
    return torch.clamp(rounded, limits.min, limits.max).to(torch.int32).to(to)


def _quantize(node: Node) -> Lowered:
    x, scale, zero = node.tensor(0), node.tensor(1), node.optional(2)
    to = zero.dtype if zero is not None else torch.uint8
    if zero is None and node.given("output_dtype") and node.integer("output_dtype"):
        to = dtype_of(node.integer("output_dtype"), str(node))
    precision = dtype_of(node.integer("precision", 0), str(node)) if node.integer("precision", 0) else scale.dtype
    if not x.is_floating_point() or precision != x.dtype:
        x = x.to(precision)
    spread = None if zero is None else _spread(zero, node, x)
    return _requantize(x, _spread(scale, node, x).to(x.dtype), spread, to)


def _dequantize(node: Node) -> Lowered:
    x, scale, zero = node.tensor(0), node.tensor(1), node.optional(2)
    spread = _spread(scale, node, x)
    to = dtype_of(node.integer("output_dtype"), str(node)) if node.integer("output_dtype", 0) else scale.dtype
    wide = x.to(scale.dtype if x.dtype.is_floating_point else torch.int32)
    if zero is not None:
        wide = wide - _spread(zero, node, x).to(wide.dtype)
    result = wide.to(scale.dtype) * spread
    return result if result.dtype == to else result.to(to)


def _dynamic_quantize(node: Node) -> Sequence[Lowered]:
    x = node.tensor(0)
    low = torch.clamp(torch.amin(x), max=0.0)
    high = torch.clamp(torch.amax(x), min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    y = torch.clamp(torch.round(x / scale) + zero, 0, 255)
    return [y.to(torch.uint8), scale, zero.to(torch.uint8)]


def _rows(zero: torch.Tensor, rank: int) -> torch.Tensor:
    """A zero point or scale of the left matrix: for all, or one a row."""
    return zero.unsqueeze(-1) if zero.dim() == 1 and zero.numel() > 1 and rank >= 2 else zero


def _shifted(x: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """``x - zero`` in float64, which holds every product sum of 8-bit integers exactly."""
    wide = x.to(torch.float64)
    return wide if zero is None else wide - zero.to(torch.float64)


def _matmul_integer(node: Node) -> Lowered:
    a, b, zero_a, zero_b = node.tensor(0), node.tensor(1), node.optional(2), node.optional(3)
    zero_a = None if zero_a is None else _rows(zero_a, a.dim())
    return torch.matmul(_shifted(a, zero_a), _shifted(b, zero_b)).to(torch.int32)


def _qlinear_matmul(node: Node) -> Lowered:
    a, scale_a, zero_a, b, scale_b, zero_b, scale_y, zero_y = (node.tensor(index) for index in range(8))
    product = torch.matmul(_shifted(a, _rows(zero_a, a.dim())), _shifted(b, zero_b))
    factor = _rows(scale_a, a.dim()).to(torch.float64) * scale_b.to(torch.float64) / scale_y.to(torch.float64)
    return _requantize(product * factor, torch.ones_like(factor), zero_y, zero_y.dtype)


def _channels(parameter: torch.Tensor, rank: int) -> torch.Tensor:
    return parameter.reshape([-1] + [1] * (rank - 1)) if parameter.numel() > 1 else parameter.reshape(())


def _conv_integer(node: Node) -> Lowered:
    x, weight, zero_x, zero_w = node.tensor(0), node.tensor(1), node.optional(2), node.optional(3)
    window = window_of(node, node.integers("kernel_shape", weight.shape[2:]), x.shape[2:])
    zero_w = None if zero_w is None else _channels(zero_w, weight.dim())
    y = convolve(_shifted(x, zero_x), _shifted(weight, zero_w), None, window, node.integer("group", 1))
    return y.to(torch.int32)


def _qlinear_conv(node: Node) -> Lowered:
    x, scale_x, zero_x, weight, scale_w, zero_w, scale_y, zero_y = (node.tensor(index) for index in range(8))
    bias = node.optional(8)
    window = window_of(node, node.integers("kernel_shape", weight.shape[2:]), x.shape[2:])
    shifted = _shifted(weight, _channels(zero_w, weight.dim()))
    wide_bias = None if bias is None else bias.to(torch.float64)
    sums = convolve(_shifted(x, zero_x), shifted, wide_bias, window, node.integer("group", 1))
    factor = scale_x.to(torch.float64) * _channels(scale_w, x.dim() - 1).to(torch.float64) / scale_y.to(torch.float64)
    return _requantize(sums * factor, torch.ones_like(factor), zero_y, zero_y.dtype)


TABLE: Mapping[str, Lowering] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
    "ConvInteger": _conv_integer,
    "QLinearConv": _qlinear_conv,
}
