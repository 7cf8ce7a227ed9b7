"""States of rows that are sorted by what their tokens were sent to: dispatch to experts and back.

A mixture of experts sorts *slots* (a token and one of its choices), gathers the tokens in that order, multiplies
each run of rows by its expert's weights, and brings the rows back to their tokens. Sorted within a part, rows come in
another order than the whole's; what is read off at the end, by token, is the same. The states here carry that through:
in all of them part i holds what belongs to the slots of its own tokens, in the order in which part i sorted them.

The parts of such a value do not join to it. Where it is read otherwise than a rule can follow, it is computed again
from joined operands, back to what was sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .state import Along, Partial

__all__ = ["Counts", "Ordered", "Own", "Shuffled", "Slots", "bound_of", "identity"]


@dataclass(frozen=True)
class Ordered(Along):
    """Rows of part i's slots in an order of part i; ``order`` names the sort, and ``ids`` what it sorted."""

    order: str = ""
    ids: str = ""

    @property
    def plain(self) -> Along:
        """The extents alone."""
        return Along(self.dim, self.scale, self.blocks)


@dataclass(frozen=True)
class Shuffled(Ordered):
    """Each row is a function of its slot: row r of the whole that of slot p(r), row r of part i that of slot p_i(r)."""


@dataclass(frozen=True)
class Slots(Ordered):
    """Each row is the number of its slot, counted in the part, divided by ``divisor`` and rounded down.

    With ``inverse`` it is the other way round: row s is the place in the order of slot s.
    """

    divisor: int = 1
    inverse: bool = False


@dataclass(frozen=True)
class Own(Ordered):
    """Nothing is known of the rows."""


@dataclass(frozen=True)
class Counts(Partial):
    """How many slots have each number below ``bound`` in ``ids``; with ``running``, or a smaller one."""

    ids: str
    bound: int
    running: bool = False


#: Operators that return their operand's elements in row-major order, with the values of small whole numbers.
_SAME = frozenset(
    {
        "aten::view",
        "aten::reshape",
        "aten::_unsafe_view",
        "aten::squeeze",
        "aten::unsqueeze",
        "aten::clone",
        "aten::alias",
        "aten::detach",
        "aten::_to_copy",
        "prims::convert_element_type",
    }
)


def name_of(node: Node) -> str:
    """The operator that a node calls, without its overload."""
    return str(getattr(getattr(node.target, "_schema", None), "name", node.target))


def identity(node: Node) -> Node:
    """The node of whole numbers that ``node`` is a view or a cast of. Casts to fewer than 24 exact bits are none."""
    while name_of(node) in _SAME and isinstance(node.args[0], Node):
        value = node.meta["val"]
        if value.dtype.itemsize < 4:
            break
        node = node.args[0]
    return node


def bound_of(node: Node) -> int | None:
    """A number that all of ``node`` are below and none is negative, if it is places found by ``topk``; else None."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node) or name_of(source) != "aten::topk" or node.args[1] != 1:
        return None
    rows = source.args[0]
    dim = source.args[2] if len(source.args) > 2 else -1
    if not isinstance(rows, Node) or not isinstance(dim, int):
        return None
    return int(rows.meta["val"].shape[dim])
