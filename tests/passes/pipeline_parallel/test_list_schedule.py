"""List schedules keep every limit that can be kept, are never stuck, and are what the simulator says they are."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.passes.pipeline_parallel._lanes import schedule_of, sequences_of
from opweave.passes.pipeline_parallel._play import objective_of, play
from opweave.passes.pipeline_parallel.list_schedule import (
    Rule,
    Workshop,
    filled,
    list_scheduled,
    rules_for,
    workshop_for,
)
from opweave.passes.pipeline_parallel.solution import within_limit
from tests.passes.pipeline_parallel.every_order import every_schedule, problems

RULES = st.builds(
    Rule,
    st.sampled_from(("IFW", "FIW", "IWF", "WFI", "steady")),
    st.sampled_from((0.1, 1.0, 2.0, float(1 << 40))),
    st.sampled_from((0.0, 0.5, 3.0)),
    st.sampled_from((0.0, 1.5)),
    st.sampled_from(("split", "whole", "either")),
    st.sampled_from((0.5, 1.0)),
    st.booleans(),
)


def scheduled(shop: Workshop, rule: Rule) -> PipelineSchedule:
    symbols, begin = list_scheduled(shop, filled(shop, rule))
    return schedule_of(shop.problem, shop.lanes, symbols, begin, str(rule))


def with_limit(problem: PipelineProblem, extra: int) -> PipelineProblem:
    """The problem with so many bytes on each rank more than what a microbatch alone needs."""
    least = workshop_for(problem).least.tolist()
    limit = tuple(held + need + extra for held, need in zip(problem.resident_bytes, least, strict=True))
    return msgspec.structs.replace(problem, memory_limit=limit)


@settings(max_examples=150, deadline=None)
@given(problems(most_actions=60), RULES, st.integers(0, 4))
def test_any_rule_keeps_any_limit_that_a_microbatch_keeps(problem: PipelineProblem, rule: Rule, extra: int) -> None:
    limited = with_limit(problem, extra)
    judged = timed(scheduled(workshop_for(limited), rule))
    assert within_limit(judged)


@settings(max_examples=100, deadline=None)
@given(problems(most_actions=60), RULES, st.integers(0, 4), st.booleans())
def test_counted_as_the_simulator_counts(problem: PipelineProblem, rule: Rule, extra: int, span: bool) -> None:
    shop = workshop_for(with_limit(problem, extra))
    schedule = scheduled(shop, rule)
    judged = timed(schedule)
    value = judged.span_ns if span else judged.makespan_ns
    # Under a share of the limit it may have waited for copies that the limit itself need not wait for.
    if rule.share == 1:
        assert objective_of(shop.lanes, shop.room, span) == value
    assert play(shop.lanes, shop.room, *sequences_of(shop.lanes, schedule)) <= 0
    assert objective_of(shop.lanes, shop.room, span) == value


@settings(max_examples=60, deadline=None)
@given(problems(most_actions=12))
def test_no_schedule_keeps_less_than_what_a_microbatch_needs(problem: PipelineProblem) -> None:
    # What takes no time at all may be freed at the moment at which it is allocated; leave that out.
    timely = tuple(
        msgspec.structs.replace(
            stage, forward_ns=stage.forward_ns + 1, input_gradient_ns=stage.input_gradient_ns + 1, offloaded_bytes=0
        )
        for stage in problem.stages
    )
    problem = msgspec.structs.replace(problem, stages=timely, vocabulary=None)
    least = workshop_for(problem).least.tolist()
    rank = max(range(problem.ranks), key=lambda rank: least[rank])
    if least[rank] == 0:
        return
    limit = [1000] * problem.ranks
    limit[rank] = problem.resident_bytes[rank] + least[rank] - 1
    every = every_schedule(msgspec.structs.replace(problem, memory_limit=tuple(limit)), most=1500)
    assert every is None or next(iter(every), None) is None


def test_play_says_what_is_stuck_or_above_the_limit() -> None:
    problem = uniform(Stage(0, 1, 1, 1, until_weight_gradient_bytes=1), (0, 1), 3, memory_limit=2)
    shop = workshop_for(problem)
    greedy = [
        tuple(Action(stage, ActionKind(kind), n) for kind in "FIW" for n in range(3)) for stage in range(problem.ranks)
    ]
    assert play(shop.lanes, shop.room, *sequences_of(shop.lanes, PipelineSchedule(problem, tuple(greedy)))) == 1
    backward_first = (tuple(reversed(greedy[0])), greedy[1])
    stuck = sequences_of(shop.lanes, PipelineSchedule(problem, backward_first))
    assert play(shop.lanes, shop.room, *stuck) > 1 << 60


def test_one_rule_makes_1f1b_with_weight_gradients_put_off() -> None:
    """As many bytes as 1F1B, and the makespan of ZB-H1: (p - 1) F + m (F + I + W) for equal times."""
    problem = uniform(Stage(0, 1, 1, 1, until_weight_gradient_bytes=1), placed("loop", 8), 24, memory_limit=8)
    shop = workshop_for(problem)
    best = min(timed(scheduled(shop, rule)).makespan_ns for rule in list(rules_for(shop))[:20])
    assert best == 7 + 24 * 3


def test_two_ways_share_a_limit() -> None:
    """Microbatches of two routes that meet on each rank do not lock each other up."""
    stage = Stage(0, 2, 2, 1, until_weight_gradient_bytes=1)
    stages = tuple(msgspec.structs.replace(stage, rank=rank) for rank in (0, 1, 2, 2, 1, 0))
    problem = PipelineProblem(3, stages, (Route((0, 1, 2), 6), Route((3, 4, 5), 3)), (1, 1, 1))
    shop = workshop_for(problem)
    for rule in rules_for(shop):
        assert timed(scheduled(shop, rule)).peak_bytes == (1, 1, 1)


@pytest.mark.parametrize("mode", ["whole", "either"])
def test_whole_backwards_where_halves_hold_more(mode: str) -> None:
    """A limit that halves would exceed at once is kept by whole backwards, and halves come where there is room."""
    stage = Stage(0, 3, 2, 2, until_weight_gradient_bytes=2, between_gradients_bytes=3)
    tight = uniform(stage, placed("loop", 3), 6, memory_limit=4)
    schedule = scheduled(workshop_for(tight), Rule(modes=mode))
    kinds = {action.kind for order in schedule.orders for action in order}
    assert kinds == {ActionKind.FORWARD, ActionKind.BACKWARD}
    wide = uniform(stage, placed("loop", 3), 6, memory_limit=40)
    halves = scheduled(workshop_for(wide), Rule(modes="either"))
    assert all(action.kind is not ActionKind.BACKWARD for order in halves.orders for action in order)
