"""What lies in the arena: as much as fits, without more room than the limit leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from .blocks import Bytes, Storages

__all__ = ["fillings"]

ROUNDS = 6  # arenas tried for one way of filling, each smaller than the one before
SUMS = 4  # arenas tried that a step of the peak fills by a choice of its storages

Rank = Callable[[Storages, Bytes], Bytes]

#: What is placed first: the least rank, then the earliest. ``slack`` are bytes at each step that may stay unused.
_RANKS: Mapping[str, Rank] = MappingProxyType(
    {
        "tightest": lambda s, slack: np.array(
            [slack[b:e].min(initial=np.iinfo(np.int64).max) for b, e in zip(s.begins, s.ends, strict=True)], np.int64
        ),
        "largest": lambda s, slack: -s.sizes,
        "longest": lambda s, slack: s.begins - s.ends,
    }
)


def fillings(storages: Storages, limit: int) -> Iterator[tuple[int, Bytes]]:
    """Arenas, in bytes, and offsets in them of the storages they hold, -1 for the others; each keeps the ``limit``.

    An arena is there at every step, so the bytes in it that are unused at a step must not exceed what the step's live
    bytes leave of the limit. That bounds it by the limit less the most that is allocated apart.
    """
    slack = limit - storages.profile(np.ones(len(storages.sizes), np.bool_))
    highest = int(limit - storages.profile(storages.apart).max(initial=0))
    for rank in _RANKS.values():
        priority = rank(storages, slack)
        order = np.lexsort((np.arange(len(priority)), -storages.sizes, storages.begins, priority))
        order = order[~storages.apart[order]]
        for start in (highest, *_sums(storages, order, slack, highest)):
            arena = start
            for _ in range(ROUNDS):
                offsets = _filled(storages, order, arena)
                used = storages.profile(offsets >= 0)
                fits = int((used + slack).min(initial=arena))
                if fits >= arena:
                    yield _top(storages, offsets), offsets
                    break
                arena = fits
    yield 0, np.full(len(storages.sizes), -1, np.int64)


def _top(storages: Storages, offsets: Bytes) -> int:
    return int(np.where(offsets >= 0, offsets + storages.sizes, 0).max(initial=0))


def _sums(storages: Storages, order: Bytes, slack: Bytes, highest: int) -> list[int]:
    """Arenas that those alive at the tightest step, in ``order``, fill to the last byte; largest first."""
    step = int(slack.argmin())
    alive = order[(storages.begins[order] <= step) & (step < storages.ends[order])]
    sums = np.cumsum(storages.sizes[alive])
    found: list[int] = sums[sums < highest][::-1][:SUMS].tolist()
    return found


def _filled(storages: Storages, order: Bytes, arena: int) -> Bytes:
    """Offsets by first fit below ``arena`` bytes; -1 for what finds no room."""
    begins, ends, sizes = storages.begins, storages.ends, storages.sizes
    offsets = np.full(len(sizes), -1, np.int64)
    by_offset = np.empty(0, np.int64)
    for item in order:
        rivals = by_offset[(begins[by_offset] < ends[item]) & (ends[by_offset] > begins[item])]
        floors = np.concatenate(([0], np.maximum.accumulate(offsets[rivals] + sizes[rivals])))
        ceilings = np.append(offsets[rivals], arena)
        fits = np.flatnonzero(ceilings - floors >= sizes[item])
        if fits.size:
            offsets[item] = floors[fits[0]]
            by_offset = np.insert(by_offset, np.searchsorted(offsets[by_offset], offsets[item]), item)
    return offsets
