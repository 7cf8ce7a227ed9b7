"""Operators that take pieces of tensors, or put pieces together.

Along another dimension than the tokens' each part does its own. Along the tokens, whole blocks are taken and put
together in each part alike; what lies inside one part is taken from that part alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Partial, State

__all__ = ["RULES"]

_ATEN = torch.ops.aten
_PARTED = "it takes tokens of one part apart"


def _dim(call: Call, name: str = "dim") -> int:
    return int(call.arguments[name]) % max(len(call.operands[0].shape), 1)


def _block(call: Call, along: Along) -> int:
    """Elements of one block, along the tokens."""
    return call.division.total(along) // along.blocks


def _slice(call: Call) -> Outcome:
    state = call.operands[0].state
    dim, step = _dim(call), call.arguments["step"]
    if not isinstance(state, Along) or state.dim != dim:
        return Divided(state)
    extent = call.operands[0].shape[dim]
    start, end, _ = slice(call.arguments["start"], call.arguments["end"]).indices(extent)
    if step != 1 or end <= start:
        return Refused("it takes single tokens" if step != 1 else "it takes no tokens")
    block = _block(call, state)
    if start % block == end % block == 0:
        return _blocks(call, state, start // block, end // block)
    within = _within(call, state, start, end)
    again = call.division.along(tuple(call.value.shape), dim) or WHOLE  # by extent alone: the same on every rank
    if within is None:
        return Refused(_PARTED, again)
    owner, first = within

    def emit(part: Part) -> Node:
        return part.make(_ATEN.slice.Tensor, part.operand(0, owner), dim, first, first + end - start)

    return Divided(WHOLE, emit=emit, again=again)


def _blocks(call: Call, along: Along, first: int, end: int) -> Divided:
    """Blocks ``first`` to ``end`` of each part."""
    own = [call.division.units[part] * along.scale for part in range(call.division.count)]
    given = {"start": lambda part: first * own[part], "end": lambda part: end * own[part]}
    return Divided(Along(along.dim, along.scale, end - first), given=given)


def _within(call: Call, along: Along, start: int, end: int) -> tuple[int, int] | None:
    """The part that holds elements ``start`` to ``end`` side by side, and where they begin in it."""
    block = _block(call, along)
    number, offset = divmod(start, block)
    for part in range(call.division.count):
        low, high = call.division.bounds(along, part)
        if low <= offset and offset + end - start <= high:
            return part, number * (high - low) + offset - low
    return None


def _select(call: Call) -> Outcome:
    state = call.operands[0].state
    if not isinstance(state, Along):
        return Divided(state)
    dim = _dim(call)
    if dim != state.dim:
        return Divided(state.at(state.dim - (dim < state.dim)))
    index = call.arguments["index"] % call.operands[0].shape[dim]
    within = _within(call, state, index, index + 1)
    assert within is not None  # one element always lies in one part
    owner, place = within
    return Divided(WHOLE, emit=lambda part: part.make(_ATEN.select.int, part.operand(0, owner), dim, place))


def _split(call: Call) -> Outcome:
    """``split.Tensor``, ``split_with_sizes``, ``chunk`` and ``unbind``: the results' extents say where."""
    state = call.operands[0].state
    count = len(call.value)
    if not isinstance(state, Along) or state.dim != _dim(call):
        return Divided((state,) * count)
    block = _block(call, state)
    extents = [value.shape[state.dim] for value in call.value]
    if any(extent % block or not extent for extent in extents):
        found = [call.division.along(tuple(value.shape), state.dim) for value in call.value]
        return Refused(_PARTED, tuple(along or WHOLE for along in found))
    numbers = [extent // block for extent in extents]

    def emit(part: Part) -> Node:
        own = part.division.units[part.index] * state.scale
        sizes = [number * own for number in numbers]
        return part.make(_ATEN.split_with_sizes.default, part.operand(0), sizes, state.dim)

    return Divided(tuple(Along(state.dim, state.scale, number) for number in numbers), emit=emit)


def _unbind(call: Call) -> Outcome:
    state = call.operands[0].state
    dim = _dim(call)
    if not isinstance(state, Along):
        return Divided((state,) * len(call.value))
    if dim == state.dim:
        return Refused(_PARTED)
    return Divided((state.at(state.dim - (dim < state.dim)),) * len(call.value))


def _cat(call: Call) -> Outcome:
    if any(isinstance(operand.state, Partial) for operand in call.operands):
        return _cat_summands(call)
    along = next(operand.along for operand in call.operands if operand.along is not None)
    if len({len(operand.shape) for operand in call.operands}) > 1:
        return Refused("it takes an empty tensor of another shape")
    if along.dim != _dim(call):
        return Divided(along, (along,) * len(call.operands), reason="it is put beside other tokens")
    found = [operand.along for operand in call.operands]
    if any(other is None or (other.dim, other.scale) != (along.dim, along.scale) for other in found):
        return Refused("it puts tokens behind something that is not divided as they are")
    return Divided(Along(along.dim, along.scale, sum(other.blocks for other in found if other is not None)))


def _cat_summands(call: Call) -> Outcome:
    if all(isinstance(operand.state, Partial) for operand in call.operands):
        return Divided(Partial())
    return Refused("it puts sums over all parts beside other values")


def _stack(call: Call) -> Outcome:
    if any(isinstance(operand.state, Partial) for operand in call.operands):
        return _cat_summands(call)
    along = next(operand.along for operand in call.operands if operand.along is not None)
    dim = int(call.arguments["dim"]) % (len(call.operands[0].shape) + 1)
    needs: tuple[State, ...] = (along,) * len(call.operands)
    return Divided(along.at(along.dim + (dim <= along.dim)), needs, reason="it is put beside other tokens")


def _index_select(call: Call) -> Outcome:
    """Rows ``index`` of a table: divided along the index, or along another dimension of the table."""
    table, index = call.operands
    dim = _dim(call)
    if isinstance(index.state, Along):
        return Divided(index.state.at(dim), (WHOLE, index.state), reason="any of its rows can be read")
    assert isinstance(table.state, Along)
    return Refused("it takes tokens by index") if table.state.dim == dim else Divided(table.state)


def _embedding(call: Call) -> Outcome:
    """Rows of a table by index: as index_select with an index of any rank."""
    table, index = call.operands
    if isinstance(index.state, Along):
        return Divided(index.state, (WHOLE, index.state), reason="any of its rows can be read")
    assert isinstance(table.state, Along)
    if table.state.dim == 0:
        return Refused("it takes tokens by index")
    return Divided(table.state.at(len(index.shape)))


def _gather(call: Call) -> Outcome:
    """``out[i][j] = self[i][index[i][j]]`` for dim 1: both sides agree in all dimensions but ``dim``."""
    source, index = call.operands
    along = source.along or index.along
    assert along is not None
    dim = _dim(call)
    if along.dim == dim:
        if isinstance(index.state, Along) and index.state.dim == dim:
            return Divided(index.state, (WHOLE, index.state), reason="any of its tokens can be read")
        return Refused("it takes tokens by index")
    if source.shape[along.dim] != index.shape[along.dim]:
        return Refused("it reads the first tokens only")
    return Divided(along, (along, along), reason="it is read where the tokens are")


def _index(call: Call) -> Outcome:
    """``self[:, i, j]``: neighbouring indices that broadcast, put where the first of them stands."""
    places: Sequence[int] = [operand.index for operand in call.operands if operand.index is not None]
    table, indices = call.operands[0], call.operands[1:]
    if list(places) != list(range(places[0], places[0] + len(places))):
        return Refused("its indices are not beside each other")
    if any(operand.value.dtype == torch.bool for operand in indices):
        return Refused("it takes tokens by a mask")
    first, rank = places[0], max(len(operand.shape) for operand in indices)
    if isinstance(table.state, Along):
        return _index_of_slices(call, table.state, first, len(places), rank)
    shape = tuple(call.value.shape[first : first + rank])
    along = next(operand for operand in indices if isinstance(operand.state, Along))
    assert isinstance(along.state, Along)
    dim = along.state.dim + rank - len(along.shape)
    needs: list[State] = [WHOLE]
    for operand in indices:
        own = dim - (rank - len(operand.shape))
        needs.append(WHOLE if own < 0 or operand.shape[own] == 1 != shape[dim] else along.state.at(own))
    return Divided(along.state.at(first + dim), tuple(needs), reason="its indices are divided differently")


def _index_of_slices(call: Call, along: Along, first: int, count: int, rank: int) -> Outcome:
    if any(operand.state != WHOLE for operand in call.operands[1:]) or first <= along.dim < first + count:
        return Refused("it takes tokens by index")
    return Divided(along if along.dim < first else along.at(along.dim - count + rank))


RULES = {
    "aten::slice": Rule(_slice, partial=True),
    "aten::select": Rule(_select, partial=True),
    "aten::split": Rule(_split, partial=True),
    "aten::split_with_sizes": Rule(_split, partial=True),
    "aten::chunk": Rule(_split, partial=True),
    "aten::unbind": Rule(_unbind, partial=True),
    "aten::cat": Rule(_cat, partial=True),
    "aten::stack": Rule(_stack, partial=True),
    "aten::index_select": Rule(_index_select),
    "aten::embedding": Rule(_embedding),
    "aten::gather": Rule(_gather),
    "aten::index": Rule(_index),
}
