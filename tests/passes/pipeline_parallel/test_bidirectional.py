"""Two pipelines in opposite directions against the formula and the optima that are known of Chimera."""

from __future__ import annotations

import msgspec
import pytest

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel.bidirectional import both_ways, choose_directions
from opweave.passes.pipeline_parallel.solution import within_limit

EQUAL = Stage(0, 1, 1, 0, until_input_gradient_bytes=1, resident_bytes=3)


def test_the_second_copy_is_the_first_in_a_mirror() -> None:
    """Its stages come behind, on ranks from the other end; resident bytes double; microbatches are divided."""
    problem = both_ways(uniform(EQUAL, placed("loop", 3), 5), 2)
    assert [stage.rank for stage in problem.stages] == [0, 1, 2, 2, 1, 0]
    assert problem.routes == (Route((0, 1, 2), 3), Route((3, 4, 5), 2))
    assert problem.resident_bytes == (6, 6, 6)


@pytest.mark.parametrize("depth", [4, 8])
def test_half_the_microbatches_each_way_are_chimera(depth: int) -> None:
    """Bubble (D - 2) / (2 N + D - 2) with N = D and backward as long as forward, and nothing is better than that."""
    solution = choose_directions(uniform(EQUAL, placed("loop", depth), depth), Budget.of_seconds(10))
    assert solution.timed.bubble == pytest.approx((depth - 2) / (3 * depth - 2))
    assert solution.gap == 0
    assert [route.microbatches for route in solution.timed.schedule.problem.routes] == [depth // 2, depth // 2]


def test_backward_twice_as_long_as_forward_is_no_worse_than_the_known_optimum() -> None:
    """16 with D = N = 4, where constraint programming has proved 16; the formula is of equal passes."""
    unequal = Stage(0, 1, 2, 0)
    assert choose_directions(uniform(unequal, placed("loop", 4), 4), Budget.of_seconds(5)).value == 16


def test_one_way_where_two_copies_do_not_fit() -> None:
    """Two copies hold twice what is resident; without room for them there is one direction."""
    problem = uniform(EQUAL, placed("loop", 2), 4, memory_limit=5)
    solution = choose_directions(problem, Budget.of_seconds(3))
    assert len(solution.timed.schedule.problem.routes) == 1
    assert within_limit(solution.timed)
    with pytest.raises(Infeasible):
        choose_directions(uniform(EQUAL, placed("loop", 2), 4, memory_limit=3), Budget.of_seconds(3))


def test_a_single_microbatch_goes_one_way() -> None:
    """There is nothing to divide."""
    solution = choose_directions(uniform(EQUAL, placed("loop", 2), 1), Budget.of_seconds(3))
    assert [attempt.method for attempt in solution.attempts] == ["one way"]


def test_problems_that_are_no_single_pipeline_are_refused() -> None:
    """Two routes, a stage that the route leaves out, a vocabulary, or no microbatch one way."""
    plain = uniform(EQUAL, placed("loop", 2), 2)
    with pytest.raises(OptionError, match="2 routes over 2 stages"):
        both_ways(PipelineProblem(2, plain.stages, (Route((0, 1), 1), Route((1, 0), 1))), 1)
    with pytest.raises(OptionError, match="1 routes over 2 stages"):
        both_ways(PipelineProblem(2, plain.stages, (Route((0,), 2),)), 1)
    with pytest.raises(OptionError, match="shards of a vocabulary"):
        both_ways(msgspec.structs.replace(plain, vocabulary=Vocabulary((1, 1), (1, 1))), 1)
    for back in (0, 2):
        with pytest.raises(OptionError, match=f"{back} of 2 microbatches go back"):
            both_ways(plain, back)
