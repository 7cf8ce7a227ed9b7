"""Operators that make tensors by the shape or the type of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Refused, Rule
from ..state import WHOLE, Along

__all__ = ["RULES", "repeats"]

_ATEN = torch.ops.aten


def repeats(node: Node, dim: int) -> bool:
    """Whether what ``node`` returns is the same all along ``dim`` by construction, so that a slice is a shorter one."""
    if node.target in (_ATEN.full.default, _ATEN.zeros.default, _ATEN.ones.default):
        return True
    if node.target is not _ATEN.expand.default or not isinstance(node.args[0], Node):
        return False
    shape: Sequence[int] = node.args[0].meta["val"].shape
    own = dim - (len(node.meta["val"].shape) - len(shape))
    return own < 0 or shape[own] == 1 != node.meta["val"].shape[dim]


def _like(call: Call) -> Outcome:
    """As its operand; where that is a sum, any of its summands has the shape."""
    state = call.operands[0].state
    return Divided(state if isinstance(state, Along) else WHOLE)


def _new(call: Call) -> Outcome:
    """Of a shape of its own: any slice of the operand has the type."""
    return Divided(WHOLE)


def _assert_metadata(call: Call) -> Outcome:
    """A check of type and device holds of any slice; one of extents does not."""
    extents = call.arguments.get("size"), call.arguments.get("stride")
    return Divided(WHOLE) if extents == (None, None) else Refused("it checks extents")


_LIKE = ("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like")
_NEW = ("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")
RULES = {
    **dict.fromkeys(_LIKE, Rule(_like, partial=True)),
    **dict.fromkeys(_NEW, Rule(_new, partial=True)),
    "aten::_assert_tensor_metadata": Rule(_assert_metadata, partial=True),
}
