"""The search for schedules: as good as all orders where there are few, never worse than a named one, never too late."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
from hypothesis import assume, given, settings

from opweave.compiler.pipeline import Budget, Progress
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.schedule import PipelineSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel.named import fitting, named
from opweave.passes.pipeline_parallel.solution import Objective, value_of, within_limit
from opweave.passes.pipeline_parallel.solve import solve
from tests.passes.pipeline_parallel.every_order import best_of_all, problems

UNIT = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)


@pytest.mark.parametrize("objective", ["makespan", "span"])
@settings(max_examples=12, deadline=None)
@given(problems(most_actions=9))
def test_never_better_than_all_orders_and_bounded_by_them(objective: Objective, problem: PipelineProblem) -> None:
    best = best_of_all(problem, objective, most=1500)
    assume(best is not None and best >= 0)
    assert best is not None
    found = solve(problem, Budget.of_seconds(0.3), objective=objective)
    assert within_limit(found.timed)
    assert found.bound.value <= best <= found.value == value_of(timed(found.timed.schedule), objective)


def test_finds_what_no_drawn_schedule_of_a_v_has() -> None:
    """Between V-Min (4 chunks, 59 slots) and V-Half (6, 53) there is room: 56 slots at 5, proved to be the least."""
    problem = uniform(UNIT, placed("v", 4, 2), 8, memory_limit=5)
    found = solve(problem, Budget.of_seconds(20, deterministic=True))
    assert found.value == 56
    assert max(found.timed.peak_bytes) == 5


@pytest.mark.parametrize(
    ("placement", "chunks", "limit"), [("loop", 1, 4), ("v", 2, 8), ("v", 2, 4), ("loop", 2, None)]
)
def test_never_worse_than_a_named_one(placement: str, chunks: int, limit: int | None) -> None:
    problem = uniform(
        Stage(0, 30, 29, 19, until_weight_gradient_bytes=1, forward_send_ns=1, backward_send_ns=1),
        placed(placement, 4, chunks),
        8,
        memory_limit=limit,
    )
    best = None
    for name in fitting(problem):
        try:
            judged = timed(named(name, problem))
        except OptionError:  # it keeps to the limit, or gives up
            continue
        if within_limit(judged):
            best = min(judged.makespan_ns, best or judged.makespan_ns)
    assert best is not None
    assert solve(problem, Budget.of_seconds(0.5)).value <= best


def test_starts_from_a_hint_and_keeps_it_if_nothing_is_better() -> None:
    problem = uniform(UNIT, placed("loop", 4), 8, memory_limit=4)
    best = solve(problem, Budget.of_seconds(5))
    hinted = solve(problem, Budget.of_seconds(0), hints=[best.timed.schedule])
    assert hinted.value == best.value
    with pytest.raises(OptionError):
        solve(problem, Budget.of_seconds(1), hints=[PipelineSchedule(problem, best.timed.schedule.orders[:2])])


def test_a_limit_that_no_schedule_keeps() -> None:
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=5, resident_bytes=7)
    problem = uniform(stage, placed("v", 2, 2), 4, memory_limit=23)
    with pytest.raises(Infeasible, match=r"rank 0 .* may hold 23 bytes.* 24 in all") as caught:
        solve(problem, Budget.of_seconds(1))
    assert (caught.value.required_bytes, caught.value.available_bytes) == (24, 23)
    just = msgspec.structs.replace(problem, memory_limit=(24, 24))
    assert solve(just, Budget.of_seconds(0.2)).timed.peak_bytes == (24, 24)


def test_the_same_again_when_deterministic() -> None:
    problem = uniform(
        Stage(0, 3, 3, 2, until_weight_gradient_bytes=2, between_gradients_bytes=1),
        placed("loop", 2),
        4,
        memory_limit=5,
    )
    budgets = [Budget.of_seconds(60, deterministic=True) for _ in range(2)]
    first, second = (solve(problem, budget) for budget in budgets)
    assert first.timed == second.timed
    assert [attempt.value for attempt in first.attempts] == [attempt.value for attempt in second.attempts]


def test_ends_when_told_and_tells_how_it_goes() -> None:
    problem = uniform(UNIT, placed("v", 8, 2), 24, memory_limit=9)
    heard: list[Progress] = []
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    begin = time.monotonic()
    found = solve(problem, Budget.of_seconds(600, stop=stop, listen=heard.append))
    assert time.monotonic() - begin < 15  # what is compiled for the first time cannot be interrupted
    assert within_limit(found.timed)
    assert heard[-1].incumbent == found.value
    assert heard[-1].bound == found.bound.value <= found.value
    assert found.attempts[-1].seconds >= 0


def test_told_to_stop_it_makes_no_more_than_it_needs() -> None:
    """One schedule within the limit is enough then, however many have names; those that exceed it are not."""
    problem = uniform(UNIT, placed("loop", 2), 4, memory_limit=3)
    stop = threading.Event()
    stop.set()
    found = solve(problem, Budget.of_seconds(600, stop=stop))
    assert within_limit(found.timed)
    assert [attempt.value for attempt in found.attempts[:-1]] == [None] * (len(found.attempts) - 1)
    assert found.attempts[-1].method == found.timed.schedule.method


def test_mixing_whole_backwards_and_halves_beats_whole_ones() -> None:
    """What torch's eager split holds (32 bytes from F to W, 22 more from I to W), at the memory of 1F1B."""
    stage = Stage(0, 30, 29, 20, until_weight_gradient_bytes=32, between_gradients_bytes=22)
    problem = uniform(stage, placed("loop", 4), 8, memory_limit=128)
    mixed = solve(problem, Budget.of_seconds(3))
    kinds = {action.kind.value for order in mixed.timed.schedule.orders for action in order}
    assert kinds == {"F", "I", "W", "B"}
    assert mixed.value < timed(named("1f1b", problem)).makespan_ns
