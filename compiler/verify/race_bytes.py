"""What bytes hold, and which steps have touched them, while a plan is replayed."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["ENTRY", "Bytes", "Content", "Range", "Touch"]

#: What bytes hold: a storage's name and the call that wrote it; ``ENTRY`` where the caller or the program provides it.
Content = tuple[str, str]
ENTRY = ""


@dataclass(frozen=True)
class Touch:
    """Bytes of ``space`` that a step reads as ``expected`` (``None``: whatever they hold) or leaves as ``left``."""

    space: str
    begin: int
    end: int
    expected: Content | None = None
    left: Content | None = None


class Range(NamedTuple):
    """Bytes that hold ``content``; the steps that ``wrote`` and have since ``read`` them are bits of a number."""

    begin: int
    end: int
    content: Content | None = None
    wrote: int = 0
    read: int = 0


@dataclass
class Bytes:
    """Disjoint ranges of the bytes of one space, in order."""

    ranges: list[Range] = field(default_factory=list)

    def take(self, begin: int, end: int) -> list[Range]:
        """Remove ``[begin, end)`` and return it in ranges without gaps; bytes never heard of hold nothing."""
        inside: list[Range] = []
        outside: list[Range] = []
        low = high = bisect.bisect_right(self.ranges, begin, key=lambda r: r.end)
        reached = begin
        while high < len(self.ranges) and self.ranges[high].begin < end:
            known = self.ranges[high]
            pieces = ((known.begin, begin), (end, known.end))
            outside += [known._replace(begin=first, end=last) for first, last in pieces if first < last]
            if reached < known.begin:
                inside.append(Range(reached, known.begin))
            inside.append(known._replace(begin=max(known.begin, begin), end=min(known.end, end)))
            reached = inside[-1].end
            high += 1
        if reached < end:
            inside.append(Range(reached, end))
        self.ranges[low:high] = outside
        return inside

    def put(self, ranges: list[Range]) -> None:
        """Add ranges that follow one another and were taken before."""
        low = bisect.bisect_left(self.ranges, ranges[0].begin, key=lambda r: r.begin)
        self.ranges[low:low] = ranges
