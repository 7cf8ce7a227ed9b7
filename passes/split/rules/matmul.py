"""Matrix products, as sums over labelled dimensions.

Dividing along a label needs every operand that has it in slices, and the others whole. The result has slices of it,
or, where the label is summed over, each part has a summand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from ..rule import Call, Divided, Operand, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Partial, State

__all__ = ["RULES", "contraction"]

_ATEN = torch.ops.aten


def contraction(call: Call, labels: Sequence[str], result: str) -> Outcome:
    """Operands labelled by ``labels``, one letter a dimension, summed over the letters that ``result`` has not.

    An extent of 1 where another operand's is larger is broadcast. Of the labels along which some operand is divided,
    the one is taken that leaves the fewest elements to be joined; of equals one of the result's, as no sum is needed.
    """
    best: tuple[tuple[int, bool, int], str, tuple[State, ...]] | None = None
    for place, (operand, own) in enumerate(zip(call.operands, labels, strict=True)):
        if not isinstance(operand.state, Along):
            continue
        letter = own[operand.state.dim]
        needs = _needs(call, labels, letter, operand.state)
        if needs is None:
            continue
        joined = sum(_joined(one, need) for one, need in zip(call.operands, needs, strict=True))
        key = (joined, letter not in result, place)
        if best is None or key < best[0]:
            best = key, letter, needs
    if best is None:
        return Refused("no dimension of its operands can be divided alone")
    _, letter, needs = best
    along = next(need for need in needs if isinstance(need, Along))
    reason = "it needs all of an operand that is divided along another dimension"
    return Divided(along.at(result.index(letter)) if letter in result else Partial(), needs, reason=reason)


def _needs(call: Call, labels: Sequence[str], letter: str, along: Along) -> tuple[State, ...] | None:
    needs: list[State] = []
    for operand, own in zip(call.operands, labels, strict=True):
        if own.count(letter) > 1:
            return None
        if letter not in own or operand.shape[own.index(letter)] == 1:
            needs.append(WHOLE)
            continue
        dim = own.index(letter)
        if operand.shape[dim] != call.division.total(along):
            return None
        needs.append(along.at(dim))
    return tuple(needs)


def _joined(operand: Operand, need: State) -> int:
    """Elements to be joined for ``operand`` to be as ``need``."""
    return 0 if operand.state in (WHOLE, need) else math.prod(operand.shape)


def _labelled(*labels: str) -> Rule:
    """The rule of an operator whose operands and result have these labels."""
    return Rule(lambda call: contraction(call, labels[:-1], labels[-1]))


def _with_bias(bias: str, *labels: str) -> Rule:
    """The same with a summand ``bias`` in front, which broadcasts from the right. Only part 0 adds it to summands."""

    def divide(call: Call) -> Outcome:
        own = bias[len(bias) - len(call.operands[0].shape) :]
        found = contraction(call, (own, *labels[:-1]), labels[-1])
        if not isinstance(found, Divided) or found.result != Partial():
            return found
        return Divided(Partial(), found.needs, emit=_bias_once, reason=found.reason)

    return Rule(divide)


def _bias_once(part: Part) -> Node:
    return part.again() if part.index == 0 else part.again(beta=0)


def _linear(call: Call) -> Outcome:
    """``aten.linear``: rows of the input, of any rank, times the rows of the weight, plus a bias."""
    rank = len(call.operands[0].shape)
    rows = "abcdefgh"[: rank - 1]
    labels = [f"{rows}k", "nk", "n"][: len(call.operands)]
    found = contraction(call, labels, f"{rows}n")
    if isinstance(found, Divided) and found.result == Partial() and len(labels) == 3:
        return Refused("it adds a bias to a sum over tokens")
    return found


def _matmul(call: Call) -> Outcome:
    """``aten.matmul`` with operands of two dimensions or more."""
    left, right = (len(operand.shape) for operand in call.operands)
    if min(left, right) < 2:
        return Refused("it multiplies by a vector")
    batch = "abcdefgh"[: max(left, right) - 2]
    return contraction(
        call, (f"{batch[len(batch) - left + 2 :]}mk", f"{batch[len(batch) - right + 2 :]}kn"), f"{batch}mn"
    )


def _einsum(call: Call) -> Outcome:
    equation = str(call.arguments["equation"]).replace(" ", "")
    if "." in equation or "->" not in equation or call.arguments.get("path") is not None:
        return Refused("its equation has an ellipsis, no result, or a path")
    operands, result = equation.split("->")
    return contraction(call, operands.split(","), result)


RULES = {
    "aten::mm": _labelled("mk", "kn", "mn"),
    "aten::bmm": _labelled("bmk", "bkn", "bmn"),
    "aten::mv": _labelled("mk", "k", "m"),
    "aten::dot": _labelled("k", "k", ""),
    "aten::outer": _labelled("m", "n", "mn"),
    "aten::addmm": _with_bias("mn", "mk", "kn", "mn"),
    "aten::baddbmm": _with_bias("bmn", "bmk", "bkn", "bmn"),
    "aten::addmv": _with_bias("m", "mk", "k", "m"),
    "aten::linear": Rule(_linear),
    "aten::matmul": Rule(_matmul),
    "aten::einsum": Rule(_einsum),
}
