"""Operators that only move elements: each follows the dimension that carries the tokens to its new place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import Along, Division
from .pieces import RULES as _PIECES

__all__ = ["RULES", "regrouped"]

_ATEN = torch.ops.aten


def regrouped(division: Division, before: Sequence[int], along: Along, after: Sequence[int]) -> Along | None:
    """The state ``along`` of a value of shape ``before`` once it is viewed as ``after``; None where units are parted.

    In row-major order the value is [outer, units, inner]. The dimension of ``after`` that holds the units must end on
    a multiple of its row length inside ``inner``, and begin inside ``outer``.
    """
    outer = _product(before[: along.dim]) * along.blocks
    inner = along.scale * _product(before[along.dim + 1 :])
    units = sum(division.units)
    for dim, extent in enumerate(after):
        front, behind = _product(after[:dim]), _product(after[dim + 1 :])
        if front and behind and outer % front == 0 and inner % behind == 0:
            found = Along(dim, inner // behind, outer // front)
            if extent == found.blocks * units * found.scale:
                return found
    return None


def _product(extents: Sequence[int]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result


def _view(call: Call) -> Outcome:
    state = call.operands[0].state
    if "dtype" in call.arguments:
        return Refused("it views the elements as another type")
    if not isinstance(state, Along):
        return Divided(state)
    shape = tuple(call.value.shape)
    found = regrouped(call.division, call.operands[0].shape, state, shape)
    if found is None:
        return Refused("its shape takes tokens of one part apart")

    def emit(part: Part) -> Node:
        return part.reshape(part.operand(0), part.division.shape(shape, found, part.index))

    return Divided(found, emit=emit)


def _moved(order: Callable[[Call], Sequence[int]]) -> Rule:
    """A rule for an operator whose result's dimension i is the operand's dimension ``order(call)[i]``."""

    def divide(call: Call) -> Outcome:
        state = call.operands[0].state
        return Divided(state.at(list(order(call)).index(state.dim)) if isinstance(state, Along) else state)

    return Rule(divide, partial=True)


def _rank(call: Call) -> int:
    return len(call.operands[0].shape)


def _permuted(call: Call) -> Sequence[int]:
    return [dim % _rank(call) for dim in call.arguments["dims"]]


def _transposed(call: Call) -> Sequence[int]:
    order = list(range(_rank(call)))
    first, second = call.arguments["dim0"], call.arguments["dim1"]
    order[first], order[second] = order[second], order[first]
    return order


def _turned(call: Call) -> Sequence[int]:
    return list(reversed(range(_rank(call))))


def _unsqueeze(call: Call) -> Outcome:
    state = call.operands[0].state
    if not isinstance(state, Along):
        return Divided(state)
    dim = call.arguments["dim"] % (_rank(call) + 1)
    return Divided(state.at(state.dim + (dim <= state.dim)))


def _squeeze(call: Call) -> Outcome:
    """Dimensions are named, so that a part of one token keeps that dimension."""
    state = call.operands[0].state
    shape = call.operands[0].shape
    asked = call.arguments.get("dim")
    dims = range(len(shape)) if asked is None else (asked if isinstance(asked, list | tuple) else [asked])
    gone = sorted({dim % len(shape) for dim in dims if shape[dim] == 1}) if shape else []
    result = state.at(state.dim - sum(dim < state.dim for dim in gone)) if isinstance(state, Along) else state
    return Divided(result, emit=lambda part: part.make(_ATEN.squeeze.dims, part.operand(0), gone))


def _expand(call: Call) -> Outcome:
    state = call.operands[0].state
    if not isinstance(state, Along):
        return Divided(state)
    shape = tuple(call.value.shape)
    found = state.at(state.dim + len(shape) - _rank(call))
    return Divided(found, given={"size": lambda part: list(call.division.shape(shape, found, part))})


def _repeat(call: Call) -> Outcome:
    """Copies side by side: those along the tokens are blocks."""
    state = call.operands[0].state
    if not isinstance(state, Along):
        return Divided(state)
    repeats = call.arguments["repeats"]
    dim = state.dim + len(repeats) - _rank(call)
    return Divided(Along(dim, state.scale, state.blocks * repeats[dim])) if repeats[dim] else Refused("it is empty")


def _flip(call: Call) -> Outcome:
    state = call.operands[0].state
    if isinstance(state, Along) and state.dim in [dim % _rank(call) for dim in call.arguments["dims"]]:
        return Refused("it turns the order of the tokens")
    return Divided(state)


def _roll(call: Call) -> Outcome:
    state = call.operands[0].state
    dims = [dim % _rank(call) for dim in call.arguments["dims"]]
    if isinstance(state, Along) and (not dims or state.dim in dims):
        return Refused("it moves tokens from part to part")
    return Divided(state)


def _pad(call: Call) -> Outcome:
    """``pad`` has a pair of numbers for each dimension, from the last."""
    state = call.operands[0].state
    pad = call.arguments["pad"]
    if isinstance(state, Along):
        pair = pad[2 * (_rank(call) - 1 - state.dim) :][:2]
        return Refused("it pads along the tokens") if any(pair) else Divided(state)
    return Divided(state) if call.arguments.get("value") in (None, 0) else Refused("it adds to the sum over all parts")


def _as_complex(call: Call) -> Outcome:
    """Pairs along the last dimension become one number."""
    state = call.operands[0].state
    if isinstance(state, Along) and state.dim >= len(call.value.shape):
        return Refused("it makes pairs of tokens")
    return Divided(state)


def _repeat_each(call: Call) -> Outcome:
    """Each element several times in a row: along the tokens that is a larger scale."""
    state, times = call.operands[0].state, call.arguments["repeats"]
    if not isinstance(times, int) or not isinstance(state, Along):
        return Divided(state) if isinstance(times, int) else Refused("it repeats tokens different numbers of times")
    dim = call.arguments["dim"]
    if times < 1 or call.arguments.get("output_size") is not None or (dim is None and _rank(call) > 1):
        return Refused("it takes the tokens apart")
    repeated = (dim or 0) % _rank(call) == state.dim
    return Divided(Along(state.dim, state.scale * times, state.blocks) if repeated else state)


def _triangle(call: Call) -> Outcome:
    """``tril`` and ``triu``: part i's rows, or columns, begin further down, or to the right."""
    state = call.operands[0].state
    if not isinstance(state, Along) or state.dim < _rank(call) - 2:
        return Divided(state)
    if state.blocks > 1:
        return Refused("a triangle over tokens that do not lie together")
    turn = 1 if state.dim == _rank(call) - 2 else -1

    def diagonal(part: int) -> int:
        return int(call.arguments["diagonal"]) + turn * call.division.bounds(state, part)[0]

    return Divided(state, given={"diagonal": diagonal})


_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::view_copy", "aten::_reshape_copy")
_SAME_PLACE = Rule(lambda call: Divided(call.operands[0].state), partial=True)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_VIEWS, Rule(_view, partial=True)),
    **dict.fromkeys(("aten::permute", "aten::permute_copy"), _moved(_permuted)),
    **dict.fromkeys(("aten::transpose", "aten::transpose_copy"), _moved(_transposed)),
    "aten::t": _moved(_turned),
    "aten::unsqueeze": Rule(_unsqueeze, partial=True),
    "aten::squeeze": Rule(_squeeze, partial=True),
    "aten::expand": Rule(_expand, partial=True),
    "aten::repeat": Rule(_repeat, partial=True),
    "aten::flip": Rule(_flip, partial=True),
    "aten::roll": Rule(_roll, partial=True),
    "aten::constant_pad_nd": Rule(_pad, partial=True),
    **dict.fromkeys(("aten::contiguous", "aten::view_as_real"), _SAME_PLACE),
    "aten::view_as_complex": Rule(_as_complex, partial=True),
    "aten::repeat_interleave": Rule(_repeat_each, partial=True),
    **dict.fromkeys(("aten::tril", "aten::triu"), Rule(_triangle, partial=True)),
    **_PIECES,
}
