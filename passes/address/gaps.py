"""Placing residences one after the other, each into a gap that those placed before leave; numpy throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .packing import UNBOUNDED, Packing, Range

__all__ = ["PRIORITIES", "best_of", "place_in_order", "stacked"]

Offsets = NDArray[np.int64]

#: What an order of placing sorts by, largest first; ties by begin, then index.
PRIORITIES: Mapping[str, Callable[[Packing, int], tuple[int, ...]]] = MappingProxyType(
    {
        "size": lambda p, i: (p.units[i], p.ends[i] - p.begins[i]),
        "lifetime": lambda p, i: (p.ends[i] - p.begins[i], p.units[i]),
        "area": lambda p, i: (p.units[i] * (p.ends[i] - p.begins[i]), p.units[i]),
        "begin": lambda p, i: (-p.begins[i], p.units[i]),
    }
)


def stacked(packing: Packing, items: Sequence[int]) -> list[int]:
    """Offsets of ``items`` in units, the most padded placed last.

    Where all are resident at one step, it so comes to lie on top, and the arena is ``together_bytes``: the least.
    """
    padding = [packing.units[i] * packing.alignment - packing.nbytes[i] for i in items]
    return place_in_order(packing, items, sorted(range(len(items)), key=lambda k: padding[k]))


def best_of(packing: Packing, items: Sequence[int], orders: Iterable[str], *, tightest: bool = False) -> list[int]:
    """Offsets of ``items`` in units, in their order, by whichever of the ``PRIORITIES`` named gives the least arena."""
    best: tuple[int, list[int]] | None = None
    floor = packing.fullest_step(items)[0]
    for order in orders:
        rank = PRIORITIES[order]
        position = sorted(range(len(items)), key=lambda k: rank(packing, items[k]), reverse=True)
        offsets = place_in_order(packing, items, position, tightest=tightest)
        arena = packing.arena_bytes(items, offsets)
        if best is None or arena < best[0]:
            best = arena, offsets
        if arena <= floor:
            break
    return best[1] if best else []


def place_in_order(
    packing: Packing, items: Sequence[int], position: Sequence[int], *, tightest: bool = False
) -> list[int]:
    """Offsets of ``items`` in units, placing ``items[position[0]]`` first, but pinned ones before all others.

    Each takes the lowest gap of its windows that holds it, or with ``tightest`` the smallest such gap; else it goes
    beyond the capacity, where nothing may lie.
    """
    begin = np.array([packing.begins[i] for i in items], dtype=np.int64)
    end = np.array([packing.ends[i] for i in items], dtype=np.int64)
    size = np.array([packing.units[i] for i in items], dtype=np.int64)
    offset = np.zeros(len(items), dtype=np.int64)
    by_offset = np.empty(0, dtype=np.int64)  # placed items, lowest first
    windows = [_with_room_above(packing, i) for i in items]
    for item in sorted(position, key=lambda k: not packing.is_fixed(items[k])):
        rivals = by_offset[(begin[by_offset] < end[item]) & (end[by_offset] > begin[item])]
        floors = np.concatenate(([0], np.maximum.accumulate(offset[rivals] + size[rivals])))
        ceilings = np.append(offset[rivals], 2 * UNBOUNDED)
        offset[item] = _place(floors, ceilings, int(size[item]), windows[item], tightest=tightest)
        place = np.searchsorted(offset[by_offset], offset[item])
        by_offset = np.insert(by_offset, place, item)
    return [int(o) for o in offset]


def _place(floors: Offsets, ceilings: Offsets, size: int, windows: Sequence[Range], *, tightest: bool) -> int:
    """The lowest place of ``size`` units in the gaps from ``floors`` to ``ceilings``, or the one in the smallest gap.

    The last of ``windows`` goes on without end, and is taken where no other has room.
    """
    found: list[tuple[int, int]] = []  # room in the gap, place
    for low, high in windows:
        if found and (high == UNBOUNDED or not tightest):
            break
        places = np.maximum(floors, low)
        room = np.minimum(ceilings, high + size) - places
        fits = np.flatnonzero(room >= size)
        if fits.size:
            gap = fits[np.argmin(room[fits])] if tightest else fits[0]
            found.append((int(room[gap]), int(places[gap])))
    return min(found)[1]


def _with_room_above(packing: Packing, item: int) -> tuple[Range, ...]:
    """Ranges of offsets for ``item``; the last one leads beyond the capacity, where everything finds a place."""
    ranges = packing.offsets(item, packing.capacity)
    if ranges and not packing.is_fixed(item):
        first, behind = packing.windows[item][-1]
        if behind == packing.capacity and ranges[-1][0] * packing.alignment >= first:
            return (*ranges[:-1], (ranges[-1][0], UNBOUNDED))
    return (*ranges, (-(-packing.capacity // packing.alignment), UNBOUNDED))
