"""Two pipelines in opposite directions over two copies of the model, and how many microbatches go each way.

Chimera (Li and Hoefler, arXiv 2107.06925): rank r has stage s of the one copy and, of the other, the stage that rank
p - 1 - r has of the first. Each direction fills bubbles of the other; what is resident doubles.
"""

from __future__ import annotations

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem, Route
from ...errors import OptionError
from ._choosing import Choice, best_choice
from .solution import Objective, PipelineSolution

__all__ = ["both_ways", "choose_directions", "one_route"]

_SPLITS = 4  # of the microbatches over the two directions: half and half first, then ever less even


def both_ways(problem: PipelineProblem, back: int) -> PipelineProblem:
    """``problem`` with a second copy of its stages, mirrored over the ranks, through which ``back`` microbatches go.

    Its stages come behind the first copy's, in the same order. Each copy's gradients are reduced by themselves: give
    stages the ``reduce_ns`` that summing the two copies takes.

    Raises:
        OptionError: the problem has more than one route, stages beside it, a vocabulary, or not so many microbatches.
    """
    route = one_route(problem)
    if problem.vocabulary is not None:
        raise OptionError("shards of a vocabulary are on all ranks already: they have no second copy")
    if not 0 < back < route.microbatches:
        raise OptionError(f"{back} of {route.microbatches} microbatches go back; at least one goes each way")
    count = len(problem.stages)
    mirrored = [msgspec.structs.replace(stage, rank=problem.ranks - 1 - stage.rank) for stage in problem.stages]
    again = tuple(count + stage for stage in route.stages)
    routes = (
        msgspec.structs.replace(route, microbatches=route.microbatches - back),
        msgspec.structs.replace(route, stages=again, microbatches=back),
    )
    return msgspec.structs.replace(
        problem,
        stages=(*problem.stages, *mirrored),
        routes=routes,
        name=f"{problem.name}, {back} of {route.microbatches} microbatches back",
    )


def choose_directions(
    problem: PipelineProblem, budget: Budget, *, objective: Objective = "makespan"
) -> PipelineSolution:
    """The best of one pipeline, and of two in opposite directions with the microbatches divided in some way.

    The bound holds for one direction and for the divisions that were tried, from half and half on.

    Raises:
        Infeasible: the memory limit cannot be kept, not even with one copy.
        OptionError: as ``both_ways``.
    """
    route = one_route(problem)
    half = route.microbatches // 2
    choices = [Choice("one way", problem, first=True)]
    choices += [
        Choice(f"{back} of {route.microbatches} back", both_ways(problem, back))
        for back in range(half, max(0, half - _SPLITS), -1)
        if back
    ]
    return best_choice(choices, budget, objective=objective)


def one_route(problem: PipelineProblem) -> Route:
    """The route of a problem that has one, through all of its stages. Raises OptionError."""
    if len(problem.routes) != 1 or len(problem.routes[0].stages) != len(problem.stages):
        raise OptionError(
            f"pipeline {problem.name!r} has {len(problem.routes)} routes over {len(problem.stages)} stages",
            hint="this choice is for one route through all stages",
        )
    return problem.routes[0]
