"""Schedules by name: each is complete and runs, says which problems it is for, and keeps to what its source claims."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, ActionKind, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel.named import NAMES, fitting, named, problem_for

_TIMES = st.integers(0, 9)


def sizes(name: str) -> list[tuple[int, int, int | None]]:
    """Small numbers of ranks, microbatches and chunks that ``name`` goes with."""
    shards = Vocabulary((1,), (1,)) if name == "1f1b-vocabulary" else None
    found = []
    for ranks, microbatches in itertools.product(range(1, 7), range(1, 15)):
        for chunks in (1, 2, 3, 4) if NAMES[name].chunks is None else (None,):
            if shards is not None:
                shards = Vocabulary((1,) * ranks, (1,) * ranks)
            try:
                problem_for(name, Stage(0, 1, 1, 1), ranks, microbatches, chunks=chunks, shards=shards)
            except OptionError:
                continue
            found.append((ranks, microbatches, chunks))
    return found


@st.composite
def problems(draw: st.DrawFn, name: str, possible: list[tuple[int, int, int | None]]) -> PipelineProblem:
    """A problem that ``name`` fits, with times, bytes and transfers of its own for each stage."""
    ranks, microbatches, chunks = draw(st.sampled_from(possible))
    shards = None
    if name == "1f1b-vocabulary":
        times = st.tuples(*[_TIMES] * ranks)
        shards = Vocabulary(draw(times), draw(times), draw(_TIMES), draw(_TIMES), draw(st.integers(1, 2)))
    problem = problem_for(name, Stage(0, 1, 1, 1), ranks, microbatches, chunks=chunks, shards=shards)
    stages = []
    for stage in problem.stages:
        held = draw(_TIMES)
        stages.append(
            Stage(
                rank=stage.rank,
                forward_ns=draw(_TIMES),
                input_gradient_ns=draw(_TIMES),
                weight_gradient_ns=draw(_TIMES),
                backward_ns=draw(st.none() | _TIMES),
                until_input_gradient_bytes=draw(_TIMES),
                until_weight_gradient_bytes=held,
                between_gradients_bytes=draw(_TIMES),
                forward_send_ns=draw(_TIMES),
                backward_send_ns=draw(_TIMES),
                offloaded_bytes=draw(st.integers(0, held)) if shards is None else 0,
                offload_ns=draw(_TIMES),
                reload_ns=draw(_TIMES),
            )
        )
    routes = problem.routes
    if draw(st.booleans()):
        hops = st.tuples(*[_TIMES] * (len(routes[0].stages) - 1))
        routes = tuple(msgspec.structs.replace(each, backward_send_ns=draw(hops)) for each in routes)
    return msgspec.structs.replace(problem, stages=tuple(stages), routes=routes)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_complete_and_runs(name: str) -> None:
    """Whatever the stages take and hold, offloading or not, the simulator finds all actions and no deadlock."""

    @settings(max_examples=12, deadline=None)
    @given(problems(name, sizes(name)))
    def check(problem: PipelineProblem) -> None:
        line = timed(named(name, problem))
        assert name in fitting(problem)
        assert line.schedule.method == name
        assert line.schedule.problem is problem
        assert line.makespan_ns >= max(line.spans_ns)
        for route in problem.routes:
            _check_last_stage(line, route)

    check()


def _check_last_stage(line: TimedSchedule, route: Route) -> None:
    """The loss is computed in the order of the microbatches: torch's runtime looks it up by its place."""
    last = route.stages[-1]
    order = line.schedule.orders[line.schedule.problem.stages[last].rank]
    numbers = [action.microbatch for action in order if action.stage == last and action.kind is ActionKind.FORWARD]
    assert numbers == sorted(numbers)


def test_names_say_what_problems_they_are_for() -> None:
    """A name's problem is fit by it, and by no schedule of another placement."""
    for name, about in NAMES.items():
        shards = Vocabulary((1,) * 4, (1,) * 4) if name == "1f1b-vocabulary" else None
        problem = problem_for(name, Stage(0, 1, 1, 1), 4, 8, memory_limit=99, shards=shards)
        assert problem.memory_limit == (99,) * 4
        found = fitting(problem)
        assert name in found
        placements = {NAMES[each].placement for each in found}
        assert placements <= ({"v", "wave"} if about.placement in ("v", "wave") else {about.placement})


def test_the_memory_limit_is_the_readers_but_where_a_schedule_heeds_it() -> None:
    """GPipe holds all microbatches in whatever limit; zb-greedy refuses one that it cannot keep."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=10)
    assert max(timed(named("gpipe", problem_for("gpipe", stage, 4, 8, 40))).peak_bytes) == 80
    assert max(timed(named("zb-greedy", problem_for("zb-greedy", stage, 4, 8, 40))).peak_bytes) <= 40
    with pytest.raises(OptionError, match="keeps the memory limit"):
        named("zb-greedy", problem_for("zb-greedy", stage, 4, 8, 9))
    with pytest.raises(OptionError, match="keeps the memory limit"):
        named("zbv-greedy", problem_for("zbv-greedy", stage, 4, 8, 19))


def test_offloading_frees_memory_at_the_price_of_copies() -> None:
    """1F1B with half of its activations on the host, copies that take no time: the same makespan, less held."""
    stage = Stage(0, 2, 2, 2, until_weight_gradient_bytes=10, offloaded_bytes=6)
    problem = problem_for("1f1b", stage, 4, 8)
    kept = problem_for("1f1b", msgspec.structs.replace(stage, offloaded_bytes=0), 4, 8)
    line, whole = timed(named("1f1b", problem)), timed(named("1f1b", kept))
    assert line.makespan_ns == whole.makespan_ns
    assert max(line.peak_bytes) < max(whole.peak_bytes) == 40
    assert Action(0, ActionKind.RELOAD, 3) in line.schedule.orders[0]


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("zbv", uniform(Stage(0, 1, 1, 1), (0, 1, 0, 1), 4), "placement 'v'"),
        ("1f1b", uniform(Stage(0, 1, 1, 1), (0, 1, 0, 1), 4), "1 on each rank"),
        ("interleaved-1f1b", uniform(Stage(0, 1, 1, 1), (0, 1, 0), 4), "as many on each rank"),
        ("interleaved-1f1b", uniform(Stage(0, 1, 1, 1), (0, 1, 2, 0, 1, 2), 7), "rounds"),
        ("dualpipe-v", uniform(Stage(0, 1, 1, 1), (0, 1, 1, 0), 3), "the least is 4"),
        ("hanayo", uniform(Stage(0, 1, 1, 1), (0, 1), 4), "even number"),
        ("chimera", uniform(Stage(0, 1, 1, 1), (0, 1), 4), "needs two"),
        ("1f1b-vocabulary", uniform(Stage(0, 1, 1, 1), (0, 1), 4), "not cut"),
        (
            "1f1b",
            msgspec.structs.replace(uniform(Stage(0, 1, 1, 1), (0, 1), 4), vocabulary=Vocabulary((1, 1), (1, 1))),
            "does not place them",
        ),
        (
            "chimera",
            PipelineProblem(2, (Stage(0, 1, 1, 1), Stage(1, 1, 1, 1)), (Route((0, 1), 2), Route((1, 0), 2))),
            "share stages",
        ),
        (
            "1f1b",
            PipelineProblem(2, tuple(Stage(r, 1, 1, 1) for r in (0, 1)), (Route((0,), 1), Route((1,), 1))),
            "routes",
        ),
    ],
)
def test_problems_that_do_not_fit_are_refused_with_the_reason(name: str, problem: PipelineProblem, reason: str) -> None:
    """Placement, chunks, microbatches, routes and shards each have their message."""
    assert name not in fitting(problem)
    with pytest.raises(OptionError, match=reason) as caught:
        named(name, problem)
    assert caught.value.hint


def test_what_no_schedule_goes_with_is_refused() -> None:
    """Names, chunks and microbatches that there are not."""
    stage = Stage(0, 1, 1, 1)
    with pytest.raises(OptionError, match="there is no schedule"):
        named("fastest", uniform(stage, (0, 1), 4))
    with pytest.raises(OptionError, match="has 2 chunks"):
        problem_for("zbv", stage, 2, 4, chunks=3)
    with pytest.raises(OptionError, match="halved"):
        problem_for("chimera", stage, 2, 3)
    with pytest.raises(OptionError, match="even number"):
        problem_for("dualpipe", stage, 3, 6)
    with pytest.raises(OptionError):
        problem_for("gpipe", stage, 0, 4)
    with pytest.raises(OptionError):
        problem_for("gpipe", stage, 2, 0)
    with pytest.raises(OptionError):
        problem_for("hanayo", stage, 2, 4, chunks=0)


@pytest.mark.parametrize("name", ["interleaved-1f1b", "zb-greedy", "zbv-greedy", "v-half", "chimera", "dualpipe"])
def test_numbers_of_stages_mean_nothing(name: str) -> None:
    """Stages listed backwards, routes through the same ranks: the same makespan and peaks."""
    problem = problem_for(name, Stage(0, 3, 4, 2, until_weight_gradient_bytes=1, forward_send_ns=1), 4, 8)
    count = len(problem.stages)
    routes = tuple(
        msgspec.structs.replace(route, stages=tuple(count - 1 - stage for stage in route.stages))
        for route in problem.routes
    )
    backwards = msgspec.structs.replace(problem, stages=problem.stages[::-1], routes=routes)
    first, second = timed(named(name, problem)), timed(named(name, backwards))
    assert (first.makespan_ns, first.peak_bytes) == (second.makespan_ns, second.peak_bytes)
