"""Which rank has which stage: a loop, a V, a wave, both ways, or any other placement, whichever schedules best.

Placement decides how early each rank has something to do, how much, and what it holds: a loop holds most, a V least
(Qi et al., arXiv 2405.15362), and stages that differ want neither. Placements with names are improved by exchanging
stages. Of few stages every placement is then looked at that is not ruled out by the work of its ranks; for more there
is a bound that holds for all placements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.pipelining.placement import placed
from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import PipelineSchedule
from ...errors import Infeasible
from ._choosing import Choice, best_choice, quick
from ._placements import canonical, placement_bound, placements_below
from .bidirectional import both_ways, one_route
from .solution import Bound, Objective, PipelineSolution, value_of

__all__ = ["choose_placement", "named_placements", "on_ranks"]

_ALL = 300  # placements that are all bounded and rated
_TRIED = 200  # placements that a search rates, where clocks may not decide
_KEPT = 3  # of those that it found


def on_ranks(problem: PipelineProblem, ranks: Sequence[int], name: str = "") -> PipelineProblem:
    """``problem`` with its stages on ``ranks``. Raises OptionError where there is no such rank."""
    stages = tuple(msgspec.structs.replace(stage, rank=rank) for stage, rank in zip(problem.stages, ranks, strict=True))
    name = name or " ".join(map(str, ranks))
    return msgspec.structs.replace(problem, stages=stages, name=f"{problem.name}, {name}")


def named_placements(ranks: int, stages: int) -> dict[str, tuple[int, ...]]:
    """The placements of ``stages`` stages that have a name; none where they do not go up in ``ranks`` ranks."""
    if stages % ranks:
        return {}
    chunks = stages // ranks
    if chunks == 1:
        return {"loop": placed("loop", ranks)}
    turned = "v" if chunks == 2 else "wave"
    return {"loop": placed("loop", ranks, chunks), turned: placed(turned, ranks, chunks)}


def choose_placement(
    problem: PipelineProblem, budget: Budget, *, objective: Objective = "makespan", copies: bool = False
) -> PipelineSolution:
    """The best schedule found for any placement of ``problem``'s stages that leaves no rank without one.

    The placement that the problem has counts as well. The solution's problem says what was chosen. With ``copies`` two
    copies of the model in opposite directions count too, with half of the microbatches each. The bound holds for every
    placement of one copy that counts, and for those of two that are mirror images of the placements with names.

    Raises:
        Infeasible: the memory limit is kept with none of the placements that were tried.
        OptionError: the problem has more than one route, or stages beside it.
    """
    begin = time.monotonic()
    route = one_route(problem)
    known = named_placements(problem.ranks, len(problem.stages))
    choices = [Choice(name, on_ranks(problem, ranks, name), first=True) for name, ranks in known.items()]
    if _ranks(problem) not in known.values():
        choices.insert(0, Choice("as given", problem, first=True))
    best, found = _searched(problem, choices, budget.share(0.3), objective)
    taken = {_ranks(choice.problem) for choice in choices}
    choices += [choice for choice in found if _ranks(choice.problem) not in taken]
    left = placements_below(problem, best, objective, most=_ALL)
    bound: Bound | None = None
    if left is None:
        bound = placement_bound(problem, objective, budget.share(0.2))
    else:
        taken |= {_ranks(choice.problem) for choice in found}
        choices += [Choice(_text(ranks), on_ranks(problem, ranks)) for ranks in left if ranks not in taken]
    if copies and route.microbatches > 1:
        choices += [
            Choice(f"{name}, both ways", both_ways(on_ranks(problem, ranks, name), route.microbatches // 2))
            for name, ranks in known.items()
        ]
    solution = best_choice(choices, budget, objective=objective, most_solved=_KEPT, others=bound)
    return replace(solution, seconds=time.monotonic() - begin)


def _ranks(problem: PipelineProblem) -> tuple[int, ...]:
    return tuple(stage.rank for stage in problem.stages)


def _text(ranks: Sequence[int]) -> str:
    return " ".join(map(str, ranks))


class _Search:
    """Placements and what a few list schedules of each reach; each is looked at once."""

    def __init__(self, problem: PipelineProblem, objective: Objective) -> None:
        self.problem, self.objective = problem, objective
        self.values: dict[tuple[int, ...], float] = {}
        self.schedules: dict[tuple[int, ...], PipelineSchedule] = {}

    def value(self, ranks: tuple[int, ...]) -> float:
        if ranks not in self.values:
            try:
                line = quick(on_ranks(self.problem, ranks), self.objective, rules=3)
            except Infeasible:
                line = None
            self.values[ranks] = value_of(line, self.objective) if line else float("inf")
            if line:
                self.schedules[ranks] = line.schedule
        return self.values[ranks]

    def hint(self, ranks: tuple[int, ...]) -> Callable[[], Iterable[PipelineSchedule]]:
        return lambda: (self.schedules[ranks],)


def _searched(
    problem: PipelineProblem, choices: Sequence[Choice], budget: Budget, objective: Objective
) -> tuple[float, list[Choice]]:
    """The best placements that exchanging stages leads to, from each of ``choices`` and from one by weight.

    First what the best of them reaches, infinite if none keeps the limit.
    """
    search = _Search(problem, objective)
    starts = [_ranks(choice.problem) for choice in choices]
    for start in [*starts, _by_weight(problem)]:
        best: tuple[int, ...] | None = start
        while best is not None:
            best = _better(search, best, budget)
    found = sorted(search.schedules, key=search.value)
    kept = [ranks for ranks in found if ranks not in starts][:_KEPT]
    choices = [Choice(_text(ranks), on_ranks(problem, ranks), search.hint(ranks)) for ranks in kept]
    return (search.value(found[0]) if found else float("inf")), choices


def _better(search: _Search, ranks: tuple[int, ...], budget: Budget) -> tuple[int, ...] | None:
    value = search.value(ranks)
    for other in _neighbours(search.problem, ranks):
        if budget.halted() or len(search.values) >= _TRIED:
            return None
        if search.value(canonical(search.problem, other)) < value:
            return canonical(search.problem, other)
    return None


def _neighbours(problem: PipelineProblem, ranks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Two stages exchanged, near ones first; then one stage moved."""
    pairs = sorted(combinations(range(len(ranks)), 2), key=lambda pair: pair[1] - pair[0])
    for one, other in pairs:
        if ranks[one] != ranks[other]:
            changed = list(ranks)
            changed[one], changed[other] = ranks[other], ranks[one]
            yield tuple(changed)
    for stage, rank in product(range(len(ranks)), range(problem.ranks)):
        if rank != ranks[stage] and ranks.count(ranks[stage]) > 1:
            yield (*ranks[:stage], rank, *ranks[stage + 1 :])


def _by_weight(problem: PipelineProblem) -> tuple[int, ...]:
    """The heaviest stage first, each to the rank with least work by then; ranks that are alike in the stages' order."""
    loads = [0] * problem.ranks
    ranks = [0] * len(problem.stages)
    for stage in sorted(range(len(ranks)), key=lambda stage: (-problem.stages[stage].work_ns, stage)):
        least = min(range(problem.ranks), key=lambda rank: (loads[rank], rank))
        ranks[stage] = least
        loads[least] += problem.stages[stage].work_ns
    return canonical(problem, tuple(ranks))
