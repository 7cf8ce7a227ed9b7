"""The partition of least time within a limit, by integer programming."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pulp

from ...compiler.partition import Partition, PartitionProblem
from ...compiler.pipeline import Budget, Progress
from ...errors import Infeasible, ModelError, OptionError
from .._solver.highs import Solution, less_tolerances, solve, whole_units
from ._greedy import better, keep_what_is_read, tidied, without_host
from ._model import Model, Saved

__all__ = ["IlpPartition"]

MAX_NODES = 10_000  # the search tree in deterministic mode, where no clock may decide
FINE = 1_000_000  # units that the first answer takes: what HiGHS resolves
MAX_ROUNDS = 12  # how often moments before which loads are waited for are added to the model
LEAST_S = 10.0  # for the fewest bytes: a network problem, solved in a fraction of that


@dataclass(frozen=True)
class IlpPartition:
    """Keep, offload, or compute again each value that the backward half of a training step needs.

    *Given* a ``PartitionProblem`` and a limit for what is kept. *Result*: the ``Partition`` that adds the least time,
    with a bound over all partitions; never more than the best of the greedy answer and of ``starts``. Among those that
    it finds to be equal it saves the fewest bytes, one offloaded counting as two kept. In deterministic mode the search
    is limited by nodes; if the deadline comes first nevertheless, another run may differ.
    """

    @property
    def name(self) -> str:
        """Path name of the method."""
        return "partition/ilp"

    def choose(
        self, problem: PartitionProblem, limit_bytes: int, budget: Budget, starts: Iterable[Saved] = ()
    ) -> Partition:
        """The least time within ``limit_bytes``; ``starts`` are answers, as kept and offloaded values, to begin with.

        Raises:
            Infeasible: more bytes have to stay; it states the fewest that must.
            ModelError: a value can neither be saved nor computed again.
            OptionError: a negative limit.
        """
        begin = time.monotonic()
        if limit_bytes < 0:
            raise OptionError(f"a limit of {limit_bytes} bytes for kept values was asked for; it takes 0 or more")
        starts = (*starts, *self._on_device(problem, limit_bytes, budget, starts))
        start = self._start(problem, limit_bytes, budget, starts)
        best = Partition(problem, limit_bytes, *start, bound_ps=0)
        moments = _waits(problem, [start])
        for _ in range(MAX_ROUNDS):
            model = Model(problem, limit_bytes, max(1, best.recount.total_ps // FINE), moments)
            solution = self._solve(model.least_time(), model, best, budget.share(0.8))
            best, answers = _better(best, model, solution, _bound_ps(model, solution))
            more = moments | _waits(problem, answers)
            if more == moments or best.bound_ps == best.recount.total_ps or budget.remaining_s <= 0:
                break
            moments = more
        if budget.remaining_s > 0:
            model = Model(problem, limit_bytes, model.unit_ps, moments)
            solution = self._solve(model.least_saved(best.recount.total_ps), model, best, budget)
            best, _ = _better(best, model, solution, 0)
        return replace(best, seconds=round(time.monotonic() - begin, 3))

    def _solve(self, program: pulp.LpProblem, model: Model, best: Partition, budget: Budget) -> Solution:
        begin = time.monotonic()

        def tell(incumbent: float | None, bound: float | None) -> None:
            if program.name == "least_time":
                told = [None if value is None else round(value * model.unit_ps / 1000) for value in (incumbent, bound)]
                budget.listen(Progress(self.name, time.monotonic() - begin, *told))

        return solve(
            program,
            budget,
            start=model.start((best.kept, best.offloaded), best.recount.again),
            absolute_gap=0.9,
            max_nodes=MAX_NODES if budget.deterministic else None,
            listen=tell,
        )

    def least_bytes(self, problem: PartitionProblem, budget: Budget) -> tuple[int, Saved]:
        """The fewest bytes that any partition keeps, and one that does: a network problem, not cut short by time.

        Raises:
            ModelError: a value can neither be saved nor computed again.
        """
        model = Model(problem, 0)
        own = replace(budget, deadline=time.monotonic() + max(LEAST_S, budget.remaining_s), stop=threading.Event())
        solution = solve(model.least_bytes(), own, absolute_gap=0.9)
        if solution.status == "infeasible":
            raise ModelError(_lost(problem))
        saved = model.saved(solution.values)
        count = problem.recount(*saved)
        if count is None:
            raise ModelError(_lost(problem))
        return count.kept_bytes, saved

    def _on_device(
        self, problem: PartitionProblem, limit_bytes: int, budget: Budget, starts: Iterable[Saved]
    ) -> tuple[Saved, ...]:
        """The best answer that offloads nothing: found much sooner, and where the search with host memory begins."""
        if not any(value.can_offload for value in problem.values):
            return ()
        kept_only = [answer for answer in starts if not answer[1]]
        try:
            found = self.choose(without_host(problem), limit_bytes, budget.share(0.3), kept_only)
        except (Infeasible, ModelError):
            return ()
        return ((found.kept, found.offloaded),)

    def _start(self, problem: PartitionProblem, limit_bytes: int, budget: Budget, starts: Iterable[Saved]) -> Saved:
        answers = [*starts, keep_what_is_read(problem)]
        answers += [tidied(problem, limit_bytes, answer) for answer in answers]
        found = better(problem, limit_bytes, answers)
        if found is not None:
            return found
        least, saved = self.least_bytes(problem, budget)
        if least > limit_bytes:
            raise Infeasible(
                f"at least {least} bytes have to stay on the device between the forward and the backward half, "
                f"and the limit leaves {limit_bytes}",
                required_bytes=least,
                available_bytes=limit_bytes,
                hint="what is kept then cannot be computed again or offloaded; raise the limit",
            )
        return better(problem, limit_bytes, (saved, tidied(problem, limit_bytes, saved))) or saved


def _better(best: Partition, model: Model, solution: Solution, bound_ps: int) -> tuple[Partition, list[Saved]]:
    """The better one of ``best`` and what the solver found, put in order, and all that was looked at."""
    answers = [(best.kept, best.offloaded)]
    if solution.values:
        found = model.saved(solution.values)
        answers += [found, tidied(best.problem, best.limit_bytes, found)]
    chosen = better(best.problem, best.limit_bytes, answers) or answers[0]
    improved = Partition(best.problem, best.limit_bytes, *chosen, bound_ps=0)
    bound_ps = min(max(best.bound_ps, bound_ps), improved.recount.total_ps)
    return replace(improved, bound_ps=bound_ps), answers


def _waits(problem: PartitionProblem, answers: Iterable[Saved]) -> frozenset[int]:
    """The moments that decide how long loads are waited for in ``answers``."""
    moments = (problem.longest_wait(*answer) for answer in answers)
    return frozenset(moment for moment in moments if moment is not None)


def _bound_ps(model: Model, solution: Solution) -> int:
    """What the solver has proven, in whole picoseconds."""
    columns = len(solution.values)
    if model.unit_ps == 1:
        return whole_units(solution.bound, columns)
    bound = less_tolerances(solution.bound, columns) * model.unit_ps
    return max(0, math.floor(bound)) if math.isfinite(bound) else 0


def _lost(problem: PartitionProblem) -> str:
    """Which value stands in the way."""
    for v in reversed(range(len(problem.values))):
        value = problem.values[v]
        if v in problem.needed and not value.can_keep and not problem.steps[value.producer or 0].repeatable:
            return f"the backward half needs {value.name!r}, which can neither be saved nor computed again"
    return "the backward half needs what can neither be saved nor computed again"
