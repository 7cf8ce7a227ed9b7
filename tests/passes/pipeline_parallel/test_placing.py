"""Which rank has which stage: bounds and answers against all placements in all orders, and placements with names."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel._placements import (
    all_placements,
    average_bound,
    canonical,
    placement_bound,
    placements_below,
)
from opweave.passes.pipeline_parallel.placing import choose_placement, named_placements, on_ranks
from opweave.passes.pipeline_parallel.solution import Objective, within_limit
from tests.passes.pipeline_parallel.every_order import best_of_all

UNIT = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)
OBJECTIVES: tuple[Objective, ...] = ("makespan", "span")


@st.composite
def tiny(draw: st.DrawFn) -> PipelineProblem:
    """Two ranks, up to three stages, one or two microbatches, ranks that are alike or not."""
    few = st.integers(0, 3)
    stages = tuple(
        Stage(0, draw(few), draw(few), draw(few), until_weight_gradient_bytes=draw(few), forward_send_ns=draw(few))
        for _ in range(draw(st.integers(1, 3)))
    )
    microbatches = draw(st.integers(1, 2)) if len(stages) == 1 else 1
    limit = draw(st.none() | st.tuples(st.integers(3, 9), st.integers(3, 9)))
    shards = draw(st.none() | st.builds(Vocabulary, st.tuples(few, few), st.tuples(few, few), few, few))
    return PipelineProblem(2, stages, (Route(tuple(range(len(stages))), microbatches),), limit, shards)


@settings(max_examples=15, deadline=None)
@given(tiny(), st.sampled_from(OBJECTIVES))
def test_bounds_and_answers_enclose_the_best_of_all_placements(problem: PipelineProblem, objective: Objective) -> None:
    """Of the problem's stages on any ranks, in any orders."""
    found = [best_of_all(on_ranks(problem, ranks), objective, most=150) for ranks in _everywhere(problem)]
    assume(None not in found)
    best = min((value for value in found if value is not None and value >= 0), default=-1)
    budget = Budget.of_seconds(0.1)
    if best < 0:
        with pytest.raises(Infeasible):
            choose_placement(problem, budget, objective=objective)
        return
    assert average_bound(problem, objective) <= placement_bound(problem, objective, budget).value <= best
    solution = choose_placement(problem, budget, objective=objective)
    assert within_limit(solution.timed)
    assert solution.bound.value <= best <= solution.value


def _everywhere(problem: PipelineProblem) -> list[tuple[int, ...]]:
    """All ways that leave no rank without a stage, if there are enough; and as the problem has it, on rank 0."""
    ways = product(range(problem.ranks), repeat=len(problem.stages))
    used = min(problem.ranks, len(problem.stages))
    return [(0,) * len(problem.stages), *(way for way in ways if len(set(way)) == used)]


def test_placements_are_counted_once() -> None:
    """Stirling numbers of the second kind where ranks are alike, surjections where they are not."""
    assert len(list(all_placements(uniform(UNIT, placed("loop", 4, 2), 1)))) == 1701
    assert len(list(all_placements(uniform(UNIT, (0, 1, 0, 0, 0), 1)))) == 15
    different = msgspec.structs.replace(uniform(UNIT, (0, 1, 0), 1), memory_limit=(2, 3))
    assert len(set(all_placements(different))) == 2**3 - 2
    assert canonical(different, (1, 0, 1)) == (1, 0, 1)
    assert canonical(uniform(UNIT, (0, 1, 0), 1), (1, 0, 1)) == (0, 1, 0)


def test_placements_that_work_rules_out_are_left_out() -> None:
    """Two stages on each rank take 12, and start 1 or 2 later; three on one of them take 18."""
    problem = uniform(UNIT, (0, 1, 0, 1), 2)
    assert placements_below(problem, 16, "makespan", most=9) == [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)]
    assert placements_below(problem, 14, "makespan", most=9) == [(0, 1, 0, 1), (0, 1, 1, 0)]
    assert placements_below(problem, 13, "makespan", most=9) == []
    assert placements_below(problem, 16, "makespan", most=2) is None


@st.composite
def chains(draw: st.DrawFn) -> PipelineProblem:
    """Three ranks that are alike or not, three to five stages, sends of any length."""
    few = st.integers(0, 9)
    stages = tuple(Stage(0, draw(few), draw(few), 0, forward_send_ns=draw(few)) for _ in range(draw(st.integers(3, 5))))
    limit = draw(st.none() | st.just((1, 2, 3)))
    return PipelineProblem(3, stages, (Route(tuple(range(len(stages))), draw(st.integers(1, 3))),), limit)


@settings(max_examples=20, deadline=None)
@given(chains())
def test_the_bound_of_all_placements_is_no_more_than_that_of_any(problem: PipelineProblem) -> None:
    """Where the sends of the placement are counted as they are, and ranks work from their first forward on."""
    found = placement_bound(problem, "makespan", Budget.of_seconds(5)).value
    every = {ranks: _from_first_forward(problem, ranks) for ranks in all_placements(problem)}
    assert average_bound(problem, "makespan") <= found <= min(every.values())
    value = 1 + max(every.values()) // 2
    below = placements_below(problem, value, "makespan", most=99)
    assert below is not None
    assert {ranks for ranks, end in every.items() if end < value} <= set(below)


def _from_first_forward(problem: PipelineProblem, ranks: tuple[int, ...]) -> int:
    begin: dict[int, int] = {}
    work: dict[int, int] = {}
    now = 0
    for place, (stage, rank) in enumerate(zip(problem.stages, ranks, strict=True)):
        if place and ranks[place - 1] != rank:
            now += problem.stages[place - 1].forward_send_ns
        begin.setdefault(rank, now)
        work[rank] = work.get(rank, 0) + problem.microbatches * stage.work_ns
        now += stage.forward_ns
    return max(begin[rank] + work[rank] for rank in begin)


def test_many_ranks_are_bounded_by_counting() -> None:
    """Of 64 equal stages on 32 ranks the last rank begins behind 31, whoever it is, and has two."""
    problem = uniform(Stage(0, 3, 2, 2, forward_send_ns=1), placed("v", 32, 2), 50)
    assert placement_bound(problem, "makespan", Budget.of_seconds(1)).value == 31 * 4 + 50 * 14
    assert placement_bound(problem, "span", Budget.of_seconds(1)).value == 50 * 14


def test_between_the_limits_of_the_named_schedules_every_placement_is_ruled_out() -> None:
    """Four ranks, eight chunks, five activations each: 56 slots, which V reaches, and no placement less than that."""
    solution = choose_placement(uniform(UNIT, placed("loop", 4, 2), 8, memory_limit=5), Budget.of_seconds(4))
    assert (solution.value, solution.gap) == (56, 0)


def test_uneven_stages_want_uneven_placements() -> None:
    """A heavy stage is alone on its rank, three light ones are together: no placement with a name does that."""
    light, heavy = UNIT, Stage(0, 3, 3, 3, until_weight_gradient_bytes=1)
    problem = PipelineProblem(2, (light, light, light, heavy), (Route((0, 1, 2, 3), 6),))
    solution = choose_placement(problem, Budget.of_seconds(2))
    chosen = tuple(stage.rank for stage in solution.timed.schedule.problem.stages)
    assert chosen == (0, 0, 0, 1)
    assert solution.gap == 0
    named = [on_ranks(problem, ranks) for ranks in named_placements(2, 4).values()]
    assert all(max(other.work_ns) > solution.value for other in named)


def test_two_copies_count_where_they_are_wanted() -> None:
    """Chimera's case, four microbatches on four ranks without W: both ways in 10, one way in 11 at least."""
    problem = uniform(Stage(0, 1, 1, 0), placed("loop", 4), 4)
    assert choose_placement(problem, Budget.of_seconds(2)).value == 14
    assert choose_placement(problem, Budget.of_seconds(2), copies=True).value == 10


def test_two_routes_have_no_placement_to_choose() -> None:
    """It is not clear whose."""
    problem = msgspec.structs.replace(uniform(UNIT, (0, 1), 1), routes=(Route((0, 1), 1), Route((1, 0), 1)))
    with pytest.raises(OptionError, match="2 routes"):
        choose_placement(problem, Budget.of_seconds(1))
