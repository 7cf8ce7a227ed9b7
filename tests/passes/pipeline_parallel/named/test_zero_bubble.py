"""Zero Bubble's automatic schedules: optimal where that is proved, within any limit, and judged as they judge."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel.named import named, problem_for
from opweave.passes.pipeline_parallel.solution import value_of

_TIME = st.integers(1, 9)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "held", "makespan", "span"),
    [(4, 8, 4, 27, 27), (4, 8, 7, 27, 24), (8, 16, 8, 55, 55), (8, 24, 8, 79, 79), (8, 24, 15, 79, 72)],
)
def test_optimal_within_the_memory_of_h1_and_of_h2(
    ranks: int, microbatches: int, held: int, makespan: int, span: int
) -> None:
    """Slots that CP-SAT proved to be the least, F, I and W taking 1."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)
    problem = problem_for("zb-greedy", stage, ranks, microbatches, held)
    line = timed(named("zb-greedy", problem))
    assert line.makespan_ns == makespan
    assert max(line.peak_bytes) <= held
    assert timed(named("zb-greedy", problem, objective="span")).span_ns == span


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([("zb-greedy", 1), ("zbv-greedy", 2)]),
    st.lists(st.tuples(_TIME, _TIME, _TIME, _TIME), min_size=1, max_size=4),
    st.integers(2, 10),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_a_limit_is_kept_or_refused(
    schedule: tuple[str, int], times: list[tuple[int, int, int, int]], microbatches: int, held: int, between: int
) -> None:
    """Stages of different times, memory as torch's eager split has it: never above the limit."""
    name, chunks = schedule
    problem = problem_for(name, Stage(0, 1, 1, 1), len(times), microbatches, held * chunks)
    stages = tuple(
        Stage(stage.rank, f, i, w, forward_send_ns=send, until_weight_gradient_bytes=1, between_gradients_bytes=between)
        for stage, (f, i, w, send) in zip(problem.stages, times * chunks, strict=True)
    )
    problem = msgspec.structs.replace(problem, stages=stages)
    if held > len(times) * (1 + between):  # a microbatch for each rank, and gradients kept between
        line = timed(named(name, problem))
    else:
        try:
            line = timed(named(name, problem))
        except OptionError:
            return
    assert max(line.peak_bytes) <= held * chunks


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["zb-greedy", "zbv-greedy"]), _TIME, _TIME, _TIME, st.integers(0, 4), st.integers(0, 9))
def test_the_objective_is_what_is_chosen_by(name: str, f: int, i: int, w: int, send: int, reduce: int) -> None:
    """Neither objective's schedule is worse by it than the other's; all-reduces behind the last W count."""
    stage = Stage(0, f, i, w, until_weight_gradient_bytes=1, forward_send_ns=send, reduce_ns=reduce)
    problem = problem_for(name, stage, 4, 9)
    by_makespan = timed(named(name, problem))
    by_span = timed(named(name, problem, objective="span"))
    assert value_of(by_makespan, "makespan") <= value_of(by_span, "makespan")
    assert value_of(by_span, "span") <= value_of(by_makespan, "span")


def test_the_clock_that_ways_are_compared_by_is_the_simulators() -> None:
    """All-reduces that take no time, asked of the simulator or not, choose the same orders."""
    for name in ("zb-greedy", "zbv-greedy"):
        for times in ((29718, 29444, 19927), (3, 5, 2), (2, 1, 7)):
            for objective in ("makespan", "span"):
                stage = Stage(0, *times, forward_send_ns=1, backward_send_ns=1)
                problem = problem_for(name, stage, 6, 14)
                reduced = msgspec.structs.replace(
                    problem, stages=tuple(msgspec.structs.replace(each, reduce_ns=1) for each in problem.stages)
                )
                plain, asked = (timed(named(name, each, objective=objective)) for each in (problem, reduced))
                assert plain.schedule.orders == asked.schedule.orders


def test_zbv_fills_idle_time_before_the_second_half_of_a_backward() -> None:
    """Measured times of 24 ranks, where it matters: bubbles as the authors' program has them."""
    stage = Stage(0, 6763, 6969, 5251, until_weight_gradient_bytes=1, forward_send_ns=755, backward_send_ns=755)
    line = timed(named("zbv-greedy", problem_for("zbv-greedy", stage, 24, 72), objective="span"))
    assert round(line.span_bubble, 4) == 0.0638
    assert round(line.bubble, 4) == 0.0922
