"""Choosing, sorting, gathering and scattering: what mixtures of experts and tables are made of.

Along another dimension than the tokens, all of these treat each token alone. Reading from a table gives each token
its rows; adding to one gives each part a summand. What chooses among the tokens themselves, or writes over what
other tokens wrote, is refused: a part alone would choose otherwise. So is a place in a buffer of fixed size, which
``cumsum`` gives out over all tokens exactly, but which then holds rows of all parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..orders import Counts, Shuffled, Slots, bound_of, identity
from ..rule import Call, Divided, Operand, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Partial
from ._operands import CHOSEN, OTHERWISE, alike, needs, once, sliced, zeros

__all__ = ["RULES"]

aten = torch.ops.aten


def _dim(call: Call, operand: Operand) -> int:
    """The argument ``dim``, counted from 0."""
    return int(call.arguments["dim"]) % max(1, len(operand.shape))


def _outputs(call: Call, along: Along) -> Along | tuple[Along, ...]:
    """``along`` for all that is returned."""
    return along if isinstance(call.value, torch.Tensor) else (along,) * len(call.value)


def _ordered(call: Call) -> Outcome:
    """Sorting, choosing and scanning along ``dim``."""
    along = call.operands[0].along
    if along is None or len(call.operands) != 1:
        return Refused(OTHERWISE)
    if _dim(call, call.operands[0]) != along.dim:
        return Divided(_outputs(call, along))
    if call.operator == "aten::sort" and len(call.operands[0].shape) == 1 and along.blocks == 1:
        return _sorted(call, along)
    return Refused("an order among all tokens")


def _sorted(call: Call, along: Along) -> Outcome:
    """Each part in an order of its own, which ``dispatch`` follows."""
    if call.arguments["descending"] or call.operands[0].value.is_floating_point():
        return Refused("an order among all tokens")
    key = (along.dim, along.scale, along.blocks, call.node.name, identity(call.operands[0].node).name)
    return Divided((Shuffled(*key), Slots(*key)))


def _cumsum(call: Call) -> Outcome:
    """A running sum; over the tokens, each part goes on where the one before ended."""
    along = call.operands[0].along
    if along is None:
        return Refused(OTHERWISE)
    dim = _dim(call, call.operands[0])
    if dim != along.dim:
        return Divided(along)
    if along.blocks > 1:
        return Refused("a running sum over tokens that do not lie together")

    def emit(part: Part) -> Node:
        own = part.again()
        if part.index == 0:
            return own
        last = part.make(aten.slice.Tensor, part.earlier[-1], dim, -1, sys.maxsize)
        return part.make(aten.add.Tensor, own, last)

    return Divided(along, emit=emit)


def _histc(call: Call) -> Outcome:
    """Counts add up; the edges must not depend on the numbers."""
    if call.operands[0].along is None or not call.arguments["min"] < call.arguments["max"]:
        return Refused("a histogram between the least and the greatest of all tokens")
    ids, bins = identity(call.operands[0].node), call.arguments["bins"]
    bound = bound_of(ids)
    edges = call.arguments["min"], call.arguments["max"]
    counts = bound is not None and bound <= bins and edges in ((0, bins), (0, bins - 1))  # number e falls in bin e
    return Divided(Counts(ids.name, bins) if counts else Partial())


def _searchsorted(call: Call) -> Outcome:
    """Each number's place in one sorted row."""
    along = call.operands[1].along
    if along is None or call.operands[0].state != WHOLE or len(call.operands) != 2 or len(call.operands[0].shape) != 1:
        return Refused(OTHERWISE)
    return Divided(along)


def _index_select(call: Call) -> Outcome:
    """Rows of ``dim``."""
    source, index = call.operands
    dim = _dim(call, source)
    if index.along is None and source.along is not None and source.along.dim != dim:
        return Divided(source.along)
    if index.along is not None and source.state == WHOLE and index.shape:
        return Divided(index.along.at(dim))
    return Refused(CHOSEN)


def _index_add(call: Call) -> Outcome:
    """Rows added to those of ``dim``."""
    target, index, source = call.operands
    dim = _dim(call, target)
    if index.along is None:
        along = target.along or source.along
        given = alike(call, along, ("self", "source")) if along and along.dim != dim else None
        if along is not None and given is not None:
            return Divided(along, needs(call, given))
        return Refused(CHOSEN)
    wanted = index.along.at(dim)
    if target.state == WHOLE and source.state in (WHOLE, wanted) and sliced(call, source.shape, wanted):
        return once(0, (WHOLE, index.along, wanted), zeros(target))
    return Refused(CHOSEN)


def _gather(call: Call) -> Outcome:
    """Items of ``self``, chosen along ``dim`` by ``index``."""
    source, index = call.operands
    dim = _dim(call, source)
    along = index.along or source.along
    if along is None:
        return Refused(OTHERWISE)
    if along.dim != dim:
        given = alike(call, along, ("self", "index"))
        return Refused(OTHERWISE) if given is None else Divided(along, needs(call, given))
    if index.along is not None and source.state == WHOLE:
        return Divided(along)
    return Refused(CHOSEN)


def _scatter(sums: Callable[[Call], bool]) -> Callable[[Call], Outcome]:
    """Items written along ``dim``; ``sums`` says whether the call adds them up."""

    def divide(call: Call) -> Outcome:
        names = ("self", "index", "src")
        along = next((operand.along for operand in call.operands if operand.along), None)
        if along is None:
            return Refused(OTHERWISE)
        target = call.operands[0]
        if along.dim != _dim(call, target):
            given = alike(call, along, names)
            return Refused(OTHERWISE) if given is None else Divided(along, needs(call, given))
        given = alike(call, along, names[1:])
        if target.state == WHOLE and given is not None and sums(call):
            return once(0, needs(call, given), zeros(target))
        return Refused("writing to places that other tokens write to")

    return divide


def _sum_of_all(call: Call) -> bool:
    """Whether ``scatter_reduce`` adds to what is there."""
    return bool(call.arguments["reduce"] == "sum" and call.arguments["include_self"])


def _never(_: Any) -> bool:
    return False


RULES: dict[str, Rule] = {
    **{
        f"aten::{name}": Rule(_ordered)
        for name in ("topk", "sort", "argsort", "kthvalue", "cummax", "cummin", "cumprod", "logcumsumexp", "mode")
    },
    "aten::cumsum": Rule(_cumsum),
    "aten::histc": Rule(_histc),
    "aten::searchsorted": Rule(_searchsorted),
    "aten::index_select": Rule(_index_select),
    "aten::index_add": Rule(_index_add),
    "aten::gather": Rule(_gather),
    "aten::scatter": Rule(_scatter(_never)),
    "aten::scatter_add": Rule(_scatter(lambda call: True)),
    "aten::scatter_reduce": Rule(_scatter(_sum_of_all)),
}
