"""Choosing among problems: what is looked at, what the bound holds for, and what is left when limits cannot be kept."""

from __future__ import annotations

import pytest

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.schedule import PipelineSchedule
from opweave.errors import Infeasible
from opweave.passes.pipeline_parallel import _choosing
from opweave.passes.pipeline_parallel._choosing import Choice, best_choice, quick
from opweave.passes.pipeline_parallel.named import named
from opweave.passes.pipeline_parallel.solution import Bound


def lasting(length: int, limit: int | None = None) -> PipelineProblem:
    """One stage and microbatch that take so long, and hold 1 byte."""
    return uniform(Stage(0, length, 0, 0, until_weight_gradient_bytes=1), (0,), 1, memory_limit=limit)


def choices(*lengths: int) -> list[Choice]:
    """One for each length, named after it."""
    return [Choice(str(length), lasting(length)) for length in lengths]


def test_the_best_is_chosen_and_only_what_may_be_better_is_looked_at() -> None:
    """The others' bounds reach its value."""
    solution = best_choice(choices(7, 5, 9), Budget.of_seconds(1))
    assert (solution.value, solution.bound.value) == (5, 5)
    assert [attempt.method for attempt in solution.attempts] == ["5"]


def test_all_have_values_where_they_are_compared() -> None:
    """In the order of what they reach."""
    solution = best_choice(choices(7, 5, 9), Budget.of_seconds(1), all_valued=True)
    assert [(attempt.method, attempt.value) for attempt in solution.attempts] == [("5", 5), ("7", 7), ("9", 9)]


def test_what_may_still_be_better_is_not_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound one below the best value that is known is worth a look."""
    weak = {5: 1, 4: 4}
    monkeypatch.setattr(
        _choosing, "lower_bound", lambda problem, objective: Bound(weak[problem.stages[0].forward_ns], "analytic")
    )
    assert best_choice(choices(5, 4), Budget.of_seconds(1)).value == 4


def test_the_bound_holds_for_every_choice_and_for_others() -> None:
    """The least of all, or the value itself where that is less."""
    assert best_choice(choices(5), Budget.of_seconds(1), others=Bound(3, "cp")).bound == Bound(3, "cp")
    assert best_choice(choices(5), Budget.of_seconds(1), others=Bound(8, "cp")).bound.value == 5


def test_hints_are_taken_where_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a list schedule the hint is all there is; it is made only if the choice is looked at."""
    made: list[str] = []

    def hint(problem: PipelineProblem) -> list[PipelineSchedule]:
        made.append(problem.name)
        return [named("gpipe", problem)]

    monkeypatch.setattr(_choosing, "quick", lambda problem, objective: None)
    near, far = lasting(3), lasting(8)
    listed = [Choice("near", near, lambda: hint(near)), Choice("far", far, lambda: hint(far))]
    assert best_choice(listed, Budget.of_seconds(1)).value == 3
    assert len(made) == 1


def test_limits_that_cannot_be_kept_drop_out() -> None:
    """With their bounds; if none can be kept the least that is needed is said."""
    tight = Choice("tight", lasting(2, limit=0))
    solution = best_choice([tight, Choice("wide", lasting(6, limit=1))], Budget.of_seconds(1))
    assert (solution.value, solution.bound.value) == (6, 6)
    with pytest.raises(Infeasible) as caught:
        best_choice([tight, Choice("other", lasting(1, limit=0))], Budget.of_seconds(1))
    assert caught.value.required_bytes == 1


def test_list_schedules_that_exceed_the_limit_do_not_count() -> None:
    """There is none, or one within it."""
    assert quick(lasting(2, limit=0), "makespan") is None
    line = quick(lasting(2, limit=1), "makespan")
    assert line is not None
    assert line.makespan_ns == 2
