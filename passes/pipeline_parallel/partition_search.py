"""The search behind ``partition``: cuts by their bounds and around the best, scheduled by a few rules, then solved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ...compiler.pipeline import Budget, Progress
from ...compiler.pipelining.simulate import timed
from ...errors import Infeasible, OptionError
from ._lanes import schedule_of
from ._play import objective_of
from .bounds import lower_bound
from .list_schedule import Rule, filled, list_scheduled, rules_for, workshop_for
from .partition_bounds import NEVER, Chain
from .partition_even import Evenness, even, neighbours
from .partition_layers import Cuts, Line
from .partition_v import Nested
from .solution import Attempt, Bound, Objective, PipelineSolution, value_of, within_limit
from .solve import solve

__all__ = ["searched"]

RULES = 6  # list schedules by which cuts are rated
MOST_RATED = 120  # cuts, where clocks may not decide
MOST_SOLVED = 3
Tried = tuple[tuple[Cuts, int | None], ...]


def searched(line: Line, objective: Objective, budget: Budget) -> tuple[Cuts, PipelineSolution, Bound, Tried]:
    """The best cuts found, their solution, the bound over all cuts, and what was tried.

    Raises:
        Infeasible: no cuts keep the memory limit.
        OptionError: no cuts leave what layers share on one rank.
    """
    search = _Search(line, objective, budget)
    search.rate_all(budget.share(0.6))
    solved = search.solve_best()
    if not solved:
        raise search.failure or _impossible(line)
    cuts, solution = min(solved.items(), key=lambda item: (item[1].value, item[0]))
    bound = search.proven(solved)
    if bound.value > solution.value:
        bound = Bound(solution.value, bound.proved_by)
    return cuts, solution, bound, tuple(search.rated.items())


@dataclass
class _Search:
    line: Line
    objective: Objective
    budget: Budget
    rated: dict[Cuts, int | None] = field(default_factory=dict)
    rules: dict[Cuts, Rule] = field(default_factory=dict)
    bounds: dict[Cuts, int] = field(default_factory=dict)
    best: int = NEVER
    least: int = 0  # no cuts undercut it
    others: int = 0  # nor this, of those that have no bound of their own
    failure: Infeasible | None = None
    begin: float = field(default_factory=time.monotonic)

    def rate_all(self, budget: Budget) -> None:
        """Rate cuts until ``budget`` is used, or none is left that may be better."""
        is_alone = len(self.line.placement) == self.line.ranks
        (self._by_bound if is_alone else self._by_chunks)(budget.share(0.5))
        self._around_best(budget)

    def _by_bound(self, budget: Budget) -> None:
        """One stage a rank: cuts in the order of the worst bound of a stage, as long as that may lead to a better."""
        chain = Chain(self.line, self.objective)
        self.least = chain.bound
        for worst, cuts in chain.best_first():
            self.others = worst
            if worst >= self.best or (self.rated and self._ends(budget, MOST_RATED // 2)):
                return
            self._rate(cuts)
        if not self.rated:
            raise _impossible(self.line)
        self.others = NEVER

    def _by_chunks(self, budget: Budget) -> None:
        """Several stages a rank: cuts that divide work most evenly, with the bound of the rank that has most."""
        evenness, nested = Evenness(self.line, self.objective), Nested(self.line, self.objective)
        starts = [even(self.line)]
        self.least = max(evenness.bound, Chain(self.line, self.objective).bound)
        if nested.applies:
            whole, filled_ones = nested.least(empty=True), nested.least(empty=False)
            if whole is None:
                raise _impossible(self.line)
            self.least = max(self.least, whole[0])
            starts += [] if filled_ones is None else [filled_ones[1]]
        found = [evenness.evened(start) for start in starts if self.line.is_legal(start)]
        best = min(found, key=evenness.key, default=None)
        if best is None or evenness.key(best)[1] > self.least or evenness.key(best)[0]:
            from .partition_chunks import balanced_chunks  # ortools, which takes a while to load

            cuts, bound = balanced_chunks(self.line, self.objective, budget, hint=best)
            if bound is None or (cuts is None and best is None):
                raise _impossible(self.line)
            self.least = max(self.least, bound)
            found += [] if cuts is None else [cuts]
        self.others = self.least
        for cuts in sorted(set(found), key=evenness.key):
            self._rate(cuts)

    def _around_best(self, budget: Budget) -> None:
        """Move cuts of the best so far until no move helps."""
        evenness, improved = Evenness(self.line, self.objective), True
        while improved and self.least < self.best < NEVER:
            improved = False
            best = min((value, cuts) for cuts, value in self.rated.items() if value is not None)[1]
            for cuts in sorted(neighbours(self.line, best), key=evenness.key):
                if self._ends(budget, MOST_RATED):
                    return
                if cuts not in self.rated and self._rate(cuts):
                    improved = True
                    break

    def _ends(self, budget: Budget, most: int) -> bool:
        return budget.halted() or (self.budget.deterministic and len(self.rated) >= most)

    def _rate(self, cuts: Cuts) -> bool:
        """Bound ``cuts`` and schedule them by a few rules; whether they are the best so far."""
        problem = self.line.problem(cuts)
        self.bounds[cuts] = lower_bound(problem, self.objective).value
        self.rated[cuts] = None
        if self.bounds[cuts] >= self.best:
            return False
        shop = workshop_for(problem)
        if problem.memory_limit is not None:
            needed = [int(need) + held for need, held in zip(shop.least, problem.resident_bytes, strict=True)]
            if any(need > limit for need, limit in zip(needed, problem.memory_limit, strict=True)):
                self.bounds[cuts] = NEVER  # there is no schedule
                return False
        found: list[tuple[int, int, Rule]] = []
        for rule in islice(rules_for(shop), RULES):
            list_scheduled(shop, filled(shop, rule))
            found.append((int(objective_of(shop.lanes, shop.room, self.objective == "span")), len(found), rule))
        value, _, self.rules[cuts] = min(found)
        self.rated[cuts] = value
        improves = value < self.best
        self.best = min(self.best, value)
        self.budget.listen(
            Progress("pipeline_parallel/partition", time.monotonic() - self.begin, self.best, self.least)
        )
        return improves

    def solve_best(self) -> dict[Cuts, PipelineSolution]:
        """Solutions of the best cuts, each with its part of what is left of the budget."""
        solved: dict[Cuts, PipelineSolution] = {}
        order = sorted(self.rated, key=lambda cuts: (self.rated[cuts] or NEVER, self.bounds[cuts], cuts))
        for cuts in order:
            best = min((solution.value for solution in solved.values()), default=NEVER)
            if len(solved) >= MOST_SOLVED or (solved and self.budget.halted()):
                break
            if self.bounds[cuts] >= best:
                continue
            share = self.budget.share(1 / (MOST_SOLVED - len(solved)))
            try:
                solved[cuts] = self._solved(cuts, share)
            except Infeasible as error:
                if self.failure is None or error.required_bytes < self.failure.required_bytes:
                    self.failure = error
        return solved

    def _solved(self, cuts: Cuts, budget: Budget) -> PipelineSolution:
        """The solution of ``cuts``, no worse than what they were rated by; that itself where it is proved best."""
        begin, problem = time.monotonic(), self.line.problem(cuts)
        if cuts not in self.rules:
            return solve(problem, budget, objective=self.objective)
        shop, rule = workshop_for(problem), self.rules[cuts]
        schedule = schedule_of(problem, shop.lanes, *list_scheduled(shop, filled(shop, rule)), str(rule))
        judged = timed(schedule)
        value = value_of(judged, self.objective)
        if value > max(self.bounds[cuts], self.least) or not within_limit(judged):
            return solve(problem, budget, objective=self.objective, hints=(schedule,))
        seconds = time.monotonic() - begin
        bound = Bound(max(self.bounds[cuts], self.least), "analytic")
        return PipelineSolution(judged, self.objective, bound, (Attempt(str(rule), value, seconds),), seconds)

    def proven(self, solved: dict[Cuts, PipelineSolution]) -> Bound:
        """What no cuts undercut: those that have no bound of their own, and all that have."""
        known = self.bounds | {cuts: max(self.bounds[cuts], one.bound.value) for cuts, one in solved.items()}
        return Bound(max(self.least, min(self.others, *known.values())), "analytic")


def _impossible(line: Line) -> Infeasible | OptionError:
    """What to raise where no cuts are possible."""
    free = Line(line.layers, line.placement, line.microbatches)
    if Chain(free).bound >= NEVER or line.memory_limit is None:
        name, tied = next(iter(line.ties.items()))
        return OptionError(
            f"layers {', '.join(line.layers[index].name for index in tied)} share {name!r}, and no cuts leave them on "
            f"one rank with the placement {list(line.placement)}",
            hint="untie the weights, or use a placement whose first and last stage are on one rank, such as 'v'",
        )
    required, available = _least_bytes(line), max(line.memory_limit)
    return Infeasible(
        f"no cuts of {len(line.layers)} layers keep {list(line.memory_limit)} bytes on the ranks of {line.name!r}; "
        f"what is resident with one microbatch fits {required}",
        required_bytes=required,
        available_bytes=available,
        hint="raise the limit, use more ranks, recompute or offload activations",
    )


def _least_bytes(line: Line) -> int:
    """A limit of all ranks that some cuts keep: the least with one stage a rank, that of even cuts otherwise."""
    names = ("parameter_bytes", "until_input_gradient_bytes", "until_weight_gradient_bytes")
    held = np.sum([line.sums[name] for name in names], axis=0)
    if len(line.placement) > line.ranks:
        own = [0] * line.ranks
        for (first, end), rank in zip(line.bounds_of(even(line)), line.placement, strict=True):
            own[rank] += int(held[end] - held[first])
        return max(own)
    least = np.where(np.arange(len(held)) == 0, 0, NEVER)
    for _ in line.placement:
        stage = np.maximum(least[:, None], held[None, :] - held[:, None])
        least = np.where(np.arange(len(held))[:, None] < np.arange(len(held))[None, :], stage, NEVER).min(axis=0)
    return int(least[-1])
