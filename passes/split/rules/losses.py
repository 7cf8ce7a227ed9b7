"""Losses over all tokens, and their gradients: each part has its share of a sum or a mean."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import WHOLE, Partial
from ._operands import OTHERWISE, alike, first_cut, needs

__all__ = ["RULES"]

aten = torch.ops.aten

_NONE, _MEAN, _SUM = 0, 1, 2


def _nll_loss_forward(call: Call) -> Outcome:
    """Each part's share of the loss: its sum, divided by the weight of all targets."""
    names = ("self", "target")
    along = first_cut(call, names)
    given = alike(call, along, names) if along else None
    if along is None or given is None or along.dim != 0 or len(call.operands[0].shape) != 2:
        return Refused(OTHERWISE)
    states = needs(call, given)
    reduction = call.arguments["reduction"]
    if reduction == _NONE:
        return Divided((along, WHOLE), states)  # the total weight is then 0, whatever the targets
    if reduction == _SUM:
        return Divided((Partial(), Partial()), states)
    if call.operand("weight") is not None:
        return Refused("a mean weighted by classes")
    return Divided((Partial(), Partial()), states, emit=_nll_mean)


def _nll_mean(part: Part) -> tuple[Node, ...]:
    """Sum of the part's losses over the number of targets in all parts."""
    call = part.again(reduction=_SUM)
    loss, own = (part.make(operator.getitem, call, index) for index in range(2))
    place = part.call.at("target")
    assert place is not None
    total = None
    for index in range(part.division.count):
        kept = part.make(aten.ne.Scalar, part.operand(place, index), part.call.arguments["ignore_index"])
        count = part.make(aten.sum.default, kept)
        total = count if total is None else part.make(aten.add.Tensor, total, count)
    assert total is not None
    weight = part.make(aten._to_copy.default, total, dtype=loss.meta["val"].dtype)
    return part.make(aten.div.Tensor, loss, weight), own


def _nll_loss_backward(call: Call) -> Outcome:
    """Each row's gradient, divided by the weight of all targets."""
    names = ("self", "target") if call.arguments["reduction"] else ("self", "target", "grad_output")
    along = first_cut(call, names)
    given = alike(call, along, names) if along else None
    if along is None or given is None or along.dim != 0 or len(call.operands[1].shape) != 2:
        return Refused(OTHERWISE)
    return Divided(along, needs(call, given), reason="a mean over the tokens of all parts")


def _mse_loss(call: Call) -> Outcome:
    """Each part's share of the loss."""
    names = ("self", "target")
    along = first_cut(call, names)
    given = alike(call, along, names) if along else None
    if along is None or given is None or call.operands[0].shape != call.operands[1].shape:
        return Refused(OTHERWISE)
    if call.arguments["reduction"] == _NONE:
        return Divided(along, needs(call, given))
    emit = _mean_of_sum(call.operands[0].value.numel()) if call.arguments["reduction"] == _MEAN else None
    return Divided(Partial(), needs(call, given), emit=emit)


def _mse_loss_backward(call: Call) -> Outcome:
    """Each element's gradient."""
    reduction = call.arguments["reduction"]
    names = ("self", "target") if reduction else ("self", "target", "grad_output")
    along = first_cut(call, names)
    given = alike(call, along, names) if along else None
    if along is None or given is None or call.operands[1].shape != call.operands[2].shape:
        return Refused(OTHERWISE)
    emit = _mean_of_sum(call.operands[1].value.numel()) if reduction == _MEAN else None
    return Divided(along, needs(call, given), emit=emit)


def _mean_of_sum(count: int) -> Callable[[Part], Node]:
    """The call with sums in place of means, divided by ``count``, the number of elements of the whole."""
    return lambda part: part.make(aten.div.Scalar, part.again(reduction=_SUM), count)


RULES: dict[str, Rule] = {
    "aten::nll_loss_forward": Rule(_nll_loss_forward),
    "aten::nll_loss_backward": Rule(_nll_loss_backward),
    "aten::mse_loss": Rule(_mse_loss),
    "aten::mse_loss_backward": Rule(_mse_loss_backward),
}
