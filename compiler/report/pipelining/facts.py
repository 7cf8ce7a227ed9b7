"""The figures of a schedule that text, page and command line tell, counted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ...pipelining.schedule import TimedSchedule
from .moves import Moves

__all__ = [
    "Attempted",
    "PipelineFacts",
    "Proved",
    "RankFacts",
    "Shown",
    "Solved",
    "facts_of",
    "pairs_of",
    "timed_of",
    "title_of",
]


class Proved(Protocol):
    """A proven lower bound of an objective, as ``passes.pipeline_parallel.solution.Bound``."""

    @property
    def value(self) -> int:
        """No schedule of the problem has a lower objective."""

    @property
    def proved_by(self) -> str:
        """``"analytic"``, ``"cp"``, ``"ilp"`` or ``"lp"``."""


class Attempted(Protocol):
    """A method that was tried, as ``passes.pipeline_parallel.solution.Attempt``."""

    @property
    def method(self) -> str:
        """Its name."""

    @property
    def value(self) -> int | None:
        """The objective that it reached; ``None`` if it found nothing."""

    @property
    def seconds(self) -> float:
        """What it took."""


class Solved(Protocol):
    """A schedule with what was proved about it, as ``passes.pipeline_parallel.solution.PipelineSolution``."""

    @property
    def timed(self) -> TimedSchedule:
        """The schedule."""

    @property
    def objective(self) -> str:
        """``"makespan"`` or ``"span"``."""

    @property
    def bound(self) -> Proved:
        """What no schedule undercuts."""

    @property
    def attempts(self) -> Sequence[Attempted]:
        """What was tried."""

    @property
    def seconds(self) -> float:
        """What solving took."""

    @property
    def gap(self) -> float:
        """``(value - bound) / value``."""


#: What can be shown: a schedule with its times alone, or one that a method found, with its bound.
Shown = TimedSchedule | Solved


@dataclass(frozen=True)
class RankFacts:
    """One rank: times in the problem's unit, sizes in bytes.

    ``idle_ns`` is the makespan without ``work_ns``, which is what its actions take; ``wait_ns`` is the part of it that
    is spent waiting for transfers. ``sent`` messages of ``sent_bytes`` leave it.
    """

    rank: int
    stages: tuple[int, ...]
    work_ns: int
    idle_ns: int
    wait_ns: int
    span_ns: int
    copy_ns: int
    reduce_ns: int
    peak_bytes: int
    resident_bytes: int
    limit_bytes: int | None
    sent: int
    sent_bytes: int

    @property
    def within(self) -> bool:
        """Whether it holds no more than it may."""
        return self.limit_bytes is None or self.peak_bytes <= self.limit_bytes


@dataclass(frozen=True)
class AttemptFacts:
    """A method that was tried; see ``Attempted``."""

    method: str
    value: int | None
    seconds: float


@dataclass(frozen=True)
class PipelineFacts:
    """A schedule as a whole; the fields from ``objective`` on are ``None`` or empty where nothing was solved."""

    name: str
    method: str
    microbatches: int
    stages: int
    actions: int
    makespan_ns: int
    span_ns: int
    bubble: float
    span_bubble: float
    ranks: tuple[RankFacts, ...]
    objective: str | None = None
    bound: int | None = None
    proved_by: str | None = None
    gap: float | None = None
    seconds: float | None = None
    attempts: tuple[AttemptFacts, ...] = ()

    @property
    def title(self) -> str:
        """What it is, and of what, where that has a name of its own."""
        return title_of(self.method, self.name)

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all ranks."""
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def within(self) -> bool:
        """Whether every rank holds no more than it may."""
        return all(rank.within for rank in self.ranks)

    @property
    def sent(self) -> int:
        """Messages of all ranks."""
        return sum(rank.sent for rank in self.ranks)

    @property
    def sent_bytes(self) -> int:
        """Bytes of all messages."""
        return sum(rank.sent_bytes for rank in self.ranks)

    @property
    def wait_ns(self) -> int:
        """What all ranks together wait for transfers."""
        return sum(rank.wait_ns for rank in self.ranks)

    @property
    def idle_ns(self) -> int:
        """What all ranks together idle."""
        return sum(rank.idle_ns for rank in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings, with its title and the sums over ranks."""
        names = ("title", "peak_bytes", "within", "sent", "sent_bytes", "wait_ns", "idle_ns")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def title_of(method: str, name: str) -> str:
    """``"zbv of 70B"``; the name that a problem has by default says nothing."""
    return (method or "schedule") if name == "pipeline" else f"{method or 'schedule'} of {name}"


def timed_of(shown: Shown) -> TimedSchedule:
    """The schedule, whatever is known about it."""
    return shown if isinstance(shown, TimedSchedule) else shown.timed


def facts_of(shown: Shown, moves: Moves | None = None) -> PipelineFacts:
    """Count; ``moves`` spares finding the schedule's messages again."""
    timed = timed_of(shown)
    schedule = timed.schedule
    facts = PipelineFacts(
        schedule.problem.name,
        schedule.method,
        schedule.problem.microbatches,
        len(schedule.problem.stages),
        sum(len(order) for order in schedule.orders),
        timed.makespan_ns,
        timed.span_ns,
        timed.bubble,
        timed.span_bubble,
        _ranks(timed, moves or Moves(timed)),
    )
    if isinstance(shown, TimedSchedule):
        return facts
    attempts = tuple(AttemptFacts(a.method, a.value, a.seconds) for a in shown.attempts)
    proof = (shown.objective, shown.bound.value, shown.bound.proved_by, shown.gap, shown.seconds, attempts)
    names = ("objective", "bound", "proved_by", "gap", "seconds", "attempts")
    return PipelineFacts(**{**vars(facts), **dict(zip(names, proof, strict=True))})


def pairs_of(*shown: Shown | None) -> tuple[tuple[Moves, PipelineFacts], ...]:
    """All that is known of each schedule that is there, counted once for whatever shows it."""
    pairs = []
    for each in shown:
        if each is not None:
            moves = Moves(timed_of(each))
            pairs.append((moves, facts_of(each, moves)))
    return tuple(pairs)


def _ranks(timed: TimedSchedule, moves: Moves) -> tuple[RankFacts, ...]:
    problem = timed.schedule.problem
    sent, sent_bytes = [0] * problem.ranks, [0] * problem.ranks
    for message in moves.messages:
        sent[message.sender] += 1
        sent_bytes[message.sender] += message.nbytes
    ranks = []
    for rank, order in enumerate(timed.schedule.orders):
        took = [finish - start for start, finish in zip(timed.starts[rank], timed.finishes[rank], strict=True)]
        copies = sum(time for action, time in zip(order, took, strict=True) if action.kind.copies)
        work = sum(took) - copies
        ranks.append(
            RankFacts(
                rank,
                problem.stages_of[rank],
                work,
                timed.makespan_ns - work,
                moves.waits_ns[rank],
                timed.spans_ns[rank],
                copies,
                sum(finish - start for _, start, finish in timed.reduced[rank]) if timed.reduced else 0,
                timed.peak_bytes[rank],
                problem.resident_bytes[rank],
                problem.memory_limit[rank] if problem.memory_limit is not None else None,
                sent[rank],
                sent_bytes[rank],
            )
        )
    return tuple(ranks)
