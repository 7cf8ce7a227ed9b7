"""No schedule undercuts the bounds, whatever the problem has; and they are tight where the closed form was."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage
from opweave.passes.pipeline_parallel.bounds import lower_bound
from opweave.passes.pipeline_parallel.solution import Objective
from tests.passes.pipeline_parallel.every_order import best_of_all, problems

UNIT = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)


@pytest.mark.parametrize("objective", ["makespan", "span"])
@settings(max_examples=120, deadline=None)
@given(problems())
def test_no_schedule_undercuts_the_bound(objective: Objective, problem: PipelineProblem) -> None:
    best = best_of_all(problem, objective, most=1500)
    assume(best is not None and best >= 0)
    assert best is not None
    assert lower_bound(problem, objective).value <= lower_bound(problem, objective, thorough=True).value <= best


@pytest.mark.parametrize(
    ("ranks", "microbatches", "limit", "makespan", "span"),
    [
        (4, 8, 4, 27, 27),
        (4, 8, 7, 27, 24),
        (8, 16, 8, 55, 55),
        (8, 16, 15, 55, 48),
        (8, 16, 6, 61, 61),
        (8, 24, 8, 79, 79),
        (8, 24, 15, 79, 72),
        (8, 24, 6, 85, 85),
    ],
)
def test_bound_is_the_optimum_where_constraint_programming_found_it(
    ranks: int, microbatches: int, limit: int, makespan: int, span: int
) -> None:
    """Optima that CP-SAT proved, among them limits that let ranks idle before the first and behind the last."""
    problem = uniform(UNIT, placed("loop", ranks), microbatches, memory_limit=limit)
    assert lower_bound(problem, "makespan").value == makespan
    assert lower_bound(problem, "span").value == span


@pytest.mark.parametrize(
    ("ranks", "microbatches", "limit", "makespan"), [(4, 8, 8, 51), (4, 8, 6, 53), (4, 8, 5, 56), (4, 8, 4, 59)]
)
def test_bound_is_the_optimum_of_a_v_under_any_limit(ranks: int, microbatches: int, limit: int, makespan: int) -> None:
    """Two stages share each rank's memory: ZB-V, V-Half and V-Min are optimal where all times are 1."""
    problem = uniform(UNIT, placed("v", ranks, 2), microbatches, memory_limit=limit)
    assert lower_bound(problem).value == makespan


def test_bound_counts_weight_gradients_that_hold_part_of_the_bytes() -> None:
    """Measured times of a 6.2B model at the memory of 1F1B: Zero Bubble's first schedule, bubble 0.1323, is optimal."""
    hidden, heads = 4096, 32
    stage = Stage(
        0,
        29718,
        29444,
        19927,
        until_input_gradient_bytes=2 * hidden + 5 * heads * 1024,
        until_weight_gradient_bytes=32 * hidden,
        forward_send_ns=527,
        backward_send_ns=527,
    )
    problem = uniform(stage, placed("loop", 8), 24, memory_limit=8 * (34 * hidden + 5 * heads * 1024))
    assert round(1 - max(problem.work_ns) / lower_bound(problem).value, 4) == 0.1323


def test_bound_follows_round_trips_under_a_small_limit() -> None:
    """Four in flight where the round trip takes 17 and four take 12: ranks starve all along, not at the ends only."""
    problem = uniform(UNIT, placed("loop", 8), 24, memory_limit=4)
    assert 105 <= lower_bound(problem).value <= 115  # 115 is the optimum


@pytest.mark.parametrize(("multiple", "bubble"), [(1, 0.1526), (1.25, 0.145), (1.5, 0.1372)])
def test_bound_counts_what_lies_between_halves(multiple: float, bubble: float) -> None:
    """An eager split adds 22 bytes to 32 until W is done, as in torch: a rank cannot put off many W to its end."""
    stage = Stage(
        0,
        29718,
        29444,
        19927,
        until_weight_gradient_bytes=32,
        between_gradients_bytes=22,
        forward_send_ns=527,
        backward_send_ns=527,
    )
    problem = uniform(stage, placed("loop", 8), 24, memory_limit=int(multiple * 8 * 32))
    assert round(1 - max(problem.work_ns) / lower_bound(problem).value, 4) == bubble


def test_thorough_bound_counts_what_else_a_rank_has_to_do() -> None:
    """Few in flight: a rank's other work comes before what lets the next in. And Zero Bubble's 0.0433 is optimal."""
    problem = uniform(UNIT, placed("loop", 4), 8, memory_limit=3)
    assert lower_bound(problem).value == 30
    assert lower_bound(problem, thorough=True).value == 31
    stage = Stage(0, 18522, 18086, 9337, forward_send_ns=601, backward_send_ns=601)
    free = uniform(stage, placed("loop", 8), 24)
    bound = lower_bound(free, "span", thorough=True).value
    assert round(1 - max(free.work_ns) / bound, 4) == 0.0433


def test_bound_counts_what_only_some_problems_have() -> None:
    """An all-reduce behind the last W, copies one after another, a whole backward that is faster than its halves."""
    reducing = Stage(0, 1, 1, 1, reduce_ns=7)
    assert lower_bound(PipelineProblem(1, (reducing, reducing), (Route((0, 1), 2),))).value >= 12 - 3 + 14 - 7
    copying = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1, offloaded_bytes=1, offload_ns=9, reload_ns=9)
    assert lower_bound(uniform(copying, [0], 4)).value == 1 + 8 * 9 + 2
    whole = Stage(0, 1, 4, 4, backward_ns=2)
    assert lower_bound(uniform(whole, [0, 1], 4)).value == 4 * 3 + 1 + 2
