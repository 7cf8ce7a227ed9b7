"""Loads ahead of their operators and stores behind, so that computing hides them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from ...compiler.pipeline import Budget, Decision, Progress, run_pass
from ...compiler.plan import PassRecord, Plan
from ...compiler.simulate import latency_ns
from ...errors import OptionError
from ..address.exact import ExactPlacement
from ..address.placement import PlacementError
from .bound import latency_certificate
from .issue import issue
from .memory import Bytes, Places
from .transfers import TransferProblem, rebuilt, step_seconds

__all__ = ["Prefetch"]

HELD_BACK = (4, 8, 16, 32, 0)  # n-th parts of the capacity left free for fragmentation, one after the other; 0: none


@dataclass(frozen=True)
class Prefetch:
    """Issue loads before, and stores after, the operators around them, as far as memory allows and time is saved.

    *Given* a plan with residences, placed or not. *Result*: the same order, residency and traffic with its transfers
    at other steps, hence residences that begin earlier or end later; never slower than the plan given, in simulated
    latency. A plan that was placed is placed afresh.

    Method: list scheduling by the engines' clocks (``issue.issue``). First all but the loads stay where they are, and
    early loads choose among free places (``memory.Places``). Then bytes alone are counted (``memory.Bytes``), with ever
    less of the capacity held back, until ``address/exact`` no longer places the residences, and each such plan is
    improved the first way. Of all plans the fastest is kept. ``effort`` is that pass's own, for one question in
    deterministic mode.
    """

    effort: float = 3.0

    def __post_init__(self) -> None:
        if self.effort <= 0:
            raise OptionError(f"latency/prefetch: option 'effort' is {self.effort}; it takes more than 0 seconds")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "latency/prefetch"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Move transfers; returns the fastest plan found, at worst the one given.

        Raises:
            OptionError: the plan has no residences yet.
        """
        begin = time.monotonic()
        search = _Search(plan, self.name, budget)
        before = search.fastest
        is_placed = all(r.offset is not None for r in plan.residences or ())
        for candidate in self._placed(search, budget) if is_placed else search.unplaced(HELD_BACK[1]):
            if search.offer(candidate):
                budget.listen(Progress(self.name, time.monotonic() - begin, search.fastest))
        certificate = latency_certificate(search.best, "residency")
        hidden, exposed = before - search.fastest, before - certificate.bound
        note = f"hides {hidden:,} of {exposed:,} ns that the plan took beyond the bound of its order"
        return Decision(search.best, certificate, note)

    def _placed(self, search: _Search, budget: Budget) -> Iterator[Plan]:
        yield from search.in_place(search.best)
        for part in HELD_BACK:
            for moved in search.unplaced(part):
                # Without places every stay that has ended is waited for: hardly ever does a placement save more.
                if latency_ns(moved) >= search.fastest or budget.halted():
                    continue
                share = budget if budget.deterministic else budget.share(0.3)
                try:
                    placed = run_pass(ExactPlacement(effort=self.effort), moved, share)
                except PlacementError:
                    return
                yield placed
                yield from search.in_place(placed)


class _Search:
    """The fastest plan so far and its latency in nanoseconds."""

    def __init__(self, plan: Plan, name: str, budget: Budget) -> None:
        self.name = name
        self.budget = budget
        self.problem, self.seconds = self._problem(plan)
        self.best = plan
        self.fastest = latency_ns(plan)

    def _problem(self, plan: Plan) -> tuple[TransferProblem, list[float]]:
        seconds = step_seconds(plan)
        return TransferProblem.of(plan, seconds, self.name), seconds

    def offer(self, plan: Plan) -> bool:
        """Keep ``plan`` if it is faster."""
        latency = latency_ns(plan)
        if latency >= self.fastest:
            return False
        self.best, self.fastest = plan, latency
        return True

    def unplaced(self, part: int) -> Iterator[Plan]:
        """The plan given with its transfers moved, without offsets; early loads leave a ``part``-th of the bytes."""
        held_back = self.problem.capacity // part if part else 0
        sequence = issue(self.problem, self.seconds, Bytes(self.problem, held_back), self.budget.halted)
        if sequence is not None:
            yield rebuilt(self.problem, sequence)

    def in_place(self, plan: Plan) -> Iterator[Plan]:
        """A placed plan with its transfers moved; only loads that come early change their place."""
        problem, seconds = self._problem(plan)
        places = Places(problem)
        sequence = issue(problem, seconds, places, self.budget.halted)
        if sequence is None:
            return
        moved = rebuilt(problem, sequence, places.offsets)
        yield msgspec.structs.replace(moved, passes=tuple(map(_without_arena, moved.passes)))


def _without_arena(record: PassRecord) -> PassRecord:
    """The record without what it says about places, which are others now."""
    if record.certificate is None or record.certificate.objective != "arena_bytes":
        return record
    return msgspec.structs.replace(record, certificate=None)
