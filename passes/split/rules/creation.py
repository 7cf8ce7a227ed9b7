"""Operators that make tensors by the shape or the type of another."""

from __future__ import annotations

from ..rule import Call, Divided, Outcome, Rule
from ..state import WHOLE, Along

__all__ = ["RULES"]


def _like(call: Call) -> Outcome:
    """As its operand; where that is a sum, any of its summands has the shape."""
    state = call.operands[0].state
    return Divided(state if isinstance(state, Along) else WHOLE)


def _new(call: Call) -> Outcome:
    """Of a shape of its own: any slice of the operand has the type."""
    return Divided(WHOLE)


_LIKE = ("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like")
_NEW = ("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")
RULES = {**dict.fromkeys(_LIKE, Rule(_like, partial=True)), **dict.fromkeys(_NEW, Rule(_new, partial=True))}
