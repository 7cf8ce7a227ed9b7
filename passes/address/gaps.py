"""Placing residences one after the other, each into a gap that those placed before leave; numpy throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .packing import Packing

__all__ = ["PRIORITIES", "best_of", "place_in_order", "stacked"]

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
    """Offsets of ``items`` in units, placing ``items[position[0]]`` first.

    Each takes the lowest gap that holds it, or with ``tightest`` the smallest such gap; else it goes on top.
    """
    begin = np.array([packing.begins[i] for i in items], dtype=np.int64)
    end = np.array([packing.ends[i] for i in items], dtype=np.int64)
    size = np.array([packing.units[i] for i in items], dtype=np.int64)
    offset = np.zeros(len(items), dtype=np.int64)
    by_offset = np.empty(0, dtype=np.int64)  # placed items, lowest first
    for item in position:
        rivals = by_offset[(begin[by_offset] < end[item]) & (end[by_offset] > begin[item])]
        if rivals.size:
            floors = np.concatenate(([0], np.maximum.accumulate(offset[rivals] + size[rivals])))
            room = np.append(offset[rivals], np.iinfo(np.int64).max) - floors
            fits = np.flatnonzero(room >= size[item])
            gap = fits[np.argmin(room[fits])] if tightest else fits[0]
            offset[item] = floors[gap]
        place = np.searchsorted(offset[by_offset], offset[item])
        by_offset = np.insert(by_offset, place, item)
    return [int(o) for o in offset]
