"""What the rules of several families ask of their operands."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from ..rule import Call, Divided, Operand, Part
from ..state import WHOLE, Along, Partial, State

__all__ = ["CHOSEN", "OTHERWISE", "alike", "first_cut", "needs", "once", "packed", "sliced", "zeros"]

aten = torch.ops.aten

CHOSEN = "rows chosen among all tokens"
OTHERWISE = "operands that are not cut alike"


def alike(call: Call, along: Along, names: Iterable[str]) -> dict[str, State] | None:
    """``along`` for each of the arguments that is a tensor; None where one is cut otherwise, or is too short for it."""
    found: dict[str, State] = {}
    for operand in call.operands:
        if operand.name not in names:
            continue
        if operand.state not in (along, WHOLE) or not sliced(call, operand.shape, along):
            return None
        found[operand.name] = along
    return found


def sliced(call: Call, shape: tuple[int, ...], along: Along) -> bool:
    """Whether a value of ``shape`` has the extent that ``along`` speaks of."""
    return along.dim < len(shape) and shape[along.dim] == call.division.total(along)


def first_cut(call: Call, names: Iterable[str]) -> Along | None:
    """How the first of the arguments that is cut, is cut."""
    for name in names:
        operand = call.operand(name)
        if operand is not None and operand.along is not None:
            return operand.along
    return None


def needs(call: Call, given: dict[str, State]) -> tuple[State, ...]:
    """States of all operands: those given by the argument's name, and Whole for the others."""
    return tuple(given.get(operand.name, WHOLE) for operand in call.operands)


def once(place: int, states: tuple[State, ...], zeros: bool) -> Divided:
    """A sum onto operand ``place``, which only part 0 adds to; the others to zeros."""

    def emit(part: Part) -> Node:
        if part.index == 0 or zeros:
            return part.again()
        name = part.call.operands[place].name
        return part.again(**{name: part.make(aten.zeros_like.default, part.operand(place))})

    return Divided(Partial(), states, emit=emit)


def zeros(operand: Operand) -> bool:
    """Whether an operand is a constant of zeros."""
    node = operand.node
    name = str(getattr(getattr(node.target, "_schema", None), "name", ""))
    if name in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
        return True
    filled = name in ("aten::full", "aten::full_like", "aten::new_full")
    return filled and len(node.args) > 1 and isinstance(node.args[-1], int | float) and not node.args[-1]


def packed(part: Part, name: str) -> Node:
    """The part's node of an operand, without gaps in memory."""
    place = part.call.at(name)
    assert place is not None
    node = part.operand(place)
    if node.meta["val"].is_contiguous():
        return node
    return part.make(aten.clone.default, node, memory_format=torch.contiguous_format)
