"""All placements of stages on ranks, and what no schedule undercuts with any of them."""

from __future__ import annotations

from collections.abc import Iterator

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem
from .solution import Bound, Objective

__all__ = ["alike", "all_placements", "average_bound", "canonical", "placement_bound", "placements_below"]

_SEEN = 40_000  # placements that are looked through
_EFFORT = 5.0  # deterministic seconds of CP-SAT
_LARGEST = 1_000  # stages times ranks that it is given


def alike(problem: PipelineProblem) -> bool:
    """Whether ranks may be exchanged: all have the same limit, and shards of the vocabulary that take as long."""
    limits = problem.memory_limit or (0,)
    shards = problem.vocabulary
    pairs = set(zip(shards.output_ns, shards.gradient_ns, strict=True)) if shards else set()
    return len(set(limits)) == 1 and len(pairs) <= 1


def all_placements(problem: PipelineProblem) -> Iterator[tuple[int, ...]]:
    """Every placement that gives each rank a stage, or as many ranks as there are stages; ranks that are alike once.

    Of ranks that are alike the one with the earlier first stage has the lower number.
    """
    same = alike(problem)
    count, ranks = len(problem.stages), problem.ranks

    def extended(chosen: tuple[int, ...], used: frozenset[int]) -> Iterator[tuple[int, ...]]:
        if len(chosen) == count:
            yield chosen
            return
        missing = min(count, ranks) - len(used)
        for rank in range(min(len(used) + 1, ranks) if same else ranks):
            if rank in used and count - len(chosen) <= missing:
                continue
            yield from extended((*chosen, rank), used | {rank})

    yield from extended((), frozenset())


def canonical(problem: PipelineProblem, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The same placement with ranks that are alike numbered in the order of their first stages."""
    if not alike(problem):
        return ranks
    numbers: dict[int, int] = {}
    for rank in ranks:
        numbers.setdefault(rank, len(numbers))
    return tuple(numbers[rank] for rank in ranks)


def placements_below(
    problem: PipelineProblem, value: float, objective: Objective, *, most: int
) -> list[tuple[int, ...]] | None:
    """All placements that may be below ``value`` by the work of their ranks; ``None`` if there are more than ``most``.

    Also ``None`` where there are too many placements to look through.
    """
    heads = [0] * len(problem.stages) if objective == "span" else _heads(problem, 1)
    left: list[tuple[int, ...]] = []
    for seen, ranks in enumerate(all_placements(problem)):
        if seen >= _SEEN or len(left) > most:
            return None
        ends: dict[int, int] = {}
        for stage in problem.routes[0].stages:
            work = problem.microbatches * problem.stages[stage].work_ns
            rank = ranks[stage]
            ends[rank] = ends[rank] + work if rank in ends else heads[stage] + work
        if max(end + problem.microbatches * _shards(problem, rank) for rank, end in ends.items()) < value:
            left.append(ranks)
    return left if len(left) <= most else None


def placement_bound(problem: PipelineProblem, objective: Objective, budget: Budget) -> Bound:
    """What no schedule undercuts, whichever rank has which stage.

    A rank works no sooner than its first stage's F can, behind the forwards before it and as many sends as there were
    ranks, and then for as long as its stages take. The least longest of these over all placements, within which ranks
    hold what is resident, is found by CP-SAT; what it has proved by the end of the budget holds. It starts from
    averages, which are all there is where stages and ranks are too many for it.
    """
    averaged = Bound(average_bound(problem, objective), "analytic")
    if len(problem.stages) * problem.ranks > _LARGEST:
        return averaged
    proved = _proved(problem, objective, averaged.value, budget)
    return Bound(proved, "cp") if proved > averaged.value else averaged


def average_bound(problem: PipelineProblem, objective: Objective) -> int:
    """What no schedule undercuts, whichever rank has which stage, by counting.

    Of ``u`` ranks that have stages, sorted by their first ones, the k-th begins behind k forwards and k sends at least.
    Then the longest is no less than the average; and the last has c stages, so that another has an equal part of the
    others, rounded up, each as short as the shortest. The least over all ``u`` and c.
    """
    works = [stage.work_ns * problem.microbatches for stage in problem.stages]
    shards = sorted(_shards(problem, rank) * problem.microbatches for rank in range(problem.ranks))
    cheapest = sorted(_sends(problem))
    forwards = [problem.stages[stage].forward_ns for stage in problem.routes[0].stages]
    span = objective == "span"
    heads = [0 if span else sum(forwards[:k]) + sum(cheapest[:k]) for k in range(min(problem.ranks, len(works)))]
    least = []
    for used in range(1, len(heads) + 1):
        average = -(-(sum(heads[:used]) + sum(works) + sum(shards[:used])) // used)
        least.append(max(average, _by_count(min(works), len(works), used, heads[used - 1]) + shards[0]))
    return max(min(least), max(works) + shards[0])


def _by_count(work: int, stages: int, ranks: int, head: int) -> int:
    """With ``ranks`` ranks, of which the last begins behind ``head``, and stages that take ``work`` each."""
    if ranks == 1:
        return head + stages * work
    counts = range(1, stages - ranks + 2)  # of the last
    return min(max(head + own * work, -(-(stages - own) // (ranks - 1)) * work) for own in counts)


def _proved(problem: PipelineProblem, objective: Objective, least: int, budget: Budget) -> int:
    """What CP-SAT proves by the end of the budget, from ``least`` on."""
    from ortools.sat.python import cp_model

    from ._cp_sat import minimised

    count, ranks = len(problem.stages), problem.ranks
    microbatches = problem.microbatches
    same = alike(problem)
    model = cp_model.CpModel()
    end = model.new_int_var(least, least + sum(problem.work_ns) + sum(_heads(problem, ranks)), "end")
    has = [[model.new_bool_var(f"{stage} on {rank}") for rank in range(ranks)] for stage in range(count)]
    first = [[model.new_bool_var(f"{stage} first on {rank}") for rank in range(ranks)] for stage in range(count)]
    for stage in range(count):
        model.add_exactly_one(has[stage])
        for rank in range(ranks):
            model.add_implication(first[stage][rank], has[stage][rank])
            model.add(has[stage][rank] <= sum(first[earlier][rank] for earlier in range(stage + 1)))
            if same and rank:
                model.add(has[stage][rank] <= sum(has[earlier][rank - 1] for earlier in range(stage)))
    for rank in range(ranks):
        model.add_at_most_one(first[stage][rank] for stage in range(count))
        heads = _heads(problem, rank if same else 1)
        if objective == "span":
            heads = [0] * count
        begin = sum(heads[stage] * first[stage][rank] for stage in range(count))
        work = sum(problem.stages[stage].work_ns * has[stage][rank] for stage in range(count))
        shards = _shards(problem, rank)
        model.add(end >= begin + microbatches * (work + shards))
        if problem.memory_limit is not None:
            resident = sum(problem.stages[stage].resident_bytes * has[stage][rank] for stage in range(count))
            model.add(resident <= problem.memory_limit[rank])
    model.minimize(end)
    outcome = minimised(model, budget, effort=_EFFORT, found=lambda read: None, bounded=lambda value: None)
    return least if outcome.status == "none" else max(least, round(outcome.bound))


def _heads(problem: PipelineProblem, changes: int) -> list[int]:
    """By stage, the least before its F where it is its rank's first: all forwards before it, and sends.

    There are at least ``changes`` sends by then, one of them to this stage; the others are the cheapest before it.
    """
    order = problem.routes[0].stages
    heads = [0] * len(problem.stages)
    done = 0
    for place, stage in enumerate(order):
        sends = _sends(problem)[:place]
        own = sends[-1:] if changes else []
        heads[stage] = done + sum(own) + sum(sorted(sends[:-1])[: max(0, changes - 1)])
        done += problem.stages[stage].forward_ns
    return heads


def _sends(problem: PipelineProblem) -> list[int]:
    route = problem.routes[0]
    return list(route.forward_send_ns) or [problem.stages[stage].forward_send_ns for stage in route.stages[:-1]]


def _shards(problem: PipelineProblem, rank: int) -> int:
    if problem.vocabulary is None:
        return 0
    return problem.vocabulary.output_ns[rank] + problem.vocabulary.gradient_ns[rank]
