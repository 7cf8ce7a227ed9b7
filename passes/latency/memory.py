"""The scratchpad as transfers are issued: whether a stay may begin, and when its bytes are free.

Stays are indices into ``TransferProblem.stays``; one is *live* from its beginning until its last use is issued.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from typing import Protocol

from .transfers import Transfer, TransferProblem

__all__ = ["Bytes", "Places", "Scratchpad"]


class Scratchpad(Protocol):
    """What the issuing of transfers asks of memory."""

    def in_the_way(self, stays: Sequence[int]) -> Collection[int]:
        """Live stays of which some must end before ``stays`` can begin; empty when they can."""

    def free_from(self, stays: Sequence[int]) -> float:
        """When, in seconds, the bytes ``stays`` would take are free."""

    def admits(self, load: Transfer, anchor: int, begins: Sequence[int]) -> bool:
        """Whether ``load`` may be issued before ``anchor``, which begins the stays ``begins``, and kept until used."""

    def take(self, stay: int, anchor: int) -> float:
        """Begin a stay in the slot ``anchor``; returns when its bytes are free."""

    def end(self, stay: int, moment: float) -> None:
        """End a stay, whose last use is done at ``moment``."""


class Bytes:
    """Counts bytes only; freed bytes are taken again oldest first. ``held_back`` of them are not for early loads."""

    def __init__(self, problem: TransferProblem, held_back: int) -> None:
        self.capacity = problem.capacity
        self.footprint = [stay.footprint for stay in problem.stays]
        self.first_use = [stay.anchors[0] if stay.anchors else 0 for stay in problem.stays]
        self.room = [room - held_back for room in problem.room]
        self.live: dict[int, None] = {}
        self.live_bytes = 0
        self.free: list[tuple[float, int]] = [(0.0, problem.capacity)]  # since when, and how many bytes

    def in_the_way(self, stays: Sequence[int]) -> Collection[int]:
        """All live stays while the bytes of ``stays`` are missing."""
        return self.live if self.live_bytes + self._sum(stays) > self.capacity else ()

    def free_from(self, stays: Sequence[int]) -> float:
        """When the last of the bytes became free."""
        missing = self._sum(stays)
        for moment, nbytes in self.free:
            missing -= nbytes
            if missing <= 0:
                return moment
        return 0.0

    def admits(self, load: Transfer, anchor: int, begins: Sequence[int]) -> bool:
        """Whether every anchor until the load is used has room for it."""
        size = self.footprint[load.stay]
        if self.live_bytes + self._sum(begins) + size > self.capacity:
            return False
        return min(self.room[anchor : load.last], default=size) >= size

    def take(self, stay: int, anchor: int) -> float:
        """Take the bytes that are free the longest."""
        size, moment, emptied = self.footprint[stay], 0.0, 0
        self.live[stay] = None
        self.live_bytes += size
        for early in range(anchor, self.first_use[stay]):
            self.room[early] -= size
        while size > 0 and emptied < len(self.free):
            moment, nbytes = self.free[emptied]
            size -= nbytes
            emptied += 1
        self.free[:emptied] = [(moment, -size)] if size < 0 else []
        return moment

    def end(self, stay: int, moment: float) -> None:
        """Return the bytes."""
        del self.live[stay]
        self.live_bytes -= self.footprint[stay]
        bisect.insort(self.free, (moment, self.footprint[stay]))

    def _sum(self, stays: Sequence[int]) -> int:
        return sum(self.footprint[s] for s in stays)


class Places:
    """Knows addresses: stays keep the ``offsets`` they have in the plan, but a load that is early may choose another.

    Between its issue and its last use no live stay and none that will begin may need the bytes it chooses. As all
    stays begin with offsets that go together, the plan is placed at any time.
    """

    def __init__(self, problem: TransferProblem) -> None:
        plan = problem.plan
        self.nbytes = [plan.graph.buffers[s.residence.buffer].nbytes for s in problem.stays]
        self.footprint = [stay.footprint for stay in problem.stays]
        self.offsets = [stay.residence.offset or 0 for stay in problem.stays]
        self.banks = plan.machine.scratchpad_memory.banks
        self.alignment = plan.machine.scratchpad_memory.alignment_bytes
        pinned = {pin.buffer for pin in plan.pins}
        self.is_pinned = [stay.residence.buffer in pinned for stay in problem.stays]
        self.first_use = [stay.anchors[0] if stay.anchors else 0 for stay in problem.stays]
        self.last_use = [stay.anchors[-1] if stay.anchors else len(problem.anchors) for stay in problem.stays]
        self.live: dict[int, None] = {}
        self.done = [0.0] * len(problem.stays)
        self.held: list[tuple[int, int, int]] = []  # disjoint: first byte, end, the latest stay there
        self.coming = sorted(range(len(problem.stays)), key=lambda s: self.first_use[s])
        self.coming_uses = [self.first_use[s] for s in self.coming]
        self.begun = [False] * len(problem.stays)

    def in_the_way(self, stays: Sequence[int]) -> Collection[int]:
        """Live stays whose bytes ``stays`` are going to take."""
        return [other for other in self.live if any(self._meet(stay, other) for stay in stays)]

    def free_from(self, stays: Sequence[int]) -> float:
        """When the last users of the bytes of ``stays`` are done."""
        return max((self._free(self.offsets[s], self.offsets[s] + self.nbytes[s]) for s in stays), default=0.0)

    def admits(self, load: Transfer, anchor: int, begins: Sequence[int]) -> bool:
        """Whether a place is free until the load's last use; the one that is free the soonest becomes its offset."""
        stay = load.stay
        behind = bisect.bisect_right(self.coming_uses, self.last_use[stay])
        coming = self.coming[bisect.bisect_left(self.coming_uses, anchor) : behind]
        rivals = [*self.live, *(s for s in coming if s != stay and not self.begun[s])]
        taken = sorted((self.offsets[s], self.offsets[s] + self.footprint[s]) for s in rivals)
        size = self.nbytes[stay]
        if self.is_pinned[stay]:
            own = self.offsets[stay]
            open_places = [own] if all(end <= own or own + size <= begin for begin, end in taken) else []
        else:
            open_places = [offset for bank in self.banks for offset in self._gaps(taken, stay, *bank)]
        if not open_places:
            return False
        self.offsets[stay] = min(open_places, key=lambda o: (self._free(o, o + size), o))
        return True

    def take(self, stay: int, anchor: int) -> float:
        """Take the bytes over from their last holders."""
        self.live[stay] = None
        self.begun[stay] = True
        begin = self.offsets[stay]
        end = begin + self.nbytes[stay]
        moment = self._free(begin, end)
        low, high = self._span(begin, end)
        pieces = [(begin, end, stay)]
        for first, stop, holder in self.held[low:high]:
            pieces += [(a, b, holder) for a, b in ((first, begin), (end, stop)) if a < b]
        self.held[low:high] = sorted(pieces)
        return moment

    def end(self, stay: int, moment: float) -> None:
        """Leave the bytes to whoever takes them next."""
        del self.live[stay]
        self.done[stay] = moment

    def _meet(self, stay: int, other: int) -> bool:
        return (
            self.offsets[stay] < self.offsets[other] + self.nbytes[other]
            and self.offsets[other] < self.offsets[stay] + self.nbytes[stay]
        )

    def _gaps(self, taken: Sequence[tuple[int, int]], stay: int, begin: int, end: int) -> list[int]:
        """The lowest and the highest place for ``stay`` in every gap that ``taken`` leaves of ``[begin, end)``."""
        found, floor = [], begin
        for low, high in (*taken, (end, end)):
            highest = (min(low, end) - self.nbytes[stay]) // self.alignment * self.alignment
            if highest >= floor:
                found += [floor, highest]
            floor = max(floor, high)
        return found

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        low = bisect.bisect_right(self.held, begin, key=lambda piece: piece[1])
        high = low
        while high < len(self.held) and self.held[high][0] < end:
            high += 1
        return low, high

    def _free(self, begin: int, end: int) -> float:
        low, high = self._span(begin, end)
        return max((self.done[holder] for _, _, holder in self.held[low:high]), default=0.0)
