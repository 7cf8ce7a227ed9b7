"""Arena, memory of others, memory of its own: a place for each storage that never allocates more than a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .blocks import Bytes, Storages

__all__ = ["ARENA", "Mixture", "Places", "mixed"]

ARENA = -1  # as an owner
CANDIDATES = 32  # hosts that are looked at for one storage


class Places(NamedTuple):
    """Storage ``i`` lies ``offsets[i]`` bytes into the memory of ``owners[i]``: a storage, its own if that is ``i``."""

    arena_bytes: int
    owners: Bytes
    offsets: Bytes


class Mixture(NamedTuple):
    """Places, how many bytes they allocate at most, and how many of planned storages have memory of their own."""

    places: Places
    peak: int
    alone_bytes: int


def mixed(storages: Storages, arena_bytes: int, order: Sequence[int], inside: Bytes | None, limit: int) -> Mixture:
    """Places for all storages, those not apart one after the other in ``order``.

    Each goes into the arena, else into the memory of one that is allocated apart, where that is not needed yet or no
    longer, if allocating it so much earlier or freeing it so much later keeps ``limit``; else it gets memory of its
    own, which then may hold others.

    With ``inside``, the arena holds what has an offset there, and nothing else (-1). The bytes of every other storage
    are then reserved until it is placed, so that the limit is kept if it is in the beginning; without, it may be
    exceeded.
    """
    mixing = _Mixing(storages, arena_bytes, limit, inside)
    for item in order:
        if inside is None or inside[item] < 0:
            mixing.place(item)
    return mixing.result()


@dataclass
class _Mixing:
    """``profile`` is what is allocated at each step, including what is reserved for storages not placed yet."""

    storages: Storages
    arena_bytes: int
    limit: int
    inside: Bytes | None
    profile: Bytes = field(init=False)
    owners: Bytes = field(init=False)
    offsets: Bytes = field(init=False)
    is_host: NDArray[np.bool_] = field(init=False)
    first: Bytes = field(init=False)  # step from which a host's memory is allocated
    last: Bytes = field(init=False)  # and the one behind the last
    guests: dict[int, Bytes] = field(default_factory=dict)  # by host, in the order of their offsets

    def __post_init__(self) -> None:
        storages = self.storages
        own = np.arange(len(storages.sizes))
        if self.inside is None:
            self.profile = self.arena_bytes + storages.profile(storages.apart)
            self.owners, self.offsets = own, np.zeros_like(own)
        else:
            self.profile = self.arena_bytes + storages.profile(self.inside < 0)
            self.owners, self.offsets = np.where(self.inside >= 0, ARENA, own), np.maximum(self.inside, 0)
        self.is_host = storages.apart.copy()
        self.first, self.last = storages.begins.copy(), storages.ends.copy()

    def place(self, item: int) -> None:
        """Find a place for ``item`` in the arena or a host, or make it a host."""
        storages = self.storages
        begin, end, size = int(storages.begins[item]), int(storages.ends[item]), int(storages.sizes[item])
        if self.inside is None:
            if self._moved_in(ARENA, self.arena_bytes, item):
                return
        else:
            self.profile[begin:end] -= size
        for host in self._hosts(item):
            if self._extends(host, begin, end) and self._moved_in(host, int(storages.sizes[host]), item):
                self._extend(host, begin, end)
                return
        self.profile[begin:end] += size
        self.is_host[item] = True

    def _hosts(self, item: int) -> list[int]:
        """Those that could hold ``item``, first those that need to be allocated the least longer for it."""
        s = self.storages
        begin, end, size = s.begins[item], s.ends[item], s.sizes[item]
        earliest, latest = np.where(s.apart, s.earliest, 0), np.where(s.apart, s.latest, s.steps)
        clear = ((end <= s.begins) & (begin >= earliest)) | ((begin >= s.ends) & (end <= latest))
        found = np.flatnonzero(self.is_host & (s.sizes >= size) & clear)
        longer = np.maximum(self.first[found] - begin, 0) + np.maximum(end - self.last[found], 0)
        ranked = np.lexsort((found, s.sizes[found], longer * s.sizes[found]))
        chosen: list[int] = found[ranked[:CANDIDATES]].tolist()
        return chosen

    def _moved_in(self, host: int, capacity: int, item: int) -> bool:
        """Place ``item`` at the lowest free offset of ``host``'s memory, if there is one."""
        s = self.storages
        guests = self.guests.get(host, _NOBODY)
        offset = lowest_gap(s, self.offsets, guests, item, capacity)
        if offset is None:
            return False
        self.owners[item], self.offsets[item] = host, offset
        self.guests[host] = np.insert(guests, np.searchsorted(self.offsets[guests], offset), item)
        return True

    def _extends(self, host: int, begin: int, end: int) -> bool:
        """Whether ``host`` may be allocated from step ``begin`` to ``end`` at least within the limit."""
        room = self.limit - int(self.storages.sizes[host])
        before, behind = self._longer(host, begin, end)
        return bool(self.profile[before].max(initial=0) <= room and self.profile[behind].max(initial=0) <= room)

    def _extend(self, host: int, begin: int, end: int) -> None:
        for more in self._longer(host, begin, end):
            self.profile[more] += self.storages.sizes[host]
        self.first[host], self.last[host] = min(begin, self.first[host]), max(end, self.last[host])

    def _longer(self, host: int, begin: int, end: int) -> tuple[slice, slice]:
        first, last = int(self.first[host]), int(self.last[host])
        return slice(min(begin, first), first), slice(last, max(end, last))

    def result(self) -> Mixture:
        """What has been placed, in no larger an arena than it takes."""
        storages = self.storages
        inside = self.owners == ARENA
        arena = int((self.offsets + storages.sizes)[inside].max(initial=0))
        peak = int(self.profile.max(initial=0)) - self.arena_bytes + arena
        alone = (self.owners == np.arange(len(self.owners))) & ~storages.apart
        return Mixture(Places(arena, self.owners, self.offsets), peak, int(storages.sizes[alone].sum()))


_NOBODY = np.empty(0, np.int64)


def lowest_gap(storages: Storages, offsets: Bytes, guests: Bytes, item: int, capacity: int) -> int | None:
    """The lowest offset below ``capacity`` at which ``item`` meets none of the ``guests``, sorted by theirs."""
    s = storages
    rivals = guests[(s.begins[guests] < s.ends[item]) & (s.ends[guests] > s.begins[item])]
    floors = np.concatenate(([0], np.maximum.accumulate(offsets[rivals] + s.sizes[rivals])))
    ceilings = np.append(offsets[rivals], capacity)
    fits = np.flatnonzero(ceilings - floors >= s.sizes[item])
    return int(floors[fits[0]]) if fits.size else None
