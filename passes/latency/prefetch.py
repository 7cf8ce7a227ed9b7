"""Loads ahead of their operators and stores behind, so that computing hides them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision, Progress, run_pass
from ...compiler.plan import Plan
from ...compiler.simulate import latency_ns, simulate
from ...errors import OptionError
from ..address.exact import ExactPlacement
from ..address.first_fit import FirstFit
from ..address.placement import PlacementError
from .bound import latency_certificate
from .issue import issue
from .transfers import TransferProblem, rebuilt

__all__ = ["Prefetch"]

HELD_BACK = (2, 4, 8, 16, 32)  # n-th parts of the capacity left free for fragmentation, one after the other


@dataclass(frozen=True)
class Prefetch:
    """Issue loads before, and stores after, the operators around them, as far as memory allows and time is saved.

    *Given* a plan with residences, placed or not. *Result*: the same order, residency and traffic with its transfers
    at other steps, hence residences that begin earlier or end later; never slower than the plan given, in simulated
    latency. A plan that was placed is placed afresh.

    Method: list scheduling by the engines' clocks (``issue.issue``), with ever less of the capacity held back until
    ``address/exact`` no longer places the residences. Of the plans placed, the fastest is kept. ``effort`` is that
    pass's own, for one question in deterministic mode.
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
        timed = simulate(plan)
        seconds = [(i.finish_s or 0.0) - (i.start_s or 0.0) for i in timed.instructions]
        problem = TransferProblem.of(plan, seconds, self.name)
        best, before = plan, latency_ns(plan)
        fastest = before
        for candidate in self._candidates(problem, seconds, budget):
            latency = latency_ns(candidate)
            if latency < fastest:
                best, fastest = candidate, latency
                budget.listen(Progress(self.name, time.monotonic() - begin, fastest))
        certificate = latency_certificate(best)
        exposed, least = before - certificate.bound, fastest - certificate.bound
        note = f"latency {before:,} ns before; {exposed:,} ns of it above the roofline, now {least:,}"
        return Decision(best, certificate, note)

    def _candidates(self, problem: TransferProblem, seconds: list[float], budget: Budget) -> Iterator[Plan]:
        halted = _halted(budget)
        capacity = problem.capacity
        is_placed = all(r.offset is not None for r in problem.plan.residences or ())
        tried: list[list[int]] = []
        for held_back in (0, *(capacity // part for part in HELD_BACK), 0):
            sequence = issue(problem, seconds, held_back=held_back, halted=halted)
            if sequence is None:
                return
            moved = rebuilt(problem, sequence)
            if not is_placed:
                yield moved
                continue
            at_first = not tried
            if sequence in tried[1:]:
                continue
            tried.append(sequence)
            step = FirstFit() if at_first else ExactPlacement(effort=self.effort)
            try:
                yield run_pass(step, moved, budget if budget.deterministic else budget.share(0.3))
            except PlacementError:
                if not at_first:
                    return
                continue
            if at_first:
                return


def _halted(budget: Budget) -> Callable[[], bool]:
    """Whether to end now: told to stop, or out of time where clocks may decide."""
    if budget.deterministic:
        return budget.stop.is_set
    return lambda: budget.remaining_s <= 0
