"""How large an arena may be, and what lies in it, so that the limit of what is allocated is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ...compiler.pipeline import Budget
from .blocks import Bytes, Storages
from .mixing import Mixture, lowest_gap, mixed

__all__ = ["mixtures"]

ROUNDS = 4  # arenas tried for one order of placing, each smaller than the one before
TRIED_STORAGES = 30_000  # storages times tries in deterministic mode
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


def mixtures(storages: Storages, limit: int, budget: Budget) -> Iterator[Mixture]:
    """Placements that allocate at most ``limit`` bytes, the live peak; those that are likelier to be good come first.

    An arena is there at every step, so the bytes in it that are unused at a step must not exceed what the step's live
    bytes leave of the limit. That bounds it by the limit less the most that is allocated apart.
    """
    slack = limit - storages.profile(np.ones(len(storages.sizes), np.bool_))
    highest = int(limit - storages.profile(storages.apart).max(initial=0))
    orders = [_order(storages, rank(storages, slack)) for rank in _RANKS.values()]
    tries = _Tries(budget, max(1, TRIED_STORAGES // max(1, len(storages.sizes))))
    for order in orders:
        yield from _arena_first(storages, order, highest, slack, limit, tries)
        yield from _all_at_once(storages, order, highest, limit, tries)
    for order in orders:
        for arena in _sums(storages, order, slack, highest):
            yield from _arena_first(storages, order, arena, slack, limit, tries)
    yield _last_resort(storages, orders[0], limit, tries)


@dataclass
class _Tries:
    """When to stop: told to, out of time, or after so many tries where no clock may decide."""

    budget: Budget
    left: int

    def over(self) -> bool:
        """Whether to begin nothing more."""
        self.left -= 1
        return self.halted() or (self.budget.deterministic and self.left < 0)

    def halted(self) -> bool:
        """Whether to end what has begun."""
        return self.budget.halted()


def _order(storages: Storages, rank: Bytes) -> Bytes:
    order = np.lexsort((np.arange(len(rank)), storages.begins, -storages.sizes, rank))
    return order[~storages.apart[order]]


def _all_at_once(storages: Storages, order: Bytes, arena: int, limit: int, tries: _Tries) -> Iterator[Mixture]:
    """Each into the arena or else elsewhere; an arena that turns out too large is tried smaller."""
    for _ in range(ROUNDS):
        if arena < 0 or tries.over():
            return
        found = mixed(storages, arena, order.tolist(), None, limit, tries.halted)
        if found.peak <= limit:
            yield found
            return
        arena = min(arena, found.places.arena_bytes) - (found.peak - limit)


def _arena_first(
    storages: Storages, order: Bytes, arena: int, slack: Bytes, limit: int, tries: _Tries
) -> Iterator[Mixture]:
    """Fill the arena, cut it where some step would waste more of it than it may, then place what is left."""
    if tries.over():
        return
    offsets = _filled(storages, order, arena)
    while arena > (fits := int((storages.profile(offsets >= 0) + slack).min(initial=arena))):
        arena = fits
        offsets = np.where(offsets + storages.sizes > arena, -1, offsets)
    left = _order(storages, -storages.sizes)
    yield mixed(storages, arena, left.tolist(), offsets, limit, tries.halted)


def _last_resort(storages: Storages, order: Bytes, limit: int, tries: _Tries) -> Mixture:
    """No arena: what finds no host has memory of its own, and the limit holds."""
    nothing = np.full(len(storages.sizes), -1, np.int64)
    return mixed(storages, 0, order.tolist(), nothing, limit, tries.halted)


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
