"""How graphs say the cross-entropy of a linear layer's logits: whole, in two steps, and as Inductor decomposes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..compiler.graph import Tensor
from ._match import Found, Pattern, Walk, any_tensor, call, either, literal, number, reshaped, transposed
from ._patterns import linears

__all__ = ["Loss", "losses"]

_LOGITS, _TARGET, _DIM = any_tensor("logits"), any_tensor("target"), literal("dim")
_OPTIONS = (None, number("reduction"), number("ignore_index"), number("label_smoothing"))


def _calls(name: str, source: Pattern, most: int) -> tuple[Pattern, ...]:
    """A call with some of the options, as exported graphs leave out those that are at their defaults."""
    return tuple(call(name, source, _TARGET, *_OPTIONS[:count]) for count in range(most, -1, -1))


_SHIFTED = call("sub", _LOGITS, call("amax", _LOGITS, _DIM, True))
_LOG_SOFTMAX = either(
    call("log_softmax", _LOGITS, _DIM),
    call("_log_softmax", _LOGITS, _DIM, False),
    call("sub", _SHIFTED, call("log", call("sum", call("exp", _SHIFTED), _DIM, True))),
)
_IS_VALID = call("ne", _TARGET, number("ignore_index"))
_PLACE = call("where", _IS_VALID, _TARGET, call("scalar_tensor", 0, dtype=torch.int64, layout=torch.strided))
_PICKED = call("neg", call("gather", _LOG_SOFTMAX, literal("gathered"), _PLACE))
_LOSSES = call("where", _IS_VALID, _PICKED, call("scalar_tensor", 0, layout=torch.strided))
_COUNT = call("convert_element_type", call("sum", _IS_VALID), torch.float32)
_LOSS = either(
    *_calls("cross_entropy_loss", _LOGITS, 4),
    *_calls("nll_loss_nd", _LOG_SOFTMAX, 3),
    *_calls("nll_loss_forward", _LOG_SOFTMAX, 3),
    call("div", call("sum", _LOSSES), _COUNT),
    _LOSSES,
)
_ROOTS = ("cross_entropy_loss", "nll_loss_nd", "nll_loss_forward", "div", "where")
_CAPPED = call("mul", call("tanh", call("div", any_tensor("plain"), number("cap"))), number("cap"))


@dataclass(frozen=True)
class Loss:
    """``out``: the mean loss, or each token's, of ``soft_cap * tanh(x @ weight.T / soft_cap)``; no cap where that is 0.

    ``x`` is ``[tokens, depth]``, ``weight`` ``[vocabulary, depth]``, ``target`` int64 ``[tokens]``.
    """

    out: Tensor
    is_mean: bool
    x: Tensor
    weight: Tensor
    target: Tensor
    ignore_index: int
    label_smoothing: float
    soft_cap: float


def losses(walk: Walk) -> Iterator[Loss]:
    """The float32 losses in a graph whose logits, ``[tokens, vocabulary]``, are a linear layer's without bias.

    Logits may be of any floating-point dtype before the loss.
    """
    for out in walk.results(*_ROOTS):
        if out.dtype == "float32":
            for found in walk.find(_LOSS, out):
                yield from _losses(walk, out, found)


def _losses(walk: Walk, out: Tensor, found: Found) -> Iterator[Loss]:
    logits, target, options = found["logits"], found["target"], found.literals
    tokens, last = math.prod(logits.shape[:-1]), len(logits.shape) - 1
    is_mean = options.get("reduction", not out.shape)
    # A target of one dimension says that the loss saw logits of two, whatever log-softmax saw.
    if last < 1 or target.shape != (tokens,) or target.dtype != "int64" or reshaped(target, (1, tokens)) is None:
        return
    if is_mean not in (0, 1) or out.shape != (() if is_mean else (tokens,)):
        return
    if options.get("dim", -1) not in (-1, last, [-1], [last]) or options.get("gathered", 1) not in (1, -1):
        return
    for x, weight, soft_cap in _linears(walk, logits, tokens):
        yield Loss(
            out,
            bool(is_mean),
            x,
            weight,
            target,
            int(options.get("ignore_index", -100)),
            float(options.get("label_smoothing", 0.0)),
            soft_cap,
        )


def _linears(walk: Walk, logits: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """``x``, ``weight`` and the soft cap that logits may be of."""
    for dtype in ("float32", "float16", "bfloat16"):
        narrow = walk.uncast(logits, dtype)
        plain = [(narrow, 0.0), *((f["plain"], float(f.literals["cap"])) for f in walk.find(_CAPPED, narrow))]
        for tensor, soft_cap in plain:
            source = reshaped(walk.uncast(tensor, dtype), (tokens, logits.shape[-1]))
            if source is None or source.dtype != dtype or soft_cap < 0:
                continue
            for linear in linears(walk, source):
                if linear.bias is None:
                    yield linear.x, transposed(linear.weight), soft_cap
