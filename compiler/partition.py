"""What the backward half of a training step finds of the forward half: the problem, one answer, and its recount.

A value that the backward half needs is *kept* on the device, *offloaded* to host memory and fetched again, or
computed again from such values and from those that are there anyway (parameters, inputs). Which operators run again
follows from what is saved, and so does the time; ``recount`` says what an answer costs, knowing no solver.
Times are whole picoseconds, so that their sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from ..errors import InternalError
from .plan import relative_gap

__all__ = ["Partition", "PartitionProblem", "Recount", "SavedValue", "Step"]


@dataclass(frozen=True)
class Step:
    """One operator of the joint graph.

    ``reads`` are indices of values. ``ps`` is the time it takes in its own half, where it hides transfers; ``again_ps``
    what it adds to the backward half when its results are neither kept nor offloaded: 0 if it runs once in either
    case. An operator that is not ``repeatable`` (it draws random numbers, communicates, writes to its operands) runs
    in the forward half only.
    """

    name: str
    reads: tuple[int, ...] = ()
    ps: int = 0
    again_ps: int = 0
    repeatable: bool = True


@dataclass(frozen=True)
class SavedValue:
    """One value that the backward half may need of the forward half.

    ``producer`` is the index of its step, ``None`` for what is there anyway and costs nothing. ``nbytes`` is what it
    occupies when kept: 0 if its storage stays on the device anyway, as that of an output does. A view cannot be kept
    (``can_keep``): its storage's first value can, and the view, a step that takes no time, runs again; so aliases
    count once. ``save_ps`` is what saving it adds to the two halves, kept or offloaded: the traffic of writing it, if
    it were not written anyway, and of reading it. ``store_ps`` and ``load_ps`` are what offloading it occupies the
    link to the host for; ``None`` if it cannot be offloaded.
    """

    name: str
    producer: int | None
    nbytes: int = 0
    can_keep: bool = True
    save_ps: int = 0
    store_ps: int | None = None
    load_ps: int | None = None

    @property
    def can_offload(self) -> bool:
        """Whether it may leave for host memory and come back."""
        return self.can_keep and self.store_ps is not None and self.load_ps is not None


@dataclass(frozen=True)
class Recount:
    """What one answer costs: the steps that run again, where the time goes, and the bytes kept on the device."""

    again: frozenset[int]
    again_ps: int
    save_ps: int
    exposed_store_ps: int
    exposed_load_ps: int
    kept_bytes: int

    @property
    def total_ps(self) -> int:
        """Time added to that of both halves."""
        return self.again_ps + self.save_ps + self.exposed_store_ps + self.exposed_load_ps


@dataclass(frozen=True)
class PartitionProblem:
    """A joint graph: the forward ``steps`` and the ``backward`` steps, each in order, and the forward's ``values``.

    Backward steps read values of the forward half; what they make does not matter here.

    Raises:
        InternalError: a step reads a value that does not exist or is computed later; a negative size or time.
    """

    steps: tuple[Step, ...]
    backward: tuple[Step, ...]
    values: tuple[SavedValue, ...]

    def __post_init__(self) -> None:
        for s, step in enumerate((*self.steps, *self.backward)):
            for v in step.reads:
                producer = self.values[v].producer if 0 <= v < len(self.values) else s
                if producer is not None and producer >= s:
                    raise InternalError(f"step {step.name!r} reads value {v}, which is not computed before it")
            if min(step.ps, step.again_ps) < 0:
                raise InternalError(f"step {step.name!r} takes a negative time")
        for value in self.values:
            if min(value.nbytes, value.save_ps, value.store_ps or 0, value.load_ps or 0) < 0:
                raise InternalError(f"value {value.name!r} has a negative size or time")

    @cached_property
    def demanded(self) -> tuple[int, ...]:
        """Values that backward steps read and that are not there anyway."""
        read = {v for step in self.backward for v in step.reads}
        return tuple(v for v in sorted(read) if self.values[v].producer is not None)

    @cached_property
    def made(self) -> tuple[tuple[int, ...], ...]:
        """For each step the values that it makes."""
        made: list[list[int]] = [[] for _ in self.steps]
        for v, value in enumerate(self.values):
            if value.producer is not None:
                made[value.producer].append(v)
        return tuple(map(tuple, made))

    @cached_property
    def latest(self) -> tuple[int, ...]:
        """For each value the backward step before which it is needed at the latest, if it is needed at all.

        That is the first one that reads it; of a value that none reads, the latest of what is computed from it. It is
        -1 for a value that no backward step needs.
        """
        latest = [-1] * len(self.values)
        direct = self._first_reads
        for s in range(len(self.steps) - 1, -1, -1):
            for v in self.made[s]:
                latest[v] = direct.get(v, latest[v])
            last = max((latest[v] for v in self.made[s]), default=-1)
            for v in self.steps[s].reads:
                latest[v] = max(latest[v], last)
        for v, value in enumerate(self.values):
            if value.producer is None:
                latest[v] = direct.get(v, latest[v])
        return tuple(latest)

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """Values that backward steps read, or that such values are computed from, and that are not there anyway."""
        return tuple(v for v, value in enumerate(self.values) if self.latest[v] >= 0 and value.producer is not None)

    def due(self, saved: Set[int], again: Set[int]) -> dict[int, int]:
        """For each needed value the backward step before which it is needed.

        Steps in ``again`` run when one of their results that is not in ``saved`` is needed first.
        """
        due = dict(self._first_reads)
        never = len(self.backward)
        for s in sorted(again, reverse=True):
            first = min((due[v] for v in self.made[s] if v in due and v not in saved), default=never)
            for v in self.steps[s].reads:
                due[v] = min(due.get(v, never), first)
        return due

    @cached_property
    def _first_reads(self) -> dict[int, int]:
        return {v: b for b in range(len(self.backward) - 1, -1, -1) for v in self.backward[b].reads}

    @cached_property
    def released_ps(self) -> tuple[int, ...]:
        """When each value is computed, counted from the beginning of the forward half."""
        ends = (*accumulate(step.ps for step in self.steps),)
        return tuple(0 if value.producer is None else ends[value.producer] for value in self.values)

    @cached_property
    def begins_ps(self) -> tuple[int, ...]:
        """When each backward step begins, counted from the beginning of the backward half, if it never waits."""
        return (0, *accumulate(step.ps for step in self.backward))[: len(self.backward)]

    @cached_property
    def forward_ps(self) -> int:
        """Time of the forward half."""
        return sum(step.ps for step in self.steps)

    def recount(self, kept: Set[int], offloaded: Set[int]) -> Recount | None:
        """What saving these values costs; ``None`` if then a step that is not repeatable would have to run again.

        Stores go over the link one at a time, as the values are computed; loads one at a time from the beginning of
        the backward half, in the order in which they are needed. What of the stores outlasts the forward half, and
        what the backward half waits for loads, is exposed. Steps that run again are not counted on to hide loads.
        """
        saved = kept | offloaded
        again: set[int] = set()
        wanted = list(self.demanded)
        while wanted:
            v = wanted.pop()
            producer = self.values[v].producer
            if producer is None or v in saved or producer in again:
                continue
            if not self.steps[producer].repeatable:
                return None
            again.add(producer)
            wanted.extend(self.steps[producer].reads)
        return Recount(
            frozenset(again),
            sum(self.steps[s].again_ps for s in again),
            sum(self.values[v].save_ps for v in saved),
            self._exposed_store_ps(offloaded),
            self._exposed_load_ps(offloaded, saved, again) if offloaded else 0,
            sum(self.values[v].nbytes for v in kept),
        )

    def longest_wait(self, kept: Set[int], offloaded: Set[int]) -> int | None:
        """The backward step until which loads make the backward half wait longest; ``None`` if it never waits."""
        count = self.recount(kept, offloaded)
        if count is None or not count.exposed_load_ps:
            return None
        waits = self._waits_ps(offloaded, kept | offloaded, count.again)
        return min(b for b, late in waits if late == count.exposed_load_ps)

    def _exposed_store_ps(self, offloaded: Set[int]) -> int:
        finish = 0
        for v in sorted(offloaded, key=lambda v: (self.released_ps[v], v)):
            finish = max(finish, self.released_ps[v]) + (self.values[v].store_ps or 0)
        return max(0, finish - self.forward_ps)

    def _exposed_load_ps(self, offloaded: Set[int], saved: Set[int], again: Set[int]) -> int:
        return max((late for _, late in self._waits_ps(offloaded, saved, again)), default=0)

    def _waits_ps(self, offloaded: Set[int], saved: Set[int], again: Set[int]) -> Iterator[tuple[int, int]]:
        due = self.due(saved, again)
        arrived = 0
        for b, v in sorted((due[v], v) for v in offloaded if v in due):
            arrived += self.values[v].load_ps or 0
            yield b, max(0, arrived - self.begins_ps[b])


@dataclass(frozen=True)
class Partition:
    """One answer: which values are kept and which offloaded, and a ``bound_ps`` that no answer within the limit beats.

    Raises:
        InternalError: the recount finds a step that cannot run again, more bytes than ``limit_bytes``, a value that
            cannot be saved in this way, or less time than the bound.
    """

    problem: PartitionProblem = field(repr=False)
    limit_bytes: int
    kept: frozenset[int]
    offloaded: frozenset[int]
    bound_ps: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        values = self.problem.values
        wrong = [v for v in self.kept if not values[v].can_keep] + [
            v for v in self.offloaded if not values[v].can_offload or v in self.kept
        ]
        if wrong:
            raise InternalError(f"value {values[wrong[0]].name!r} cannot be saved as the partition says")
        if self.recount.kept_bytes > self.limit_bytes or self.recount.total_ps < self.bound_ps:
            raise InternalError(
                f"a partition keeps {self.recount.kept_bytes} bytes within {self.limit_bytes} and takes "
                f"{self.recount.total_ps} ps, with a bound of {self.bound_ps}",
                hint="please report this",
            )

    @cached_property
    def recount(self) -> Recount:
        """What it costs."""
        found = self.problem.recount(self.kept, self.offloaded)
        if found is None:
            raise InternalError("a partition runs a step again that is not repeatable", hint="please report this")
        return found

    @property
    def gap(self) -> float:
        """``(value - bound) / value`` of the time added: 0 is optimal."""
        return relative_gap(self.recount.total_ps, self.bound_ps)
