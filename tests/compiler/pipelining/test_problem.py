"""What a problem says of itself, and what is refused when one is made."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.errors import OptionError
from tests.compiler.pipelining.drawn import problems

UNIT = Stage(0, 1, 1, 1)


@settings(deadline=None)
@given(problems())
def test_a_problem_survives_json(problem: PipelineProblem) -> None:
    """Decoding strictly gives the same problem, whatever it has."""
    assert msgspec.json.decode(msgspec.json.encode(problem), type=PipelineProblem) == problem


@settings(deadline=None)
@given(problems())
def test_the_work_of_a_rank_is_that_of_its_stages_and_shards(problem: PipelineProblem) -> None:
    """Counted microbatch by microbatch; a backward counts as the faster of its two forms."""
    work = [0] * problem.ranks
    for route in problem.route_of:
        for stage in (problem.stages[index] for index in problem.routes[route].stages):
            halves = stage.input_gradient_ns + stage.weight_gradient_ns
            work[stage.rank] += stage.forward_ns + min(
                halves, halves if stage.backward_ns is None else stage.backward_ns
            )
        for rank in range(problem.ranks):
            if problem.vocabulary is not None:
                work[rank] += problem.vocabulary.output_ns[rank] + problem.vocabulary.gradient_ns[rank]
    assert problem.work_ns == tuple(work)


def test_microbatches_are_numbered_through_the_routes() -> None:
    """The first route's first."""
    problem = PipelineProblem(1, (UNIT, UNIT), (Route((0, 1), 2), Route((1,), 1), Route((1, 0), 2)))
    assert problem.microbatches == 5
    assert problem.route_of == (0, 0, 1, 2, 2)


def test_ranks_list_their_stages_and_what_is_resident() -> None:
    """Stages ascending; a rank without any has nothing."""
    stages = tuple(Stage(rank, 1, 1, 1, resident_bytes=rank + 1) for rank in (2, 0, 0))
    problem = PipelineProblem(3, stages, (Route((0, 1, 2), 1),))
    assert problem.stages_of == ((1, 2), (), (0,))
    assert problem.resident_bytes == (2, 0, 3)


def _changed(**fields: object) -> Callable[[], PipelineProblem]:
    return lambda: msgspec.structs.replace(uniform(UNIT, placed("loop", 2), 2), **fields)


def _stage(**fields: object) -> Callable[[], PipelineProblem]:
    return lambda: uniform(msgspec.structs.replace(UNIT, **fields), (0,), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_changed(ranks=0), "0 ranks, 2 stages and 1 routes"),
        (_changed(stages=()), "2 ranks, 0 stages"),
        (_changed(routes=()), "and 0 routes"),
        (_changed(ranks=1), "stage 1 is on rank 1; there are ranks 0 to 0"),
        (_changed(routes=(Route((), 1),)), "a route goes through stages \\[\\]"),
        (_changed(routes=(Route((0, 0), 1),)), "different ones of 0 to 1"),
        (_changed(routes=(Route((0, -1), 1),)), "different ones of 0 to 1"),
        (_changed(routes=(Route((0, 2), 1),)), "different ones of 0 to 1"),
        (_changed(routes=(Route((0, 1), 0),)), "0 microbatches; the least is 1"),
        (_changed(routes=(Route((0, 1), 1, (1, 1)),)), "times of 2 hops forward; it has 1 hops"),
        (_changed(routes=(Route((0, 1), 1, (), (-1,)),)), "hop 0 backward -1"),
        (_changed(memory_limit=(1,)), "1 memory limits for 2 ranks"),
        (_changed(memory_limit=(1, 0.5)), "of rank 1 0.5"),
        (_changed(vocabulary=Vocabulary((1,), (1, 1))), "times for 1 and 2 shards; there are 2 ranks"),
        (_changed(vocabulary=Vocabulary((1, 1), (1, 1), barriers=3)), "3 barriers; there are 1 or 2"),
        (_changed(vocabulary=Vocabulary((1, 1), (1, -1))), "gradient_ns of rank 1 -1"),
        (_changed(vocabulary=Vocabulary((1, 1), (1, 1), broadcast_ns=-1)), "broadcast_ns -1"),
        (_changed(ranks=1 << 20), "1,048,576 ranks"),
        (_changed(routes=(Route((0, 1), 1 << 30),)), "2,147,483,648 forwards and shards"),
        (_changed(routes=(Route((0, 1), 2, (), (1 << 60,)),)), "units of time in all of the step; the most is"),
        (_stage(forward_ns=1 << 52), "units of time in all of the step"),
        (_stage(reduce_ns=1 << 70), "units of time in all of the step"),
        (_stage(between_gradients_bytes=1 << 50), "units of bytes in a microbatch"),
        (_changed(vocabulary=Vocabulary((1, 1), (1, 1), shard_bytes=1 << 50)), "units of bytes in a shard"),
        (_stage(resident_bytes=1 << 60), "units of bytes in all of the step"),
        (_stage(forward_ns=1.5), "stage 0 has forward_ns 1.5"),
        (_stage(weight_gradient_ns=-1), "stage 0 has weight_gradient_ns -1"),
        (_stage(backward_ns=-2), "stage 0 has backward_ns -2"),
        (_stage(offloaded_bytes=2, until_weight_gradient_bytes=1), "offloads 2 bytes of the 1"),
    ],
)
def test_what_is_no_problem_is_refused(make: Callable[[], PipelineProblem], message: str) -> None:
    """When it is made, by the name of what is wrong, and not later in some solver."""
    with pytest.raises(OptionError, match=message):
        make()


def test_a_stage_on_a_rank_below_zero_is_refused() -> None:
    """Python would count it from the end."""
    with pytest.raises(OptionError, match="stage 0 has rank -1"):
        PipelineProblem(1, (Stage(-1, 1, 1, 1),), (Route((0,), 1),))
