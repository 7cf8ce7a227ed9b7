"""Operators that compute each element by itself: arithmetic, comparison, logic, casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch

from ..node import CannotLower, Lowered, Lowering, Node
from ..types import dtype_of

__all__ = ["TABLE", "cast", "narrow", "unary", "widen"]

Unary = Callable[[torch.Tensor], torch.Tensor]
Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_SIGN_BIT = -(2**63)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in a type that ATen computes with; uint64 keeps its bits in int64, so order is lost above 2**63."""
    return tensor.to(_WIDER[tensor.dtype]) if tensor.dtype in _WIDER else tensor


def narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` back in ``dtype``, wrapping around as ONNX integers do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def unary(function: Unary) -> Lowering:
    """The lowering of a function of one tensor."""
    return lambda node: narrow(function(widen(node.tensor(0))), node.value(0).dtype)


def _predicate(function: Unary) -> Lowering:
    return lambda node: function(node.tensor(0))


def _binary(function: Binary, *, by_order: bool = False) -> Lowering:
    """``by_order``: the result depends on the order of values, which int64 does not keep for uint64."""

    def lower(node: Node) -> Lowered:
        left, right = node.tensor(0), node.tensor(1)
        if by_order and left.dtype == torch.uint64:
            raise CannotLower("ATen orders no uint64")
        return narrow(function(widen(left), widen(right)), left.dtype)

    return lower


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in a type whose signed order is the tensor's own; uint64 gets its highest bit flipped."""
    wide = widen(tensor)
    return wide ^ _SIGN_BIT if tensor.dtype == torch.uint64 else wide


def _compare(function: Binary) -> Lowering:
    return lambda node: function(ordered(node.tensor(0)), ordered(node.tensor(1)))


def _logical(function: Binary) -> Lowering:
    return lambda node: function(node.tensor(0), node.tensor(1))


def _divide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Integers are divided towards zero, as C does."""
    if left.is_floating_point() or left.is_complex():
        return torch.div(left, right)
    return torch.div(left, right, rounding_mode="trunc")


def _modulo(node: Node) -> Lowered:
    left, right = node.tensor(0), node.tensor(1)
    if left.dtype == torch.uint64:
        raise CannotLower("ATen orders no uint64")
    function = torch.fmod if node.flag("fmod") else torch.remainder
    return narrow(function(widen(left), widen(right)), left.dtype)


def _power(node: Node) -> Lowered:
    base, exponent = node.tensor(0), node.tensor(1)
    if torch.uint64 in (base.dtype, exponent.dtype):
        raise CannotLower("ATen orders no uint64")
    wide_base, wide_exponent = widen(base), widen(exponent)
    if not base.is_floating_point():
        if exponent.is_floating_point():
            return torch.pow(wide_base.to(torch.float64), wide_exponent.to(torch.float64)).to(base.dtype)
        if exponent.dtype not in (torch.uint8, torch.uint16, torch.uint32):
            # ATen refuses negative integer exponents; going through float64 is what the reference does
            return torch.pow(wide_base.to(torch.float64), wide_exponent.to(torch.float64)).to(base.dtype)
    return narrow(torch.pow(wide_base, wide_exponent), base.dtype)


def _fold_binary(function: Binary, *, by_order: bool) -> Lowering:
    def lower(node: Node) -> Lowered:
        tensors = node.tensors()
        dtype = tensors[0].dtype
        if len(tensors) == 1:
            return tensors[0].clone()
        if by_order and dtype == torch.uint64:
            return (reduce(function, map(ordered, tensors)) ^ _SIGN_BIT).to(dtype)
        return narrow(reduce(function, map(widen, tensors)), dtype)

    return lower


def _mean(node: Node) -> Lowered:
    tensors = node.tensors()
    return reduce(torch.add, tensors) / len(tensors) if len(tensors) > 1 else tensors[0].clone()


def _clip(node: Node) -> Lowered:
    x = node.tensor(0)
    if x.dtype == torch.uint64:
        raise CannotLower("ATen orders no uint64")
    if node.opset < 11:
        low = node.number("min") if node.given("min") else None
        high = node.number("max") if node.given("max") else None
        return torch.clamp(x, low, high) if (low, high) != (None, None) else x.clone()
    if not node.has(1) and not node.has(2):
        return x.clone()
    if all(not node.has(index) or node.is_constant(index) for index in (1, 2)):
        bounds = [node.scalar(index) if node.has(index) else None for index in (1, 2)]
        return narrow(torch.clamp(widen(x), *bounds), x.dtype)
    wide = widen(x)
    if node.has(1):
        wide = torch.maximum(wide, widen(node.tensor(1)))
    if node.has(2):
        wide = torch.minimum(wide, widen(node.tensor(2)))
    return narrow(wide, x.dtype)


def cast(x: torch.Tensor, to: torch.dtype, *, saturate: bool = True) -> torch.Tensor:
    """``x`` as ``to`` by ONNX's rules: float to integer truncates, float8 saturates to its finite range if asked to."""
    if x.dtype == to:
        return x.clone()
    if to in _FLOAT8 and x.dtype != torch.bool:
        return _cast_float8(x, to, saturate)
    if x.is_complex():
        raise CannotLower("Cast of complex numbers")
    if x.is_floating_point() and not to.is_floating_point and to not in (torch.bool, torch.int64):
        # through int64: wrapping around instead of C's undefined behaviour out of range
        return x.to(torch.int64).to(to)
    return x.to(to)


def _cast_float8(x: torch.Tensor, to: torch.dtype, saturate: bool) -> torch.Tensor:
    source = x.to(torch.float32) if x.dtype != torch.float64 else x
    if not saturate:
        if to == torch.float8_e4m3fn:  # torch saturates here; beyond half a step above 448 ONNX wants NaN
            source = torch.where(torch.abs(source) > 464.0, torch.full_like(source, torch.nan), source)
        return source.to(to)
    limit = torch.finfo(to).max
    return torch.clamp(source, -limit, limit).to(to)


def _cast(node: Node) -> Lowered:
    return cast(node.tensor(0), dtype_of(node.integer("to"), str(node)), saturate=node.flag("saturate", True))


def _cast_like(node: Node) -> Lowered:
    return cast(node.tensor(0), node.value(1).dtype, saturate=node.flag("saturate", True))


def _bit_cast(node: Node) -> Lowered:
    x, to = node.tensor(0), dtype_of(node.integer("to"), str(node))
    if x.dtype.itemsize != to.itemsize or torch.bool in (x.dtype, to):
        raise CannotLower("BitCast between types of different size")
    return x.view(to).clone()


def _shift(node: Node) -> Lowered:
    x, by = node.tensor(0), node.tensor(1)
    if node.string("direction") == "LEFT":
        return narrow(torch.bitwise_left_shift(widen(x), widen(by)), x.dtype)
    if x.dtype == torch.uint64:  # the first step moves a zero into the sign bit
        halved = torch.bitwise_right_shift(widen(x), 1) & (2**63 - 1)
        shifted = torch.bitwise_right_shift(halved, torch.clamp(widen(by) - 1, min=0))
        return torch.where(widen(by) == 0, widen(x), shifted).to(x.dtype)
    return narrow(torch.bitwise_right_shift(widen(x), widen(by)), x.dtype)


def _is_inf(node: Node) -> Lowered:
    x = node.tensor(0)
    if x.dtype in _FLOAT8:
        x = x.to(torch.float32)
    positive, negative = node.flag("detect_positive", True), node.flag("detect_negative", True)
    if positive and negative:
        return torch.isinf(x)
    if not positive and not negative:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if positive else torch.isneginf(x)


def _is_nan(node: Node) -> Lowered:
    x = node.tensor(0)
    return torch.isnan(x.to(torch.float32) if x.dtype in _FLOAT8 else x)


def _where(node: Node) -> Lowered:
    chosen, other = node.tensor(1), node.tensor(2)
    return narrow(torch.where(node.tensor(0), widen(chosen), widen(other)), chosen.dtype)


def _reciprocal(x: torch.Tensor) -> torch.Tensor:
    return torch.reciprocal(x)


_UNARY: Mapping[str, Unary] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sign": torch.sign, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Ceil": torch.ceil, "Floor": torch.floor, "Round": torch.round, "Sin": torch.sin, "Cos": torch.cos,
    "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan, "Sinh": torch.sinh,
    "Cosh": torch.cosh, "Tanh": torch.tanh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Erf": torch.erf, "Sigmoid": torch.sigmoid, "Reciprocal": _reciprocal, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip

TABLE: Mapping[str, Lowering] = {
    **{name: unary(function) for name, function in _UNARY.items()},
    "Not": _predicate(torch.logical_not),
    "IsNaN": _is_nan,
    "IsInf": _is_inf,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(_divide, by_order=True),
    "Pow": _power,
    "Mod": _modulo,
    "And": _logical(torch.logical_and),
    "Or": _logical(torch.logical_or),
    "Xor": _logical(torch.logical_xor),
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor),
    "BitShift": _shift,
    "Equal": _compare(torch.eq),
    "Less": _compare(torch.lt),
    "LessOrEqual": _compare(torch.le),
    "Greater": _compare(torch.gt),
    "GreaterOrEqual": _compare(torch.ge),
    "Sum": _fold_binary(torch.add, by_order=False),
    "Max": _fold_binary(torch.maximum, by_order=True),
    "Min": _fold_binary(torch.minimum, by_order=True),
    "Mean": _mean,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast_like,
    "BitCast": _bit_cast,
    "Where": _where,
}
