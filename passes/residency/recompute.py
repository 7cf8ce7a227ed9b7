"""Keep, fetch or compute again: the residency of a fixed order when dropped tensors need not come from memory."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice, pairwise
from typing import Literal

import pulp

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from ...errors import OptionError
from .._solver.highs import Listener, Solution, less_tolerances, solve, whole_units
from ._choice import Choice, Realised
from ._greedy import recomputed_greedily
from ._occurrences import Occurrences
from ._prices import UNITS, Objective, Prices
from ._recompute_model import Question, build, choice_of, kept_across, spans, start
from .gaps import Gap, gaps_of_residences
from .ilp import IlpResidency
from .workset import require_fit

__all__ = ["RecomputeResidency"]

MAX_NODES = 10_000  # the search tree in deterministic mode, where no clock may decide
MAX_ROUNDS = 5  # how often the model is tightened because the solver's tolerances let a row be missed
WINDOW_VARIABLES = 600  # binaries that a neighbourhood frees, as far as they are spread evenly
MIN_WINDOW = 20  # events
MAX_SWEEPS = 3  # over all windows: what no clock ends
MAX_USES = 200_000  # beyond this many uses, the model takes longer to write down than it is worth


@dataclass(frozen=True)
class RecomputeResidency:
    """Keep every gap between two uses of a buffer, drop it and fetch, or drop it and compute the buffer again.

    *Given* a plan with an order. *Result*: loads, stores, recomputes and residences that cost the least, and never
    more than those of ``residency/ilp``. ``objective`` is what costs: ``traffic``, additional bytes, and among equals
    the fewest operations; ``latency``, the seconds that transfers and recomputed operators occupy engines; ``energy``,
    their joules, for machines that state them. Operators may run again just before the one that needs what they make,
    unless the operator before that one used it, and in turn before each other, in chains of up to ``depth``. Those that
    draw random numbers, update buffers, or whose operands have been updated since may not.

    The bound is on additional traffic, over every residency of the order with these recomputations, and no others; for
    the other objectives it is only what no residency avoids, and the note states what the model found. In deterministic
    mode the search is limited by nodes. ``reserve_bytes`` of the capacity are left free, except where an operator needs
    them, so that addresses find room.
    """

    objective: Objective = "traffic"
    depth: int = 2
    reserve_bytes: int = 0

    def __post_init__(self) -> None:
        if self.reserve_bytes < 0:
            raise OptionError(f"option 'reserve_bytes' of pass {self.name!r} is {self.reserve_bytes}, not 0 or more")
        if self.depth < 0:
            raise OptionError(f"option 'depth' of pass {self.name!r} is {self.depth}, not 0 or more")
        if self.objective not in UNITS:
            known = ", ".join(UNITS)
            raise OptionError(f"option 'objective' of pass {self.name!r} is {self.objective!r}, not one of {known}")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "residency/recompute"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide residency. Raises Infeasible as ``require_fit``, OptionError for energies the machine lacks."""
        prices = Prices(plan, self.objective)
        require_fit(plan)
        without = IlpResidency(reserve_bytes=self.reserve_bytes).apply(plan, budget.share(0.3))
        occurrences = Occurrences.of(plan, prices, 0, self.reserve_bytes)
        outcome = _Outcome(_incumbent(occurrences, without.plan), 0, complete=False)
        for depth in sorted({min(1, self.depth), self.depth}):  # what short chains reach is where longer ones begin
            occurrences = Occurrences.of(plan, prices, depth, self.reserve_bytes)
            search = _Search(self.name, occurrences, prices, budget if depth == self.depth else budget.share(0.3))
            begin = outcome.found.moved_to(occurrences)
            outcome = search.run(begin if begin.choice.again else recomputed_greedily(begin, prices))
        base = occurrences.problem.base_bytes
        bound = base
        if self.objective == "traffic" and not self.reserve_bytes:
            bound += outcome.bound
            if not search.slots and without.certificate is not None:
                bound = max(bound, without.certificate.bound)  # nothing to recompute: its bound is one for this, too
        value = outcome.found.additional_bytes(prices)
        proved_by: Literal["ilp", "analytic"] = "ilp" if bound > base else "analytic"
        scope: Literal["residency", "recompute"] = "recompute" if search.slots and bound > base else "residency"
        certificate = Certificate("additional_traffic_bytes", value, min(value, bound), proved_by, scope)
        return Decision(outcome.found.plan(), certificate, search.note(outcome))


def _incumbent(occurrences: Occurrences, plan: Plan) -> Realised:
    """The choice that ``plan``, which recomputes nothing, has made."""
    kept = gaps_of_residences(plan, range(len(plan.residences or ()))).gaps
    segments: set[tuple[int, int]] = set()
    for t, track in enumerate(occurrences.tracks):
        runs = [k for k, use in enumerate(track.uses) if not occurrences.events[use.event].again]
        for after, (first, last) in enumerate(pairwise(runs)):
            if track.pinned or Gap(track.lifetime.buffer, after) in kept:
                segments |= {(t, k) for k in range(first, last)}
    return Realised(occurrences, Choice(frozenset(), frozenset(segments)))


@dataclass(frozen=True)
class _Outcome:
    """The best choice found, a price that none undercuts, and whether the search was complete."""

    found: Realised
    bound: int
    complete: bool


@dataclass(frozen=True)
class _Search:
    """Solves the model of one order from an incumbent."""

    name: str
    occurrences: Occurrences
    prices: Prices
    budget: Budget

    @cached_property
    def slots(self) -> int:
        """Recomputations that are considered."""
        return sum(event.again for event in self.occurrences.events)

    @property
    def is_exact(self) -> bool:
        """Whether prices are bytes, which bound the traffic."""
        return self.prices.objective == "traffic"

    @property
    def slack(self) -> float:
        """How far apart price and bound may be that are the same."""
        return 0 if self.is_exact else self.unit / 100

    @cached_property
    def unit(self) -> float:
        """What prices are divided by: all of them are multiples of it, or at most a thousand times it."""
        tracks, events = self.occurrences.tracks, self.occurrences.events
        found = [self.prices.load(track.lifetime.nbytes) for track in tracks]
        found += [self.prices.store(track.lifetime.nbytes) for track in tracks]
        found += [self.prices.run_again(event.op) for event in events if event.again]
        return math.gcd(*found) or 1 if self.is_exact else max(found, default=1) / 1000 or 1

    def run(self, incumbent: Realised) -> _Outcome:
        """The cheapest choice at least as good as ``incumbent``; of equal traffic, the one with the fewest flops."""
        value = incumbent.price(self.prices)
        uses = sum(len(track.uses) for track in self.occurrences.tracks)
        if value == 0:
            return _Outcome(incumbent, 0, complete=True)
        if uses > MAX_USES or (self.is_exact and not self.slots):
            return _Outcome(incumbent, 0, complete=not self.slots)
        outcome = self._cheapest(incumbent)
        if self.is_exact and outcome.complete and outcome.found.choice.again:
            outcome = replace(outcome, found=self._fewest_flops(outcome.found))
        return outcome

    def note(self, outcome: _Outcome) -> str:
        """What was considered, chosen and found."""
        again = len(outcome.found.choice.again)
        note = f"{again} of {self.slots} recomputations chosen, {outcome.found.flops:,} operations"
        if not self.is_exact:
            value, unit = outcome.found.price(self.prices), UNITS[self.prices.objective]
            note += f"; {value:,} {unit}, at least {outcome.bound:,}"
        if outcome.complete:
            return note
        if sum(len(track.uses) for track in self.occurrences.tracks) > MAX_USES:
            return f"{note}; too many to be searched"
        if self.budget.deterministic and self.budget.remaining_s > 0:
            return f"{note}; the search limit came first"
        return f"{note}; the time limit came first" + (
            ", so another run may differ" if self.budget.deterministic else ""
        )

    def _cheapest(self, incumbent: Realised) -> _Outcome:
        best, bound = incumbent, 0
        question = Question(self.occurrences, self.prices, self.unit)
        for _ in range(MAX_ROUNDS):
            if self.budget.remaining_s <= 0:
                break
            solution = self._solve(question, best, self.budget.share(0.5))
            bound = max(bound, self._whole(solution.bound))
            found = self._read(solution)
            if found is None:
                break
            overfull = found.overfull()
            if not overfull and found.price(self.prices) < best.price(self.prices):
                best = found
            if not overfull or solution.status != "optimal":
                break
            question = replace(question, covers=(*question.covers, *(kept_across(found, e) for e in overfull)))
        if best.price(self.prices) - bound > self.slack:
            best = self._improved(best)
        value = best.price(self.prices)
        return _Outcome(best, min(bound, value), complete=value - bound <= self.slack)

    def _improved(self, best: Realised) -> Realised:
        """Large neighbourhoods: window after window, whatever concerns no event in it stays as ``best`` has it."""
        problem = build(Question(self.occurrences, self.prices, self.unit))
        concerned = spans(self.occurrences)
        free = {v.name: (v, v.lowBound) for v in problem.variables() if v.name in concerned}
        events = len(self.occurrences.events)
        width = max(MIN_WINDOW, events * WINDOW_VARIABLES // len(free))
        slots = [e for e, event in enumerate(self.occurrences.events) if event.again]
        idle, windows = 0, sorted({e // (width // 2) * (width // 2) for e in slots})
        for first in islice(cycle(windows), MAX_SWEEPS * len(windows)):
            if self.budget.remaining_s <= 0 or idle == len(windows):
                break
            values = start(best)
            for name, (begin, end) in concerned.items():
                variable, low = free[name]
                is_free = begin < first + width and end >= first
                variable.lowBound, variable.upBound = (low, 1) if is_free else (values[name], values[name])
            found = self._read(self._run(problem, best, self.budget.share(0.2), lambda incumbent, bound: None))
            idle += 1
            if found and not found.overfull() and found.price(self.prices) < best.price(self.prices):
                best, idle = found, 0
        return best

    def _fewest_flops(self, best: Realised) -> Realised:
        if self.budget.remaining_s <= 0:
            return best
        question = Question(self.occurrences, self.prices, self.unit, at_most=best.price(self.prices))
        found = self._read(self._solve(question, best, self.budget))
        if found is None or found.overfull() or found.price(self.prices) > best.price(self.prices):
            return best
        return min(best, found, key=lambda realised: realised.flops)

    def _read(self, solution: Solution) -> Realised | None:
        return Realised(self.occurrences, choice_of(self.occurrences, solution.values)) if solution.values else None

    def _solve(self, question: Question, best: Realised, budget: Budget) -> Solution:
        begin, base = time.monotonic(), self.occurrences.problem.base_bytes
        value = best.price(self.prices)

        def listen(objective: float | None, bound: float | None) -> None:
            if self.is_exact and question.at_most is None:
                found = value if objective is None else min(value, round(question.unit * objective))
                proven = 0 if bound is None else min(found, self._whole(bound))
                budget.listen(Progress(self.name, time.monotonic() - begin, base + found, base + proven))

        return self._run(build(question), best, budget, listen, exact=self.is_exact and question.at_most is None)

    def _run(
        self, problem: pulp.LpProblem, best: Realised, budget: Budget, listen: Listener, *, exact: bool | None = None
    ) -> Solution:
        return solve(
            problem,
            budget,
            start=start(best),
            absolute_gap=0.99 if (self.is_exact if exact is None else exact) else 1e-3,
            max_nodes=MAX_NODES if self.budget.deterministic else None,
            listen=listen,
        )

    def _whole(self, bound: float) -> int:
        """The least price that ``bound``, in units, proves; 0 if nothing is proven."""
        columns = sum(2 * len(track.uses) for track in self.occurrences.tracks) + self.slots
        if self.is_exact:
            return whole_units(bound, columns) * round(self.unit)
        return max(0, math.floor(less_tolerances(bound, columns) * self.unit)) if math.isfinite(bound) else 0
