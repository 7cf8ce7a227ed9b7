"""Counting proves no more than is so, and more than arithmetic where ranks starve for memory."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel.bounds import lower_bound
from opweave.passes.pipeline_parallel.count import bound_by_counting, steps_for
from opweave.passes.pipeline_parallel.solution import Bound
from tests.passes.pipeline_parallel.every_order import best_of_all, problems

UNIT = Stage(0, 1, 1, 1, until_weight_gradient_bytes=1)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 3), st.booleans())
def test_no_schedule_undercuts_the_bound(problem: PipelineProblem, unit: int, whole_numbers: bool) -> None:
    """Begun from nothing, so that every row is needed; also in steps that cut off parts of times."""
    best = best_of_all(problem, "makespan", most=800)
    assume(best is not None and best > 0)
    assert best is not None
    found = bound_by_counting(
        problem,
        Budget.of_seconds(60, deterministic=True),
        bound=Bound(0, "analytic"),
        most=best + 2 * unit,
        unit=unit,
        whole_numbers=whole_numbers,
        effort=1.0,
    )
    assert found.value <= best


def test_counting_closes_what_arithmetic_leaves_open() -> None:
    """Two microbatches in flight on four ranks: the optimum is 41; fractions of microbatches do with less."""
    problem = uniform(UNIT, placed("loop", 4), 8, memory_limit=2)
    budget = Budget.of_seconds(60, deterministic=True)
    bound = lower_bound(problem)
    fractions = bound_by_counting(problem, budget, bound=bound, most=41, unit=1)
    whole = bound_by_counting(problem, budget, bound=bound, most=41, unit=1, whole_numbers=True)
    assert bound.value <= fractions.value <= whole.value == 41
    assert whole.proved_by == "cp"


def test_steps_lose_little() -> None:
    """Times of 30, 30 and 21 go into steps of 10 with 1 left; into 7, the least that allows as many, with 4."""
    problem = uniform(Stage(0, 30, 30, 21), placed("loop", 2), 4)
    assert steps_for(problem, 2000, steps=290) == 10
    with pytest.raises(OptionError, match="steps"):
        bound_by_counting(problem, Budget.of_seconds(1), bound=Bound(0, "analytic"), most=1, unit=0)
