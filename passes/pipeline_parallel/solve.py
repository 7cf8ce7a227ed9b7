"""The best schedule of a pipeline problem within its memory limit, and how far from optimal it may be.

A bound first, then a portfolio: the schedules that have names, list schedules by many rules, templates that repeat,
local search from the best of them, and where that is small enough an exact model. It ends as soon as a schedule meets
the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import PipelineSchedule
from ...errors import Infeasible, OptionError
from ._progress import Search
from .named import fitting, named
from .solution import Objective, PipelineSolution

if TYPE_CHECKING:
    from .list_schedule import Workshop

    Method = Callable[[Search, Workshop], None]

__all__ = ["solve"]

EXACT_NODES = 1200  # the most tasks that the exact model is tried with


def solve(
    problem: PipelineProblem,
    budget: Budget,
    *,
    objective: Objective = "makespan",
    hints: Iterable[PipelineSchedule] = (),
) -> PipelineSolution:
    """The best schedule of ``problem`` found within ``budget``.

    Never worse than the best schedule of ``named`` that fits the problem and keeps its memory limit, nor than a hint
    that does; but told to stop, it ends with the first that does. ``hints`` are schedules of the same problem to start
    from.

    Raises:
        Infeasible: a rank cannot hold what a single microbatch needs there.
        OptionError: a hint is no schedule of this problem.
    """
    from .list_schedule import workshop_for  # numba, which takes a second to load

    search = Search(problem, budget, objective)
    shop = workshop_for(problem)
    _check_limit(problem, shop.least.tolist())
    for hint in hints:
        search.offer(PipelineSchedule(problem, hint.orders, hint.method or "hint"))
    for name in fitting(problem):
        if search.best is not None and budget.stop.is_set():
            break  # all of them take long where there are many ranks
        try:
            schedule = named(name, problem, objective=objective)
        except OptionError:  # it heeds the limit, and cannot keep it
            search.note(name, None)
        else:
            search.offer(schedule)
    for method, share in _plan(shop):
        if not search.done():
            with search.share(share):
                method(search, shop)
    return search.solution()


def _plan(shop: Workshop) -> Iterator[tuple[Method, float]]:
    """Methods in turn, each with its share of the time that is left."""
    from .improve import improve
    from .list_schedule import construct
    from .templates import repeat

    yield construct, 0.5
    if shop.lanes.nodes <= EXACT_NODES:
        yield improve, 0.3
        yield prove, 0.5
    yield repeat, 0.3
    yield improve, 1.0


def prove(search: Search, _: Workshop) -> None:
    """Let CP-SAT find a better schedule, or a better bound, starting from the best so far."""
    from .exact import solve_exact

    found, bound = solve_exact(search.problem, search.objective, search.budget, hint=search.best, bound=search.bound)
    search.raise_bound(bound)
    if found is None:
        search.note("cp", None)
    else:
        search.offer(found)


def _check_limit(problem: PipelineProblem, least: list[int]) -> None:
    if problem.memory_limit is None:
        return
    for rank, (limit, resident, need) in enumerate(
        zip(problem.memory_limit, problem.resident_bytes, least, strict=True)
    ):
        if resident + need > limit:
            raise Infeasible(
                f"rank {rank} of pipeline {problem.name!r} may hold {limit} bytes; one microbatch alone needs {need} "
                f"there beside {resident} bytes that are resident, {resident + need} in all",
                required_bytes=resident + need,
                available_bytes=limit,
                hint="raise the limit, place fewer stages on the rank, recompute or offload activations",
            )
