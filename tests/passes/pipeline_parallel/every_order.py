"""All schedules of a tiny pipeline problem: every order of every rank, backward passes whole or in halves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.pipelining.tasks import tasks_of
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel.solution import Objective, value_of, within_limit

__all__ = ["best_of_all", "every_schedule", "orders_of_rank", "problems"]

HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)


def orders_of_rank(problem: PipelineProblem, rank: int, most: int) -> list[tuple[Action, ...]] | None:
    """Every order of the rank's actions that follows precedence within a rank; ``None`` if there are more than most."""
    before: dict[Action, set[Action]] = {}
    for microbatch, route in enumerate(problem.route_of):
        tasks = tasks_of(problem, route)
        above: list[set[Action]] = []
        for task in tasks:
            direct = {Action(tasks[i].stage, tasks[i].kind, microbatch) for i, _ in task.after}
            above.append(direct.union(*(above[i] for i, _ in task.after)))
            before[Action(task.stage, task.kind, microbatch)] = above[-1]
    local = {
        Action(task.stage, task.kind, microbatch)
        for microbatch, route in enumerate(problem.route_of)
        for task in tasks_of(problem, route)
        if task.rank == rank
    }
    orders: list[tuple[Action, ...]] = []

    def extend(done: tuple[Action, ...], left: frozenset[Action]) -> bool:
        if not left:
            orders.append(done)
            return len(orders) <= most
        for action in sorted(left):
            if before[action] & left:
                continue
            if not extend((*done, action), left - {action}):
                return False
            if action.kind is ActionKind.INPUT_GRADIENT:
                second = Action(action.stage, ActionKind.WEIGHT_GRADIENT, action.microbatch)
                whole = Action(action.stage, ActionKind.BACKWARD, action.microbatch)
                if not extend((*done, whole), left - {action, second}):
                    return False
        return True

    return orders if extend((), frozenset(local)) else None


def every_schedule(problem: PipelineProblem, most: int = 4000) -> Iterator[TimedSchedule] | None:
    """Every schedule within the memory limit; ``None`` if there are more than ``most`` to try."""
    orders = [orders_of_rank(problem, rank, most) for rank in range(problem.ranks)]
    number = 1
    for of_rank in orders:
        if of_rank is None:
            return None
        number *= len(of_rank)
    return _tried(problem, [of_rank or [] for of_rank in orders]) if number <= most else None


def _tried(problem: PipelineProblem, orders: list[list[tuple[Action, ...]]]) -> Iterator[TimedSchedule]:
    for chosen in itertools.product(*orders):
        try:
            found = timed(PipelineSchedule(problem, chosen))
        except OptionError:
            continue
        if within_limit(found):
            yield found


def best_of_all(problem: PipelineProblem, objective: Objective, most: int = 4000) -> int | None:
    """The least objective of all schedules, -1 if none keeps the limit; ``None`` if there are too many to try."""
    every = every_schedule(problem, most)
    if every is None:
        return None
    return min((value_of(found, objective) for found in every), default=-1)


def stages(rank: int) -> st.SearchStrategy[Stage]:
    """A stage with any of the things that a stage can have, in small figures."""
    return st.builds(
        _stage,
        st.just(rank),
        st.tuples(*[st.integers(0, 4)] * 3),
        st.one_of(st.none(), st.integers(0, 8)),
        st.tuples(*[st.integers(0, 2)] * 3),
        st.tuples(*[st.integers(0, 3)] * 2),
        st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 3)),
        st.sampled_from((0, 0, 2, 5)),
        st.integers(0, 1),
    )


def _stage(
    rank: int,
    times: tuple[int, int, int],
    backward: int | None,
    held: tuple[int, int, int],
    sends: tuple[int, int],
    offload: tuple[int, int, int],
    reduce: int,
    resident: int,
) -> Stage:
    return Stage(
        rank,
        *times,
        backward,
        *held,
        *sends,
        offloaded_bytes=min(offload[0], held[1]),
        offload_ns=offload[1],
        reload_ns=offload[2],
        reduce_ns=reduce,
        resident_bytes=resident,
    )


@st.composite
def problems(draw: st.DrawFn, most_actions: int = 12) -> PipelineProblem:
    """Problems of 1 to 3 ranks with every feature, small enough to try all orders of many of them."""
    ranks = draw(st.integers(1, 3))
    number = draw(st.integers(1, 3))
    own = tuple(draw(stages(draw(st.integers(0, ranks - 1)))) for _ in range(number))
    routes: list[Route] = []
    actions = 0
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        through = draw(st.permutations(range(number)))[: draw(st.integers(1, number))]
        microbatches = draw(st.integers(1, 3))
        actions += microbatches * len(through) * 3
        if actions <= most_actions or not routes:
            routes.append(Route(tuple(through), min(microbatches, max(1, most_actions // (3 * len(through))))))
    vocabulary = draw(st.one_of(st.none(), st.none(), vocabularies(ranks)))
    limit = draw(st.one_of(st.none(), st.tuples(*[st.integers(3, 12)] * ranks)))
    return PipelineProblem(ranks, own, tuple(routes), limit, vocabulary)


def vocabularies(ranks: int) -> st.SearchStrategy[Vocabulary]:
    """Shards on so many ranks."""
    times = st.tuples(*[st.integers(0, 3)] * ranks)
    return st.builds(
        Vocabulary, times, times, st.integers(0, 2), st.integers(0, 2), st.integers(1, 2), st.integers(0, 1)
    )
