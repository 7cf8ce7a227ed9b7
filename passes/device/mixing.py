"""Arena, memory of others, memory of its own: a place for each storage that never allocates more than a limit."""

from __future__ import annotations

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
    """Places, and how many bytes of planned storages have memory of their own: what an allocator has to find."""

    places: Places
    allocated_alone: int


def mixed(storages: Storages, arena_bytes: int, inside: Bytes, limit: int) -> Mixture | None:
    """Places that allocate at most ``limit`` bytes at each step, or ``None`` if the arena is too large for that.

    ``inside`` are offsets of those that lie in the arena, and -1 for all others. Largest first, each of them goes into
    the memory of one that is allocated apart, where that is not needed yet or no longer, if allocating it so much
    earlier or freeing it so much later keeps the limit; else it gets memory of its own, which then may hold others.
    That never breaks the limit: until a storage is placed, its own bytes are reserved.
    """
    mixing = _Mixing(storages, arena_bytes, inside, limit)
    if mixing.profile.max(initial=0) > limit:
        return None
    outside = np.flatnonzero((inside < 0) & ~storages.apart)
    order = sorted(outside.tolist(), key=lambda i: (-storages.sizes[i], storages.begins[i], i))
    for item in order:
        mixing.place(item)
    alone = outside[mixing.owners[outside] == outside]
    return Mixture(Places(arena_bytes, mixing.owners, mixing.offsets), int(storages.sizes[alone].sum()))


@dataclass
class _Mixing:
    """``profile`` is what is allocated at each step if all that is not placed yet got memory of its own."""

    storages: Storages
    arena_bytes: int
    inside: Bytes
    limit: int
    profile: Bytes = field(init=False)
    owners: Bytes = field(init=False)
    offsets: Bytes = field(init=False)
    is_host: NDArray[np.bool_] = field(init=False)
    first: Bytes = field(init=False)  # step from which a host's memory is allocated
    last: Bytes = field(init=False)  # and the one behind the last
    guests: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        storages = self.storages
        self.profile = self.arena_bytes + storages.profile(self.inside < 0)
        self.owners = np.where(self.inside >= 0, ARENA, np.arange(len(self.inside)))
        self.offsets = np.maximum(self.inside, 0)
        self.is_host = storages.apart.copy()
        self.first, self.last = storages.begins.copy(), storages.ends.copy()

    def place(self, item: int) -> None:
        """Find a host for ``item``, or make it one."""
        storages = self.storages
        begin, end, size = int(storages.begins[item]), int(storages.ends[item]), int(storages.sizes[item])
        self.profile[begin:end] -= size
        for host in self._hosts(item):
            offset = self._gap(host, item)
            if offset is not None and self._extend(host, begin, end):
                self.owners[item], self.offsets[item] = host, offset
                self.guests.setdefault(host, []).append(item)
                return
        self.profile[begin:end] += size
        self.is_host[item] = True

    def _hosts(self, item: int) -> list[int]:
        """Those that could hold ``item``, first those that need to be allocated the least longer for it."""
        s = self.storages
        begin, end, size = s.begins[item], s.ends[item], s.sizes[item]
        earliest = np.where(s.apart, s.earliest, 0)
        latest = np.where(s.apart, s.latest, s.steps)
        clear = ((end <= s.begins) & (begin >= earliest)) | ((begin >= s.ends) & (end <= latest))
        found = np.flatnonzero(self.is_host & (s.sizes >= size) & clear)
        longer = np.maximum(self.first[found] - begin, 0) + np.maximum(end - self.last[found], 0)
        ranked = np.lexsort((found, s.sizes[found], longer * s.sizes[found]))
        chosen: list[int] = found[ranked[:CANDIDATES]].tolist()
        return chosen

    def _gap(self, host: int, item: int) -> int | None:
        """The lowest free offset for ``item`` in ``host``'s memory."""
        s = self.storages
        guests = [
            (int(self.offsets[g]), int(s.sizes[g]))
            for g in self.guests.get(host, ())
            if s.begins[g] < s.ends[item] and s.begins[item] < s.ends[g]
        ]
        offset = 0
        for low, size in sorted(guests):
            if offset + s.sizes[item] <= low:
                break
            offset = max(offset, low + size)
        return offset if offset + s.sizes[item] <= s.sizes[host] else None

    def _extend(self, host: int, begin: int, end: int) -> bool:
        """Allocate ``host`` from step ``begin`` to ``end`` at least, if that keeps the limit."""
        size = int(self.storages.sizes[host])
        first, last = int(self.first[host]), int(self.last[host])
        before, behind = slice(min(begin, first), first), slice(last, max(end, last))
        room = self.limit - size
        if self.profile[before].max(initial=0) > room or self.profile[behind].max(initial=0) > room:
            return False
        self.profile[before] += size
        self.profile[behind] += size
        self.first[host], self.last[host] = min(begin, first), max(end, last)
        return True
