"""Operators that work on each element alone, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rule import Call, Divided, Operand, Outcome, Refused, Rule
from ..state import WHOLE, Along, Partial, Result, State

__all__ = ["POINTWISE", "RULES", "aligned", "pointwise"]


def pointwise(call: Call) -> Outcome:
    """One slice of the result needs the same slice of each operand that has the dimension, counted from the right."""
    if any(isinstance(operand.state, Partial) for operand in call.operands):
        return _linear(call)
    value = call.value[0] if isinstance(call.value, list | tuple) else call.value
    wanted = _wanted(call, value.dim())
    needs = tuple(aligned(operand, wanted, tuple(value.shape)) for operand in call.operands)
    if any(need is None for need in needs):
        return Refused("its operands do not have the tokens at one dimension")
    states = tuple(need for need in needs if need is not None)
    result: Result = (wanted,) * len(call.value) if isinstance(call.value, list | tuple) else wanted
    return Divided(result, states, reason="its operands are divided along different dimensions")


def _wanted(call: Call, rank: int) -> Along:
    """The state of the result: that of the largest operand that is Along, at the result's dimension."""
    divided = [operand for operand in call.operands if isinstance(operand.state, Along)]
    largest = max(divided, key=lambda operand: operand.value.numel())
    assert isinstance(largest.state, Along)
    return largest.state.at(largest.state.dim + rank - len(largest.shape))


def aligned(operand: Operand, wanted: Along, shape: tuple[int, ...]) -> State | None:
    """The state in which ``operand``, broadcast to ``shape``, gives slices ``wanted``; None where there is none."""
    dim = wanted.dim - (len(shape) - len(operand.shape))
    if dim < 0 or operand.shape[dim] == 1 != shape[wanted.dim]:
        return WHOLE
    return wanted.at(dim) if operand.shape[dim] == shape[wanted.dim] else None


def _linear(call: Call) -> Outcome:
    """Summands of the operand give summands of the result, where the operator is linear in it."""
    states = [operand.state for operand in call.operands]
    if _is_linear(call, states):
        return Divided(Partial())
    summed = tuple(WHOLE if isinstance(state, Partial) else state for state in states)
    if all(state == WHOLE for state in summed):
        return Refused("it reads the sum over all parts")
    rest = tuple(
        Operand(operand.node, operand.value, state, operand.name, operand.index)
        for operand, state in zip(call.operands, summed, strict=True)
    )
    return pointwise(Call(call.node, call.arguments, rest, call.value, call.division))


def _is_linear(call: Call, states: Sequence[State]) -> bool:
    """Whether the operator on summands gives summands of the result. A scalar operand counts as an argument."""
    summand = Partial()
    match call.operator:
        case "aten::neg" | "aten::clone" | "aten::alias" | "aten::detach" | "aten::positive":
            return True
        case "aten::_to_copy" | "prims::convert_element_type":
            return _keeps_precision(call)
        case "aten::add" | "aten::sub":
            return list(states) == [summand, summand]
        case "aten::mul":
            return list(states) in ([summand], [summand, WHOLE], [WHOLE, summand])
        case "aten::div":
            return call.arguments.get("rounding_mode") is None and list(states) in ([summand], [summand, WHOLE])
    return False


def _keeps_precision(call: Call) -> bool:
    """Whether a cast loses nothing, so that casting summands is casting the sum."""
    before, after = call.operands[0].value.dtype, call.value.dtype
    return bool(before.is_floating_point and after.is_floating_point and torch.promote_types(before, after) == after)


POINTWISE = Rule(pointwise, partial=True)
_COPIES = ("aten::_to_copy", "prims::convert_element_type", "prims::device_put", "aten::lift_fresh_copy")
_OTHERS = ("aten::alias", "aten::detach", "aten::copy.default", "aten::fill", "aten::masked_fill", "aten::where.self")
_COMPLEX = ("aten::complex", "aten::polar", "aten::_conj", "aten::resolve_conj", "aten::real", "aten::imag")
RULES = dict.fromkeys((*_COPIES, *_OTHERS, *_COMPLEX), POINTWISE)
