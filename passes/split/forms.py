"""The nodes that hold a value, in each of the states it has been read in: made when first read, and then shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from ...errors import InternalError
from .build import Maker, Making
from .orders import Ordered
from .rules.creation import repeats
from .state import WHOLE, Along, Division, Partial, Result, State

__all__ = ["Forms", "Joined"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Joined:
    """Where a value had to be whole: ``value`` is read by ``node``, which calls ``target``; nodes of the given module.

    ``by`` is "cat" (of slices), "sum" (of summands) or "kept" (it was computed whole, and parts are slices of it),
    or "again" (its parts are sorted by expert, so that it is computed a second time, from joined operands).
    ``reason`` says why the reader could not take the parts.
    """

    node: str
    target: str
    value: str
    by: str
    reason: str


class Forms:
    """Nodes of ``graph`` for values of the given module, by state. Grows while a split is made."""

    def __init__(self, graph: Graph, mode: FakeTensorMode, division: Division) -> None:
        self.graph, self.mode, self.division = graph, mode, division
        self.joined: list[Joined] = []
        self._forms: dict[Node, dict[State, tuple[Node, ...]]] = {}
        self._items: dict[Node, Sequence[Node | tuple[Node, ...]]] = {}

    def put(self, value: Node, state: State, nodes: tuple[Node, ...]) -> None:
        """``nodes`` hold ``value`` in ``state``: one for each part, or a single one if it is Whole."""
        forms = self._forms.setdefault(value, {})
        forms[state] = nodes
        if isinstance(state, Partial):
            forms[Partial()] = nodes

    def put_items(self, value: Node, made: Sequence[Node | tuple[Node, ...]]) -> None:
        """``made`` hold the several tensors that ``value`` returns, one entry for each part."""
        self._items[value] = made

    def has_items(self, value: Node) -> bool:
        """Whether ``put_items`` was called."""
        return value in self._items

    def items(self, value: Node) -> Sequence[Node | tuple[Node, ...]]:
        """What ``put_items`` was given."""
        return self._items[value]

    def has(self, value: Node, state: State) -> bool:
        """Whether nodes hold ``value`` in ``state``."""
        return state in self._forms.get(value, {})

    def held(self, value: Node, state: State) -> tuple[Node, ...]:
        """The nodes that hold ``value`` in ``state``, which must have been made."""
        return self._forms[value][state]

    def parts(self, value: Node, state: Result) -> tuple[Node, ...]:
        """The nodes that return the parts of ``value``, of the whole of what it returns; none if it is not divided."""
        if isinstance(state, tuple):
            made = [item for item in self._items.get(value, ()) if isinstance(item, Node)]
            return tuple(made) if len(made) == self.division.count > 1 else ()
        return self._forms[value].get(state, ()) if state != WHOLE else ()

    def get(self, value: Node, state: State, wanted: State, reader: Node, reason: str) -> tuple[Node, ...]:
        """``value``, which is in ``state``, as ``wanted``: made now, if it was not before.

        A value that is joined for ``reader`` is noted with ``reason``, unless that is empty.
        """
        forms = self._forms[value]
        if state not in (WHOLE, wanted) and reason:
            self.joined.append(Joined(reader.name, str(reader.target), value.name, self._by(value, state), reason))
        if wanted not in forms:
            forms[wanted] = self._made(value, state, wanted)
        return forms[wanted]

    def _by(self, value: Node, state: State) -> str:
        if isinstance(state, Ordered):
            return "again"
        if next(iter(self._forms[value])) == WHOLE:
            return "kept"
        return "sum" if isinstance(state, Partial) else "cat"

    def _made(self, value: Node, state: State, wanted: State) -> tuple[Node, ...]:
        forms = self._forms[value]
        if WHOLE not in forms:
            forms[WHOLE] = (self._whole(value, state),)
        if isinstance(wanted, Along):
            whole = forms[WHOLE][0]
            return tuple(self._slice(value, whole, wanted, part) for part in range(self.division.count))
        if isinstance(wanted, Partial):
            raise InternalError(f"a rule wants summands of {value.name!r}, which has none")
        return forms[WHOLE]

    def _whole(self, value: Node, state: State) -> Node:
        parts = self._forms[value][state]
        if isinstance(state, Along):
            return self._cat(value, parts, state)
        maker = Maker(self.graph, self.mode, Making(value, None, f"{value.name}_sum"))
        total = parts[0]
        for part in parts[1:]:
            total = maker.make(_ATEN.add.Tensor, (total, part), {})
        return total

    def _cat(self, value: Node, parts: Sequence[Node], along: Along) -> Node:
        """The parts side by side; interleaved where there are several blocks; in the layout of the given value."""
        maker = Maker(self.graph, self.mode, Making(value, None, f"{value.name}_joined"))
        order = _layout(value.meta["val"])
        if order is not None:
            parts = [maker.make(_ATEN.permute.default, (part, order), {}) for part in parts]
            along = along.at(order.index(along.dim))
        if along.blocks == 1:
            joined = maker.make(_ATEN.cat.default, (list(parts), along.dim), {})
        else:
            shapes = [self._blocked(tuple(part.meta["val"].shape), along) for part in parts]
            pairs = zip(parts, shapes, strict=True)
            spread = [maker.make(_ATEN.view.default, (part, shape), {}) for part, shape in pairs]
            mixed = maker.make(_ATEN.cat.default, (spread, along.dim + 1), {})
            extents = list(parts[0].meta["val"].shape)
            extents[along.dim] = self.division.total(along)
            joined = maker.make(_ATEN.view.default, (mixed, extents), {})
        if order is None:
            return joined
        return maker.make(_ATEN.permute.default, (joined, [order.index(dim) for dim in range(len(order))]), {})

    def _slice(self, value: Node, whole: Node, along: Along, part: int) -> Node:
        maker = Maker(self.graph, self.mode, Making(value, part, f"{value.name}_slice{part}"))
        start, end = self.division.bounds(along, part)
        if whole.op == "call_function" and repeats(whole, along.dim):
            shape = self.division.shape(whole.meta["val"].shape, along, part)
            size = 1 if whole.target is _ATEN.expand.default else 0
            return maker.make(whole.target, (*whole.args[:size], list(shape), *whole.args[size + 1 :]), whole.kwargs)
        if along.blocks == 1:
            return maker.make(_ATEN.slice.Tensor, (whole, along.dim, start, end), {})
        shape = tuple(whole.meta["val"].shape)
        spread = maker.make(_ATEN.view.default, (whole, self._blocked(shape, along)), {})
        own = maker.make(_ATEN.slice.Tensor, (spread, along.dim + 1, start, end), {})
        packed = maker.make(_ATEN.clone.default, (own,), {"memory_format": torch.contiguous_format})
        return maker.make(_ATEN.view.default, (packed, list(self.division.shape(shape, along, part))), {})

    @staticmethod
    def _blocked(shape: tuple[int, ...], along: Along) -> list[int]:
        """``shape`` with the dimension of ``along`` as two: the blocks, and what a block holds."""
        return [*shape[: along.dim], along.blocks, shape[along.dim] // along.blocks, *shape[along.dim + 1 :]]


def _layout(value: torch.Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest where ``value`` is dense in memory but not in order; else None."""
    if value.is_contiguous():
        return None
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))
    return order if value.permute(order).is_contiguous() else None
