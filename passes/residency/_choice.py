"""One choice of what is kept and what is computed again: its exact price, whether it fits, and the plan it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...compiler.plan import Plan, Recompute, Run
from ._occurrences import Occurrences, Track
from ._prices import Prices
from .emit import write
from .gaps import Gap, Lifetime

__all__ = ["Choice", "Realised", "Stretch", "normalised"]


@dataclass(frozen=True)
class Stretch:
    """Between two uses of ``tracks[track]`` that happen, ``first`` and ``last``, counted among all its uses.

    Its buffer stays resident if ``kept``; otherwise it is fetched at the end, or ``again`` computed there.
    """

    track: int
    first: int
    last: int
    kept: bool
    again: bool


@dataclass(frozen=True)
class Choice:
    """The slots ``again``, by event, in which operators run again, and the segments ``kept`` as (track, use before)."""

    again: frozenset[int]
    kept: frozenset[tuple[int, int]]

    def happens(self, occurrences: Occurrences, event: int) -> bool:
        """Whether ``event`` is a run, or a slot that is used."""
        return not occurrences.events[event].again or event in self.again

    def stretches(self, occurrences: Occurrences) -> Iterator[Stretch]:
        """What becomes of every buffer between any two of its uses that happen."""
        for t, track in enumerate(occurrences.tracks):
            happening = [k for k, use in enumerate(track.uses) if self.happens(occurrences, use.event)]
            for first, last in pairwise(happening):
                again = track.uses[last].creates
                kept = not again and all((t, k) in self.kept for k in range(first, last))
                yield Stretch(t, first, last, kept, again)


def normalised(occurrences: Occurrences, again: frozenset[int], keeps: Callable[[int, int], bool]) -> Choice:
    """The choice of these slots and segments, less recomputations whose results nobody uses."""
    kept = frozenset(
        (t, k) for t, track in enumerate(occurrences.tracks) for k in range(len(track.uses)) if keeps(t, k)
    )
    while True:
        choice = Choice(again, kept)
        used = {
            occurrences.tracks[s.track].uses[s.first].event
            for s in choice.stretches(occurrences)
            if s.kept and occurrences.tracks[s.track].uses[s.first].creates
        }
        if again <= used:
            return choice
        again &= used


@dataclass(frozen=True)
class Realised:
    """A choice along the events that happen, in exact integers."""

    occurrences: Occurrences
    choice: Choice

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """What becomes of every buffer between its uses."""
        return tuple(self.choice.stretches(self.occurrences))

    @property
    def fetched(self) -> list[Stretch]:
        """Stretches that end in a load."""
        return [s for s in self.stretches if not s.kept and not s.again]

    @property
    def stored(self) -> dict[tuple[int, int], Track]:
        """Versions, by track and number, that are stored for the sake of fetches."""
        found: dict[tuple[int, int], Track] = {}
        for s in self.fetched:
            track = self.occurrences.tracks[s.track]
            version = track.uses[s.first].version
            if version not in track.lifetime.backed:
                found[s.track, version] = track
        return found

    def price(self, prices: Prices) -> int:
        """What fetches, stores and recomputations cost together."""
        tracks = self.occurrences.tracks
        return (
            sum(prices.load(tracks[s.track].lifetime.nbytes) for s in self.fetched)
            + sum(prices.store(track.lifetime.nbytes) for track in self.stored.values())
            + sum(prices.run_again(self.occurrences.events[e].op) for e in self.choice.again)
        )

    def additional_bytes(self, prices: Prices) -> int:
        """Additional traffic of the plan this makes."""
        tracks = self.occurrences.tracks
        return (
            self.occurrences.problem.base_bytes
            + sum(tracks[s.track].lifetime.nbytes for s in self.fetched)
            + sum(track.lifetime.nbytes for track in self.stored.values())
            + sum(prices.streamed_bytes(self.occurrences.events[e].op) for e in self.choice.again)
        )

    @property
    def flops(self) -> int:
        """Operations of all recomputations."""
        ops = self.occurrences.plan.graph.ops
        return sum(ops[self.occurrences.events[e].op].flops for e in self.choice.again)

    def overfull(self) -> list[int]:
        """Events that happen with more resident than fits."""
        over = (self._held() > np.array(self.occurrences.ceilings).T).any(axis=0)
        return [int(e) for e in np.flatnonzero(over) if self.choice.happens(self.occurrences, int(e))]

    def _held(self) -> NDArray[np.int64]:
        """Bytes resident at each event that happens, by dimension; exact."""
        occurrences = self.occurrences
        change = np.zeros((len(occurrences.limits), len(occurrences.events) + 1), dtype=np.int64)
        for s in self.stretches:
            if s.kept:
                track = occurrences.tracks[s.track]
                change[:, track.uses[s.first].event + 1] += track.sizes
                change[:, track.uses[s.last].event] -= track.sizes
        held: NDArray[np.int64] = np.cumsum(change, axis=1)[:, :-1] + np.array(occurrences.worksets).T
        return held

    def moved_to(self, other: Occurrences) -> Realised:
        """The same choice among the events of ``other``, which has all of these and maybe more."""
        index = {event: e for e, event in enumerate(other.events)}
        moved = [index[event] for event in self.occurrences.events]
        kept: set[tuple[int, int]] = set()
        for s in self.stretches:
            if s.kept:
                uses = self.occurrences.tracks[s.track].uses
                first, last = moved[uses[s.first].event], moved[uses[s.last].event]
                kept |= {(s.track, k) for k, use in enumerate(other.tracks[s.track].uses) if first <= use.event < last}
        return Realised(other, Choice(frozenset(moved[e] for e in self.choice.again), frozenset(kept)))

    def plan(self) -> Plan:
        """The plan of this choice."""
        occurrences = self.occurrences
        happening = [e for e in range(len(occurrences.events)) if self.choice.happens(occurrences, e)]
        position = {e: p for p, e in enumerate(happening)}
        ops = occurrences.plan.graph.ops
        executions = [
            (Recompute if occurrences.events[e].again else Run)(ops[occurrences.events[e].op].name) for e in happening
        ]
        gone: tuple[set[Gap], set[Gap]] = (set(), set())
        number = {(t, k): j for t in range(len(occurrences.tracks)) for j, k in enumerate(self._uses(t, position))}
        for s in self.stretches:
            if not s.kept:
                buffer = occurrences.tracks[s.track].lifetime.buffer
                gone[s.again].add(Gap(buffer, number[s.track, s.first]))
        lifetimes = [self._lifetime(t, position) for t in range(len(occurrences.tracks))]
        return write(occurrences.plan, executions, lifetimes, *gone)

    def _uses(self, t: int, position: dict[int, int]) -> list[int]:
        return [k for k, use in enumerate(self.occurrences.tracks[t].uses) if use.event in position]

    def _lifetime(self, t: int, position: dict[int, int]) -> Lifetime:
        track = self.occurrences.tracks[t]
        uses = [track.uses[k] for k in self._uses(t, position)]
        versions = tuple(use.version for use in uses)
        return replace(
            track.lifetime,
            positions=tuple(position[use.event] for use in uses),
            versions=versions,
            stored_after=None if track.lifetime.stored_after is None else versions.index(versions[-1]),
        )
