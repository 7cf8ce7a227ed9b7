"""Recompute what is fetched, slot after slot, where the operands are at hand: a first plan in one walk."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ._choice import Choice, Realised
from ._occurrences import Occurrences
from ._prices import Prices

__all__ = ["recomputed_greedily"]

_Segment = tuple[int, int]


def recomputed_greedily(realised: Realised, prices: Prices) -> Realised:
    """``realised``, which recomputes nothing, with recomputations that each lower the price and fit.

    What is kept stays kept. Operands are at hand where they are kept, or where the operator just before used them.
    """
    walk = _Walk(realised, prices)
    for e, event in enumerate(realised.occurrences.events):
        if event.again:
            walk.consider(e)
    return Realised(realised.occurrences, Choice(frozenset(walk.again), frozenset(walk.kept)))


class _Walk:
    def __init__(self, realised: Realised, prices: Prices) -> None:
        self.occurrences: Occurrences = realised.occurrences
        self.prices = prices
        self.kept = set(realised.choice.kept)
        self.again: set[int] = set()
        self.ceilings = np.array(self.occurrences.ceilings).T
        self.held = np.array(self.occurrences.worksets).T.copy()  # if the event happens: what it touches, and across it
        for t, k in self.kept:
            uses = self.occurrences.tracks[t].uses
            self.held[:, uses[k].event + 1 : uses[k + 1].event] += np.array(self.occurrences.tracks[t].sizes)[:, None]
        self.fetched = {(s.track, s.last): self._version(s.track, s.first) for s in realised.fetched}
        self.fetches = Counter((t, version) for (t, _), version in self.fetched.items())
        self.at: dict[int, list[_Segment]] = {}
        for t, track in enumerate(self.occurrences.tracks):
            for k, use in enumerate(track.uses):
                if self.occurrences.events[use.event].again:
                    self.at.setdefault(use.event, []).append((t, k))

    def _version(self, t: int, k: int) -> int:
        return self.occurrences.tracks[t].uses[k].version

    def consider(self, e: int) -> None:
        """Use slot ``e`` if that is cheaper and fits."""
        tracks = self.occurrences.tracks
        made = [(t, k) for t, k in self.at[e] if tracks[t].uses[k].creates]
        read = [(t, k) for t, k in self.at[e] if not tracks[t].uses[k].creates]
        spared = [(t, last) for t, k in made if (t, last := self._run_after(t, k)) in self.fetched]
        gain = sum(self._fetch_price(t, last) for t, last in spared)
        if gain <= self.prices.run_again(self.occurrences.events[e].op) or any(
            (t, k - 1) in self.kept for t, k in made
        ):
            return
        more: list[_Segment] = []
        for t, k in read:
            before = self._segments_before(t, k)
            if before is None:
                return
            more += before
        for t, last in spared:
            first = next(k for u, k in made if u == t)
            more += [(t, k) for k in range(first, last)]
        if self._fits(e, more):
            self.again.add(e)
            self.kept.update(more)
            for t, last in spared:
                self.fetches[t, self.fetched.pop((t, last))] -= 1

    def _run_after(self, t: int, k: int) -> int:
        """The next use after ``k`` that is a run; -1 if there is none."""
        uses, events = self.occurrences.tracks[t].uses, self.occurrences.events
        return next((j for j in range(k + 1, len(uses)) if not events[uses[j].event].again), -1)

    def _fetch_price(self, t: int, last: int) -> int:
        lifetime = self.occurrences.tracks[t].lifetime
        version = self.fetched[t, last]
        alone = version not in lifetime.backed and self.fetches[t, version] == 1
        return self.prices.load(lifetime.nbytes) + (self.prices.store(lifetime.nbytes) if alone else 0)

    def _segments_before(self, t: int, k: int) -> list[_Segment] | None:
        """Segments to keep besides, so that the buffer is at hand at its use ``k``; ``None`` if it is further away."""
        uses, events = self.occurrences.tracks[t].uses, self.occurrences.events
        position = events[uses[k].event].position
        found: list[_Segment] = []
        while (t, k - 1) not in self.kept:
            k -= 1
            found.append((t, k))
            event = events[uses[k].event]
            if not event.again:
                return found if event.position == position - 1 else None
            if uses[k].event in self.again:
                return found
        return found

    def _fits(self, e: int, more: list[_Segment]) -> bool:
        """Whether everything fits with slot ``e`` used and ``more`` kept; if so, that is what is held from now on."""
        tracks, held = self.occurrences.tracks, self.held
        spans = [(tracks[t].uses[k].event + 1, tracks[t].uses[k + 1].event, tracks[t].sizes) for t, k in more]
        for begin, end, sizes in spans:
            held[:, begin:end] += np.array(sizes)[:, None]
        touched = {e, *(event for begin, end, _ in spans for event in range(begin, end))}
        happening = [event for event in touched if event in self.again or not self.occurrences.events[event].again]
        if (held[:, [e, *happening]] <= self.ceilings[:, [e, *happening]]).all():
            return True
        for begin, end, sizes in spans:
            held[:, begin:end] -= np.array(sizes)[:, None]
        return False
