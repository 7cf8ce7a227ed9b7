"""No schedule undercuts the bounds, and they are tight where one thing alone decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings

from opweave.passes.overlap.bounds import bound_of, bounds
from opweave.passes.overlap.problem import Mode, Problem, Task
from opweave.passes.overlap.simulate import Simulator
from tests.passes.overlap.random_problems import layers, problems


def every_makespan(problem: Problem, streams: bool) -> Iterator[float]:
    """Of all orders and modes; infinite where one contradicts a dependency."""
    simulator = Simulator(problem, streams=streams)
    choices = [range(len(task.modes)) for task in problem.tasks]
    for order in itertools.permutations(range(len(problem.tasks))):
        place = {index: k for k, index in enumerate(order)}
        if all(place[other] < place[i] for i, task in enumerate(problem.tasks) for other in task.before):
            for modes in itertools.product(*choices):
                yield simulator.measure(order, modes)[0]


@settings(max_examples=60, deadline=None)
@given(problems(most=5))
def test_no_schedule_undercuts_a_bound(problem: Problem) -> None:
    best = min(every_makespan(problem, streams=False))
    for name, bound in bounds(problem).items():
        assert bound <= best * (1 + 1e-9) + 1e-9, name


def test_bound_says_what_is_scarce() -> None:
    """A path, a lane with heads and tails, a resource that two lanes share, and the host."""

    def task(name: str, lane: str, seconds: float, *before: int, **needs: float) -> Task:
        return Task(name, lane, (Mode("k", seconds, needs),), before)

    path = Problem((task("a", "x", 2), task("b", "y", 3, 0), task("c", "x", 1, 1)), event_s=0.5)
    assert bounds(path)["path"] == 2 + 0.5 + 3 + 0.5 + 1
    lane = Problem((task("a", "y", 1), task("b", "x", 2, 0), task("c", "x", 2, 0), task("d", "y", 1, 1, 2)))
    assert bounds(lane)["lane x"] == 1 + 4 + 1
    shared = Problem((task("a", "x", 2, hbm=1.0), task("b", "y", 2, hbm=0.5)))
    assert bounds(shared)["resource hbm"] == 3
    host = Problem(tuple(task(f"t{i}", "x", 0) for i in range(5)), issue_s=2)
    assert bounds(host)["launches"] == 8


def test_launches_of_all_that_comes_before_hold_a_task_back() -> None:
    """Three tasks are issued before the fourth, which takes a second."""
    free = tuple(Task(f"t{i}", f"lane{i}", (Mode("k", 0),)) for i in range(3))
    problem = Problem((*free, Task("last", "x", (Mode("k", 1),), (0, 1, 2))), issue_s=1)
    assert bounds(problem)["path"] == 4


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_fastest_modes_decide(parts: int) -> None:
    """The bound is over all modes: it is below what the fastest modes take, and above what nothing takes."""
    problem = layers(2, parts)
    assert 0 < bound_of(problem) <= sum(min(mode.seconds for mode in task.modes) for task in problem.tasks)


def test_nothing_has_no_bound() -> None:
    assert bound_of(Problem(())) == 0
