"""Local search: never worse than list scheduling, the same every time, told to stop it stops, and it finds modes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from opweave.compiler.pipeline import Budget, Progress
from opweave.passes.overlap.improve import alike, improved
from opweave.passes.overlap.list_schedule import list_schedule
from opweave.passes.overlap.problem import Problem
from opweave.passes.overlap.simulate import given_modes, timed
from tests.passes.overlap.random_problems import layers, problems
from tests.passes.overlap.test_bounds import every_makespan


def budget() -> Budget:
    return Budget.of_seconds(60.0, deterministic=True)


@settings(max_examples=30, deadline=None)
@given(problems(most=10))
def test_never_worse_than_list_scheduling_nor_below_the_bound(problem: Problem) -> None:
    found = improved(problem, budget(), effort=5_000)
    assert found.bound_s <= found.makespan_s <= list_schedule(problem).makespan_s
    again = timed(problem, found.order, found.modes, waits=found.waits)
    assert (again.start_s, again.peak_bytes) == (found.start_s, found.peak_bytes)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(most=4))
def test_small_problems_are_solved(problem: Problem) -> None:
    """All orders and modes of up to four tasks: the search finds the best, as every one is a few moves away."""
    best = min(every_makespan(problem, streams=True))
    assert improved(problem, budget(), effort=8_000).makespan_s <= best * (1 + 1e-9) + 1e-9


def test_collectives_alike_get_modes_together() -> None:
    """Two kinds in each part, whatever the number of layers: behind attention, and behind the second block."""
    problem = layers(6, 2)
    kinds = alike(problem)
    assert sum(map(len, kinds)) == 24
    assert len(kinds) <= 6
    assert {index for kind in kinds for index in kind} == {
        index for index, task in enumerate(problem.tasks) if task.collective is not None
    }


def test_faster_modes_and_fused_normalisation_are_found() -> None:
    problem = layers(4, 2)
    found = improved(problem, budget(), effort=100_000)
    names = {task.modes[mode].name for task, mode in zip(problem.tasks, found.modes, strict=True) if task.collective}
    assert "fused/16" in names
    assert found.makespan_s < 0.96 * list_schedule(problem, given_modes(problem)).makespan_s
    assert found.makespan_s < 1.03 * found.bound_s


def test_same_problem_same_schedule_and_progress_only_goes_down() -> None:
    seen: list[Progress] = []
    problem = layers(2, 3)
    listening = Budget.of_seconds(60.0, deterministic=True, listen=seen.append)
    assert improved(problem, listening, effort=100_000) == improved(problem, budget(), effort=100_000)
    incumbents = [progress.incumbent or 0 for progress in seen]
    assert incumbents == sorted(incumbents, reverse=True)
    assert all(progress.bound is not None and progress.bound <= (progress.incumbent or 0) for progress in seen)


@pytest.mark.parametrize("deterministic", [True, False])
def test_told_to_stop_it_returns_what_it_has(deterministic: bool) -> None:
    stopped = Budget.of_seconds(60.0, deterministic=deterministic)
    stopped.stop.set()
    problem = layers(2, 2)
    assert improved(problem, stopped).makespan_s <= list_schedule(problem).makespan_s
