"""How the parts of a split hold a value: once for all, a slice each, or a summand each.

A state is a claim about values, and a rule may only make claims that always hold: joining the parts gives the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["WHOLE", "Along", "Division", "Partial", "Result", "State", "Whole"]


@dataclass(frozen=True)
class Whole:
    """The value exists once and all parts share it."""


@dataclass(frozen=True)
class Along:
    """Each part holds a slice of dimension ``dim`` (counted from 0).

    Read row by row, the dimension is ``[blocks, units, scale]``, and part i holds ``[blocks, units of part i,
    scale]`` of it: in each block, the elements of its own tokens. A *unit* is the greatest number of tokens that
    divides the lengths of all parts (``Division``). Merging the dimension with dimensions behind it multiplies
    ``scale``, with dimensions before it ``blocks``; gathering it from the ranks of a group multiplies ``blocks`` too.
    """

    dim: int
    scale: int = 1
    blocks: int = 1

    def at(self, dim: int) -> Along:
        """The same slices at dimension ``dim``."""
        return replace(self, dim=dim)


@dataclass(frozen=True)
class Partial:
    """Each part holds a tensor of the value's shape, and the value is their sum."""


State = Whole | Along | Partial
#: The state of what an operator returns: one, or one for each item where it returns several.
Result = State | tuple[State, ...]
WHOLE = Whole()


@dataclass(frozen=True)
class Division:
    """The lengths of the parts, in tokens; at least one, each positive."""

    sizes: tuple[int, ...]

    @property
    def unit(self) -> int:
        """The tokens that are never parted: the greatest common divisor of the lengths."""
        return math.gcd(*self.sizes)

    @property
    def units(self) -> tuple[int, ...]:
        """The lengths of the parts, in units."""
        return tuple(size // self.unit for size in self.sizes)

    @property
    def count(self) -> int:
        """The number of parts."""
        return len(self.sizes)

    def total(self, along: Along) -> int:
        """The extent of the dimension of ``along`` in the value."""
        return along.blocks * sum(self.units) * along.scale

    def extent(self, along: Along, part: int) -> int:
        """The extent of the dimension of ``along`` in part ``part``."""
        return along.blocks * self.units[part] * along.scale

    def bounds(self, along: Along, part: int) -> tuple[int, int]:
        """Where part ``part`` begins and ends within each block, in elements."""
        start = sum(self.units[:part]) * along.scale
        return start, start + self.units[part] * along.scale

    def shape(self, shape: Sequence[int], along: Along, part: int) -> tuple[int, ...]:
        """The shape of part ``part`` of a value of ``shape``."""
        return (*shape[: along.dim], self.extent(along, part), *shape[along.dim + 1 :])

    def along(self, shape: Sequence[int], dim: int, blocks: int = 1) -> Along | None:
        """Dimension ``dim`` of a value of ``shape``, cut in ``blocks`` blocks; None where units do not divide it."""
        scale, rest = divmod(shape[dim], blocks * sum(self.units))
        return Along(dim, scale, blocks) if scale and not rest else None
