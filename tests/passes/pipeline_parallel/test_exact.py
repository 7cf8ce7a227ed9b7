"""Constraint programming finds what trying all orders finds, and never claims more."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import assume, given, settings

from opweave.compiler.pipeline import Budget, Progress
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel.bounds import lower_bound
from opweave.passes.pipeline_parallel.exact import solve_exact
from opweave.passes.pipeline_parallel.solution import Bound, Objective, value_of, within_limit
from tests.passes.pipeline_parallel.every_order import best_of_all, problems

UNIT = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)


def plain(problem: PipelineProblem) -> bool:
    """Whether the model is the schedules' language: nothing runs beside, and nothing takes no time."""
    stages = (problem.stages[index] for route in problem.routes for index in route.stages)
    shards = problem.vocabulary
    timed_shards = shards is None or min(*shards.output_ns, *shards.gradient_ns) > 0
    return timed_shards and all(
        not stage.offloaded_bytes
        and min(stage.forward_ns, stage.input_gradient_ns, stage.weight_gradient_ns, stage.whole_backward_ns) > 0
        for stage in stages
    )


@pytest.mark.parametrize("objective", ["makespan", "span"])
@settings(max_examples=50, deadline=None)
@given(problems())
def test_as_good_as_all_orders(objective: Objective, problem: PipelineProblem) -> None:
    best = best_of_all(problem, objective, most=1500)
    assume(best is not None)
    assert best is not None
    budget = Budget.of_seconds(60, deterministic=True)
    try:
        schedule, bound = solve_exact(problem, objective, budget, bound=Bound(0, "analytic"))
    except Infeasible:
        assert best < 0
        return
    if best < 0:  # what takes no time holds no bytes in the model, but does in a schedule
        assert schedule is None
        assert not plain(problem)
        return
    assert bound.value <= best
    if schedule is not None:
        assert within_limit(timed(schedule))
        assert value_of(timed(schedule), objective) >= best
    if objective == "makespan" and plain(problem):
        assert schedule is not None
        assert value_of(timed(schedule), objective) == bound.value == best


@pytest.mark.parametrize(
    ("placement", "limit", "best"), [("loop", 4, 27), ("loop", 3, 31), ("loop", 2, 41), ("v", 8, 51)]
)
def test_proves_known_optima(placement: str, limit: int, best: int) -> None:
    """Four ranks, eight microbatches, all times 1: optima that another model of the problem had proved."""
    ranks = placed(placement, 4, 2 if placement == "v" else 1)
    problem = uniform(UNIT, ranks, 8, memory_limit=limit)
    heard: list[Progress] = []
    budget = Budget.of_seconds(60, listen=heard.append, workers=1)
    schedule, bound = solve_exact(problem, "makespan", budget, bound=lower_bound(problem))
    assert schedule is not None
    assert timed(schedule).makespan_ns == bound.value == best
    assert heard[-1].incumbent == heard[-1].bound == best


def test_hint_is_only_improved() -> None:
    """A hint at the bound is left alone at once; one that is not gives way to something better; others are refused."""
    problem = uniform(UNIT, placed("loop", 4), 8, memory_limit=3)
    budget = Budget.of_seconds(60, workers=1)
    found, bound = solve_exact(problem, "makespan", budget, bound=lower_bound(problem))
    assert found is not None
    best = timed(found)
    assert solve_exact(problem, "makespan", budget, hint=best, bound=bound) == (None, bound)
    again, proved = solve_exact(problem, "makespan", budget, hint=best, bound=lower_bound(problem))
    assert (again, proved) == (None, bound)
    with pytest.raises(OptionError, match="hint"):
        solve_exact(uniform(UNIT, placed("loop", 4), 7), "makespan", budget, hint=best, bound=bound)


def test_rounded_time_keeps_the_bound_valid() -> None:
    """In 40 steps instead of some 300 the bound is lower, never higher, and the schedule is judged on exact times."""
    stage = Stage(0, 11, 10, 7, until_weight_gradient_bytes=1, forward_send_ns=1, backward_send_ns=1)
    problem = uniform(stage, placed("loop", 4), 6, memory_limit=3)
    budget = Budget.of_seconds(60, workers=1)
    exact, bound = solve_exact(problem, "makespan", budget, bound=Bound(0, "analytic"))
    rough, rough_bound = solve_exact(problem, "makespan", budget, bound=Bound(0, "analytic"), steps=40)
    assert exact is not None
    assert rough is not None
    assert rough_bound.value <= bound.value == timed(exact).makespan_ns <= timed(rough).makespan_ns


def test_same_answer_every_time_where_asked_for() -> None:
    """Work decides when a deterministic search ends, not clocks."""
    problem = uniform(UNIT, placed("loop", 4), 6, memory_limit=3)
    first, second = (
        solve_exact(problem, "makespan", Budget.of_seconds(600, deterministic=True), bound=Bound(0, "cp"), effort=0.3)
        for _ in range(2)
    )
    assert first == second


def test_told_to_stop_it_returns_the_best_so_far() -> None:
    """Ctrl-C while the solver runs."""
    stage = Stage(0, 1103, 1009, 701, until_input_gradient_bytes=2, until_weight_gradient_bytes=3)
    problem = uniform(stage, placed("v", 8, 2), 12, memory_limit=60)
    stop = threading.Event()
    budget = Budget.of_seconds(600, stop=stop, listen=lambda told: stop.set() if told.incumbent else None)
    begin = time.monotonic()
    schedule, bound = solve_exact(problem, "makespan", budget, bound=lower_bound(problem))
    assert schedule is not None
    assert within_limit(timed(schedule))
    assert bound.value <= timed(schedule).makespan_ns
    assert time.monotonic() - begin < 60


def test_says_what_rank_lacks_how_much() -> None:
    """Two stages on a rank, each with three bytes, do not fit in five."""
    stage = Stage(0, 1, 1, 1, until_input_gradient_bytes=1, until_weight_gradient_bytes=2)
    problem = uniform(stage, placed("v", 2, 2), 2, memory_limit=5)
    with pytest.raises(Infeasible, match="6 bytes on rank 0, which has 5") as caught:
        solve_exact(problem, "makespan", Budget.of_seconds(60, workers=1), bound=lower_bound(problem))
    assert (caught.value.required_bytes, caught.value.available_bytes) == (6, 5)


def test_shards_that_take_longer_than_all_stages_leave_room_for_what_they_hold() -> None:
    """All bounds of the model are behind its ends: a schedule in hand is never refused for a shard held for long."""
    stage = Stage(0, 0, 0, 0, None, 1, 5, offloaded_bytes=4, offload_ns=3, reload_ns=1, reduce_ns=2)
    shards = Vocabulary((3,), (3,), shard_bytes=3)
    problem = PipelineProblem(1, (stage,), (Route((0,), 1),), (18,), shards)
    orders = (tuple(map(Action.of, ("0F0", "0OFFLOAD0", "0S0", "0RELOAD0", "0I0", "0W0", "0T0"))),)
    hint = timed(PipelineSchedule(problem, orders, "by hand"))
    assert hint.makespan_ns == 7
    found, bound = solve_exact(problem, "makespan", Budget.of_seconds(20, workers=1), hint=hint, bound=Bound(0, "cp"))
    assert (found, bound.value) == (None, 7)
