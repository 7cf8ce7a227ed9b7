"""All-reduces at the end: the order of W follows them, against every order there is of tiny problems."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.passes.pipeline_parallel.reducing import exposed_ns, finishing_early, johnson, overlap_reduction
from opweave.passes.pipeline_parallel.solution import Objective, within_limit
from tests.passes.pipeline_parallel.every_order import best_of_all

OBJECTIVES: tuple[Objective, ...] = ("makespan", "span")


def chunks(*reduce_ns: int, microbatches: int = 2) -> PipelineProblem:
    """One rank with a stage for each all-reduce."""
    stages = tuple(Stage(0, 1, 1, 2, reduce_ns=length) for length in reduce_ns)
    return PipelineProblem(1, stages, (Route(tuple(range(len(stages))), microbatches),))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.sampled_from(OBJECTIVES))
def test_nothing_ends_sooner_among_all_orders(lengths: list[int], objective: Objective) -> None:
    """One microbatch on one rank, where every order of the rank can be tried."""
    problem = chunks(*lengths, microbatches=1)
    solution = overlap_reduction(problem, Budget.of_seconds(0.2), objective=objective)
    assert solution.bound.value <= solution.value
    assert solution.value == best_of_all(problem, objective)


def test_the_order_changes_with_the_all_reduces() -> None:
    """The stage with the longer one is done first, whichever it is, and that is better than not to know."""
    last = {}
    for lengths in ((0, 9), (9, 0)):
        solution = overlap_reduction(chunks(*lengths, microbatches=3), Budget.of_seconds(0.5))
        order = solution.timed.schedule.orders[0]
        ends = {action.stage: place for place, action in enumerate(order) if action.kind.value in "WB"}
        last[lengths] = max(ends, key=ends.__getitem__)
    assert last == {(0, 9): 0, (9, 0): 1}


def test_knowing_is_better_than_not_on_a_pipeline_with_chunks() -> None:
    """Four ranks, two chunks each: the best order without all-reduces, with them at its end, is no longer the best."""
    problem = uniform(
        Stage(0, 2, 2, 2, until_weight_gradient_bytes=2, reduce_ns=30), placed("loop", 4, 2), 8, memory_limit=16
    )
    solution = overlap_reduction(problem, Budget.of_seconds(1))
    unaware = next(attempt for attempt in solution.attempts if attempt.method == "unaware of all-reduces")
    assert unaware.value is not None
    assert solution.value < unaware.value
    assert solution.bound.value <= solution.value
    assert within_limit(solution.timed)


def test_what_sticks_out_is_counted() -> None:
    """9 behind the last W, of which none is hidden; and nothing where there is none."""
    order = PipelineSchedule(chunks(9, microbatches=1), (_actions("0F0 0I0 0W0"),))
    assert exposed_ns(timed(order)) == 9
    assert exposed_ns(timed(msgspec.structs.replace(order, problem=chunks(0, microbatches=1)))) == 0


def test_weight_gradients_are_exchanged_and_nothing_else() -> None:
    """The first of stage 1 comes when its I is done; forwards and I keep their places."""
    order = PipelineSchedule(chunks(0, 5, microbatches=1), (_actions("0F0 1F0 1I0 0I0 0W0 1W0"),))
    moved = finishing_early(timed(order), lambda stage: -stage, "late first")
    assert " ".join(map(str, moved.orders[0])) == "0F0 1F0 1I0 0I0 1W0 0W0"
    kept = [action for action in moved.orders[0] if action.kind is not ActionKind.WEIGHT_GRADIENT]
    assert kept == [action for action in order.orders[0] if action.kind is not ActionKind.WEIGHT_GRADIENT]


def test_weight_gradients_of_a_stage_stay_in_order() -> None:
    """The oldest goes first."""
    order = PipelineSchedule(chunks(0), (_actions("0F0 0F1 0I0 0I1 0W0 0W1"),))
    assert finishing_early(timed(order), lambda stage: stage, "").orders == order.orders


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_johnsons_rule_is_the_best_of_all_orders_on_two_machines(jobs: list[tuple[int, int]]) -> None:
    """W of each stage on the one, its all-reduce on the other."""
    stages = tuple(Stage(0, 0, 0, weight, reduce_ns=reduce) for weight, reduce in jobs)
    problem = PipelineProblem(1, stages, (Route(tuple(range(len(jobs))), 1),))

    def end(order: Sequence[int]) -> int:
        first = second = 0
        for stage in order:
            first += jobs[stage][0]
            second = max(first, second) + jobs[stage][1]
        return second

    assert end(johnson(problem)) == min(map(end, permutations(range(len(jobs)))))


@pytest.mark.parametrize("text", ["0F0 1F0 1B0 0B0", "0F0 1F0 1B0 0I0 0W0"])
def test_whole_backwards_stay_where_they_are(text: str) -> None:
    """Their gradients pass on at their end, so that another order might never end."""
    order = PipelineSchedule(chunks(1, 5, microbatches=1), (_actions(text),))
    assert finishing_early(timed(order), lambda stage: -stage, "").orders == order.orders


def _actions(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.of, text.split()))
