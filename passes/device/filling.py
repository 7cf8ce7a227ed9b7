"""How large an arena may be, and what lies in it, so that the limit of what is allocated is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from .blocks import Bytes, Storages
from .mixing import Mixture, lowest_gap, mixed

__all__ = ["mixtures"]

ROUNDS = 6  # arenas tried for one way of filling, each smaller than the one before
SUMS = 4  # arenas tried that a step of the peak fills by a choice of its storages

Rank = Callable[[Storages, Bytes], Bytes]

#: What is placed first: the least rank, then the largest. ``slack`` are bytes at each step that may stay unused.
_RANKS: Mapping[str, Rank] = MappingProxyType(
    {
        "largest": lambda s, slack: -s.sizes,
        "tightest": lambda s, slack: np.array(
            [slack[b:e].min(initial=np.iinfo(np.int64).max) for b, e in zip(s.begins, s.ends, strict=True)], np.int64
        ),
        "longest": lambda s, slack: s.begins - s.ends,
    }
)


def mixtures(storages: Storages, limit: int) -> Iterator[Mixture]:
    """Placements that allocate at most ``limit`` bytes, the live peak; those that are likelier to be good come first.

    An arena is there at every step, so the bytes in it that are unused at a step must not exceed what the step's live
    bytes leave of the limit. That bounds it by the limit less the most that is allocated apart.
    """
    slack = limit - storages.profile(np.ones(len(storages.sizes), np.bool_))
    highest = int(limit - storages.profile(storages.apart).max(initial=0))
    orders = [_order(storages, rank(storages, slack)) for rank in _RANKS.values()]
    for order in orders:
        yield from _all_at_once(storages, order, highest, limit)
    for order in orders:
        for arena in (highest, *_sums(storages, order, slack, highest)):
            yield from _arena_first(storages, order, arena, slack, limit)
    yield mixed(storages, 0, orders[0].tolist(), np.full(len(storages.sizes), -1, np.int64), limit)


def _order(storages: Storages, rank: Bytes) -> Bytes:
    order = np.lexsort((np.arange(len(rank)), storages.begins, -storages.sizes, rank))
    return order[~storages.apart[order]]


def _all_at_once(storages: Storages, order: Bytes, arena: int, limit: int) -> Iterator[Mixture]:
    """Each into the arena or else elsewhere; an arena that turns out too large is tried smaller."""
    for _ in range(ROUNDS):
        found = mixed(storages, arena, order.tolist(), None, limit)
        if found.peak <= limit:
            yield found
            return
        arena = min(arena, found.places.arena_bytes) - (found.peak - limit)
        if arena <= 0:
            return


def _arena_first(storages: Storages, order: Bytes, arena: int, slack: Bytes, limit: int) -> Iterator[Mixture]:
    """Fill the arena, smaller until no step wastes more of it than it may, then place what is left."""
    for _ in range(ROUNDS):
        offsets = _filled(storages, order, arena)
        fits = int((storages.profile(offsets >= 0) + slack).min(initial=arena))
        if fits >= arena:
            left = _order(storages, -storages.sizes)
            yield mixed(storages, arena, left.tolist(), offsets, limit)
            return
        arena = fits


def _sums(storages: Storages, order: Bytes, slack: Bytes, highest: int) -> list[int]:
    """Arenas that those alive at the tightest step, in ``order``, fill to the last byte; largest first."""
    step = int(slack.argmin())
    alive = order[(storages.begins[order] <= step) & (step < storages.ends[order])]
    sums = np.cumsum(storages.sizes[alive])
    found: list[int] = sums[sums < highest][::-1][:SUMS].tolist()
    return found


def _filled(storages: Storages, order: Bytes, arena: int) -> Bytes:
    """Offsets by first fit below ``arena`` bytes; -1 for what finds no room."""
    offsets = np.full(len(storages.sizes), -1, np.int64)
    guests = np.empty(0, np.int64)
    for item in order.tolist():
        offset = lowest_gap(storages, offsets, guests, item, arena)
        if offset is not None:
            guests = np.insert(guests, np.searchsorted(offsets[guests], offset), item)
            offsets[item] = offset
    return offsets
