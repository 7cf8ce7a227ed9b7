"""Arena, memory of others, memory of its own: a place for each storage that never allocates more than a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .blocks import Bytes, Storages

__all__ = ["ARENA", "Mixture", "Places", "mixed"]

ARENA = -1  # as an owner
CANDIDATES = 8  # hosts that are looked at for one storage
POLL = 64  # storages placed between two looks at the clock


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


def mixed(
    storages: Storages,
    arena_bytes: int,
    order: Sequence[int],
    inside: Bytes | None,
    limit: int,
    halted: Callable[[], bool],
) -> Mixture:
    """Places for all storages, those not apart one after the other in ``order``.

    Each goes into the arena, else into the memory of one that is allocated apart, where that is not needed yet or no
    longer, if allocating it so much earlier or freeing it so much later keeps ``limit``; else it gets memory of its
    own, which then may hold others.

    With ``inside``, the arena holds what has an offset there, and nothing else (-1). The bytes of every other storage
    are then reserved until it is placed, so that the limit is kept if it is in the beginning; without, it may be
    exceeded. Once ``halted``, all that is left gets memory of its own.
    """
    mixing = _Mixing(storages, arena_bytes, limit, inside)
    over = False
    for position, item in enumerate(i for i in order if inside is None or inside[i] < 0):
        over = over or (position % POLL == 0 and halted())
        mixing.place(item, alone=over)
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
    earliest: Bytes = field(init=False)  # where those two may lie
    latest: Bytes = field(init=False)
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
        self.earliest = np.where(storages.apart, storages.earliest, 0)
        self.latest = np.where(storages.apart, storages.latest, storages.steps)

    def place(self, item: int, *, alone: bool) -> None:
        """Find a place for ``item`` in the arena or a host, or make it a host; right away if it is to be ``alone``."""
        begin, end, size = (int(of[item]) for of in (self.storages.begins, self.storages.ends, self.storages.sizes))
        if self.inside is not None:
            self.profile[begin:end] -= size
        if not alone and (self._in_arena(item) or self._hosted(item, begin, end)):
            return
        self.profile[begin:end] += size
        self.is_host[item] = True

    def _in_arena(self, item: int) -> bool:
        return self.inside is None and self._moved_in(ARENA, self.arena_bytes, item)

    def _hosted(self, item: int, begin: int, end: int) -> bool:
        for host in self._hosts(item):
            if self._extends(host, begin, end) and self._moved_in(host, int(self.storages.sizes[host]), item):
                self._extend(host, begin, end)
                return True
        return False

    def _hosts(self, item: int) -> list[int]:
        """Those that could hold ``item``, first those that need to be allocated the least longer for it."""
        s = self.storages
        begin, end, size = s.begins[item], s.ends[item], s.sizes[item]
        found = np.flatnonzero(self.is_host & (s.sizes >= size))
        clear = ((end <= s.begins[found]) & (begin >= self.earliest[found])) | (
            (begin >= s.ends[found]) & (end <= self.latest[found])
        )
        found = found[clear]
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
