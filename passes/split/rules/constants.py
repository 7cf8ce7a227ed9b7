"""Indices that no input has a part in: which rows they pick is known, so that parts may be seen to pick their own.

Repeating each token for each of its experts is often written so: ``x[arange(T)[:, None].expand(T, k).reshape(-1)]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..orders import name_of
from ..rule import Call, Divided, Operand, Outcome, Part
from ..state import WHOLE, Along, Division

__all__ = ["constant", "picked_by_part", "put_by_part"]

aten = torch.ops.aten

#: The most elements that are computed to look at them.
_MOST = 1 << 22

_KNOWN = frozenset(
    {
        *("aten::arange", "prims::iota", "aten::full", "aten::ones", "aten::zeros", "aten::view", "aten::reshape"),
        *("aten::_unsafe_view", "aten::expand", "aten::unsqueeze", "aten::squeeze", "aten::clone", "aten::alias"),
        *("aten::detach", "aten::_to_copy", "prims::convert_element_type", "aten::add", "aten::sub", "aten::mul"),
        *("aten::floor_divide", "aten::div", "aten::remainder", "aten::permute", "aten::transpose", "aten::slice"),
    }
)


def constant(node: Node) -> Tensor | None:
    """The value of a node that is computed of numbers alone, on the CPU; None for any other, and for large ones."""
    found: dict[Node, Tensor] = {}
    open_ = [node]
    while open_:
        current = open_[-1]
        value = current.meta.get("val")
        if name_of(current) not in _KNOWN or not isinstance(value, Tensor) or value.numel() > _MOST:
            return None
        missing = [operand for operand in current.all_input_nodes if operand not in found]
        if missing:
            open_.extend(missing)
            continue
        args, kwargs = torch.fx.map_arg((current.args, current.kwargs), found.__getitem__)
        if "device" in kwargs:
            kwargs = {name: item for name, item in kwargs.items() if name != "pin_memory"} | {"device": "cpu"}
        with unset_fake_temporarily(), torch.no_grad():
            found[current] = current.target(*args, **kwargs)  # type: ignore[operator]
        open_.pop()
    return found[node]


def _within(division: Division, rows: Tensor, read: Along, made: Along) -> bool:
    """Whether numbers in each part of ``rows``, cut as ``made``, are rows of that part of what is cut as ``read``."""
    for part in range(division.count):
        (first, last), (least, most) = division.bounds(made, part), division.bounds(read, part)
        own = rows[first:last]
        if not bool(((own >= least) & (own < most)).all()):
            return False
    return True


def _local(call: Call, table: Along, index: Operand) -> Along | None:
    """How ``index``, the only one, is cut so that each part picks its own rows of ``table``; None if none does."""
    listed = call.arguments["indices"]
    places = [place for place, item in enumerate(listed) if item is not None]
    if places != [table.dim] or len(index.shape) != 1 or index.state != WHOLE or table.blocks != 1:
        return None
    cut = call.division.along(index.shape, 0)
    rows = constant(index.node) if cut is not None else None
    return cut if cut is not None and rows is not None and _within(call.division, rows, table, cut) else None


def _shifted(part: Part, table: Along) -> list[Node | None]:
    """The part's indices, counted from where its rows begin."""
    place = part.call.at("indices", table.dim)
    assert place is not None
    start = part.division.bounds(table, part.index)[0]
    own = part.operand(place)
    return [*[None] * table.dim, part.make(aten.sub.Tensor, own, start) if start else own]


def picked_by_part(call: Call, source: Operand, index: Operand) -> Outcome | None:
    """``self[index]`` where each part's indices pick rows of its own."""
    table = source.along
    cut = _local(call, table, index) if table is not None else None
    if table is None or cut is None:
        return None
    return Divided(
        cut.at(table.dim), call.states(indices=cut), emit=lambda part: part.again(indices=_shifted(part, table))
    )


def put_by_part(call: Call, target: Operand, index: Operand, values: Operand) -> Outcome | None:
    """``self`` with rows of ``values`` at ``index``, where each part's indices are of rows of its own."""
    dim = index.index or 0
    table = call.division.along(target.shape, dim)
    cut = _local(call, table, index) if table is not None else None
    if table is None or cut is None or target.state not in (table, WHOLE):
        return None
    if len(values.shape) != len(target.shape) or values.state != cut.at(dim):
        return None
    states = call.states(self=table, indices=cut)
    return Divided(table, states, emit=lambda part: part.again(indices=_shifted(part, table)))
