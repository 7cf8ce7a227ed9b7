"""Indexing by tensors, ``self[i, :, j]``, and writing and adding there.

Tokens in a dimension that no index picks from are alone with the same places. Tokens of the indices each read their
own rows of a table that is whole; added to one, they are summands. Rows picked among the tokens are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..rule import Call, Divided, Operand, Outcome, Refused, Rule
from ..state import WHOLE, Along, State
from ._operands import CHOSEN, OTHERWISE, needs, once, sliced, zeros
from .constants import picked_by_part, put_by_part

__all__ = ["RULES"]


@dataclass(frozen=True)
class _Picked:
    """What ``self[indices]`` is made of.

    The dimensions that the indices pick are replaced by ``rank`` ones, to which all indices broadcast, at ``start``;
    ``kept`` says where the others of ``self`` come to lie.
    """

    start: int
    rank: int
    kept: dict[int, int]
    indices: tuple[Operand, ...]

    @property
    def total(self) -> int:
        """The rank of the result."""
        return self.rank + len(self.kept)


def _picked(call: Call) -> _Picked | None:
    """The dimensions of an indexing; None for masks, whose result has no fixed size."""
    listed = call.arguments["indices"]
    indices = tuple(operand for operand in call.operands if operand.name == "indices")
    if any(operand.value.dtype in (torch.bool, torch.uint8) for operand in indices) or not indices:
        return None
    source = call.operand("self")
    assert source is not None
    places = [place for place, item in enumerate(listed) if item is not None]
    rank = max(len(operand.shape) for operand in indices)
    together = places == list(range(places[0], places[0] + len(places)))
    start = places[0] if together else 0
    rest = [dim for dim in range(len(source.shape)) if dim not in places]
    kept = {dim: dim if together and dim < start else rank + position for position, dim in enumerate(rest)}
    return _Picked(start, rank, kept, indices)


def _broadcast(call: Call, operand: Operand, along: Along, rank: int) -> State | None:
    """The state in which an operand that broadcasts to ``rank`` dimensions is needed; None if it cannot be."""
    dim = along.dim - (rank - len(operand.shape))
    if dim < 0 or operand.shape[dim] == 1:
        return WHOLE if operand.state == WHOLE else None
    wanted = along.at(dim)
    return wanted if operand.state in (wanted, WHOLE) and sliced(call, operand.shape, wanted) else None


def _indices_alike(call: Call, picked: _Picked) -> tuple[Along, list[State]] | None:
    """How the indices are cut in the dimensions that they broadcast to, and the states they are needed in."""
    for operand in picked.indices:
        if operand.along is not None:
            along = operand.along.at(operand.along.dim + picked.rank - len(operand.shape))
            states = [_broadcast(call, each, along, picked.rank) for each in picked.indices]
            if any(state is None for state in states):
                return None
            return along, [state for state in states if state is not None]
    return None


def _index(call: Call) -> Outcome:
    """``self[indices]``."""
    picked, source = _picked(call), call.operand("self")
    if picked is None or source is None:
        return Refused("rows chosen by a mask")
    if source.along is not None:
        if len(picked.indices) == 1 and (outcome := picked_by_part(call, source, picked.indices[0])):
            return outcome
        if source.along.dim not in picked.kept or any(operand.state != WHOLE for operand in picked.indices):
            return Refused(CHOSEN)
        return Divided(source.along.at(picked.kept[source.along.dim]))
    found = _indices_alike(call, picked)
    if found is None:
        return Refused(OTHERWISE)
    along, states = found
    return Divided(along.at(along.dim + picked.start), (source.state, *states))


def _index_put(call: Call) -> Outcome:
    """``self`` with ``values`` written or added at ``indices``."""
    picked = _picked(call)
    target, values = call.operand("self"), call.operand("values")
    if picked is None or target is None or values is None:
        return Refused("rows chosen by a mask")
    if len(picked.indices) == 1 and (outcome := put_by_part(call, target, picked.indices[0], values)):
        return outcome
    found = _indices_alike(call, picked)
    if found is None and all(operand.state == WHOLE for operand in picked.indices):
        return _put_kept(call, picked, target, values)
    if found is None or target.state != WHOLE:
        return Refused(CHOSEN)
    if not call.arguments.get("accumulate", True):
        return Refused("writing to places that other tokens write to")
    along = found[0].at(found[0].dim + picked.start)
    value = _broadcast(call, values, along, picked.total)
    if value is None:
        return Refused(OTHERWISE)
    places = iter(found[1])
    states = tuple(next(places) if operand.name == "indices" else WHOLE for operand in call.operands)
    return once(0, _with(call, states, values=value), zeros(target))


def _with(call: Call, states: Sequence[State], **given: State) -> tuple[State, ...]:
    """``states`` but for those of arguments given by name."""
    return tuple(given.get(operand.name, state) for operand, state in zip(call.operands, states, strict=True))


def _put_kept(call: Call, picked: _Picked, target: Operand, values: Operand) -> Outcome:
    """Writing along other dimensions than the tokens'."""
    along = target.along
    if along is None and values.along is not None:
        dim = values.along.dim + picked.total - len(values.shape)
        back = {result: own for own, result in picked.kept.items()}
        along = values.along.at(back[dim]) if dim in back else None
    if along is None or along.dim not in picked.kept or not sliced(call, target.shape, along):
        return Refused(CHOSEN)
    value = _broadcast(call, values, along.at(picked.kept[along.dim]), picked.total)
    if value is None:
        return Refused(OTHERWISE)
    return Divided(along, needs(call, {"self": along, "values": value}))


def _masked_put(call: Call) -> Outcome:
    """Like ``index_put`` that adds, where ``mask``, which broadcasts to the values, is set."""
    outcome = _index_put(call)
    picked, mask = _picked(call), call.operand("mask")
    found = _indices_alike(call, picked) if picked else None
    if isinstance(outcome, Refused) or picked is None or found is None or mask is None:
        return outcome if isinstance(outcome, Refused) else Refused(OTHERWISE)
    state = _broadcast(call, mask, found[0].at(found[0].dim + picked.start), picked.total)
    if state is None or outcome.needs is None:
        return Refused(OTHERWISE)
    return once(0, _with(call, outcome.needs, mask=state), zeros(call.operands[0]))


RULES: dict[str, Rule] = {
    "aten::index": Rule(_index),
    "aten::_unsafe_index": Rule(_index),
    "aten::index_put": Rule(_index_put),
    "aten::_unsafe_index_put": Rule(_index_put),
    "aten::_unsafe_masked_index_put_accumulate": Rule(_masked_put),
}
