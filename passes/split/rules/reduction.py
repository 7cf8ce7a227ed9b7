"""Reductions and normalisations over dimensions: over others than the tokens' each part does its own.

A sum over the tokens is a sum of the parts' sums. A mean is that of the parts' means, weighed by their lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Partial, State
from .elementwise import pointwise

__all__ = ["RULES"]

_ATEN = torch.ops.aten


def _reduced(call: Call) -> set[int]:
    """The dimensions that are reduced."""
    asked: Any = call.arguments.get("dim")
    rank = len(call.operands[0].shape)
    if asked is None or asked == []:
        return set(range(rank))
    return {dim % max(rank, 1) for dim in (asked if isinstance(asked, list | tuple) else [asked])}


def _after(call: Call, along: Along) -> Along:
    """The state of the result where the tokens' dimension stays."""
    if call.arguments.get("keepdim"):
        return along
    return along.at(along.dim - sum(dim < along.dim for dim in _reduced(call)))


def _sum(call: Call) -> Outcome:
    state = call.operands[0].state
    if isinstance(state, Along) and state.dim not in _reduced(call):
        return Divided(_after(call, state))
    return Divided(Partial())


def _mean(call: Call) -> Outcome:
    state = call.operands[0].state
    if not isinstance(state, Along):
        return Divided(Partial())
    if state.dim not in _reduced(call):
        return Divided(_after(call, state))

    def emit(part: Part) -> Node:
        division = part.division
        return part.make(_ATEN.mul.Scalar, part.again(), division.units[part.index] / sum(division.units))

    return Divided(Partial(), emit=emit)


def _over(reason: str) -> Rule:
    """A rule for reductions that cannot be put together from those of the parts; ``reason`` says what they are."""

    def divide(call: Call) -> Outcome:
        state = call.operands[0].state
        assert isinstance(state, Along)
        if state.dim in _reduced(call):
            return Refused(f"{reason} over the tokens")
        after = _after(call, state)
        return Divided((after,) * len(call.value) if isinstance(call.value, list | tuple) else after)

    return Rule(divide)


def _kept(reason: str) -> Rule:
    """The same for operators whose result has all dimensions of the operand, such as softmax."""

    def divide(call: Call) -> Outcome:
        state = call.operands[0].state
        assert isinstance(state, Along)
        if state.dim in _reduced(call):
            return Refused(f"{reason} over the tokens")
        return Divided((state,) * len(call.value) if isinstance(call.value, list | tuple) else state)

    return Rule(divide)


def _max(call: Call) -> Outcome:
    """``max`` and ``min``: of two tensors, of all elements, or along a dimension with the index."""
    return pointwise(call) if "other" in call.arguments else _over("it is the extreme").divide(call)


def _norm(call: Call) -> Outcome:
    """Normalisations over the last dimensions: of several results, those before them stay."""
    operand = call.operands[0]
    if not isinstance(operand.state, Along):
        return Refused("its weights are divided")
    if operand.state.dim >= len(operand.shape) - len(call.arguments["normalized_shape"]):
        return Refused("it normalises over the tokens")
    needs: tuple[State, ...] = (operand.state, *(WHOLE for _ in call.operands[1:]))
    several = isinstance(call.value, list | tuple)
    result = (operand.state,) * len(call.value) if several else operand.state
    return Divided(result, needs, reason="its weights are divided")


def _inference_batch_norm(call: Call) -> Outcome:
    """With given statistics of the channels, dimension 1, each other element is on its own; the rest is empty."""
    operand = call.operands[0]
    if operand.along is None or operand.along.dim == 1:
        return Refused("its channels are divided")
    needs: tuple[State, ...] = (operand.along, *(WHOLE for _ in call.operands[1:]))
    return Divided((operand.along, WHOLE, WHOLE), needs, reason="its weights are divided")


_EXTREME, _COUNT = _over("it is the extreme"), _over("it is no sum of the parts' results")

RULES = {
    "aten::sum": Rule(_sum, partial=True),
    "aten::mean": Rule(_mean, partial=True),
    **dict.fromkeys(("aten::max", "aten::min"), Rule(_max)),
    **dict.fromkeys(("aten::amax", "aten::amin", "aten::argmax", "aten::argmin"), _EXTREME),
    **dict.fromkeys(("aten::prod", "aten::var", "aten::std", "aten::var_mean", "aten::logsumexp"), _COUNT),
    **dict.fromkeys(("aten::all", "aten::any", "aten::linalg_vector_norm", "aten::median"), _COUNT),
    **dict.fromkeys(("aten::_softmax", "aten::softmax", "aten::_log_softmax", "aten::log_softmax"), _kept("softmax")),
    **dict.fromkeys(("aten::cumsum", "aten::cumprod", "aten::logcumsumexp"), _kept("it runs")),
    **dict.fromkeys(("aten::sort", "aten::argsort"), _kept("it sorts")),
    "aten::topk": _kept("it takes the largest"),
    **dict.fromkeys(("aten::native_layer_norm", "aten::layer_norm"), Rule(_norm)),
    **dict.fromkeys(("aten::_fused_rms_norm", "aten::rms_norm"), Rule(_norm)),
    "aten::_native_batch_norm_legit_no_training": Rule(_inference_batch_norm),
}
