"""List schedules: never slower than the given order, no deadlock, within memory; and they overlap what can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.errors import Infeasible
from opweave.passes.overlap.list_schedule import list_schedule
from opweave.passes.overlap.problem import Mode, Problem, Schedule, Task
from opweave.passes.overlap.simulate import given_modes, synchronous_waits, timed
from tests.passes.overlap.random_problems import ALL_REDUCE, layers, problems


def program(problem: Problem, synchronous: bool = False) -> Schedule:
    order = range(len(problem.tasks))
    waits = synchronous_waits(problem, order) if synchronous else ()
    return timed(problem, order, given_modes(problem), waits=waits)


def runs(schedule: Schedule) -> None:
    """The order keeps every dependency, everything is done, and its own times are those of a second evaluation."""
    problem = schedule.problem
    place = {index: k for k, index in enumerate(schedule.order)}
    assert sorted(place) == list(range(len(problem.tasks)))
    for index, task in enumerate(problem.tasks):
        assert all(place[other] < place[index] for other in task.before)
        assert schedule.finish_s[index] >= schedule.start_s[index] >= 0
    assert schedule.makespan_s < float("inf")


def within(problem: Problem) -> tuple[Schedule | None, int]:
    """A schedule, or the bytes that would do."""
    try:
        return list_schedule(problem), 0
    except Infeasible as refusal:
        return None, refusal.required_bytes


@settings(max_examples=100, deadline=None)
@given(problems(most=12), st.booleans())
def test_never_slower_than_the_given_order_and_never_stuck(problem: Problem, streams: bool) -> None:
    schedule = list_schedule(problem, streams=streams)
    runs(schedule)
    given_order = timed(problem, range(len(problem.tasks)), given_modes(problem), streams=streams)
    assert schedule.makespan_s <= given_order.makespan_s
    assert schedule.bound_s <= schedule.makespan_s


@settings(max_examples=100, deadline=None)
@given(problems(most=12, limited=True))
def test_memory_limit_is_kept_or_refused_with_what_would_do(problem: Problem) -> None:
    """What the refusal says would do does; an order that fits as it is given is never refused."""
    limit = problem.memory_limit_bytes
    assert limit is not None
    given_orders = [program(problem, synchronous) for synchronous in (False, True)]
    schedule, required = within(problem)
    if schedule is None:
        assert min(given_order.peak_bytes for given_order in given_orders) > limit
        assert required > limit
        enough = Problem(problem.tasks, problem.issue_s, problem.event_s, required)
        assert list_schedule(enough).peak_bytes <= required
        return
    runs(schedule)
    assert schedule.peak_bytes <= limit
    for given_order in given_orders:
        if given_order.peak_bytes <= limit:
            assert schedule.makespan_s <= given_order.makespan_s


def test_parts_take_turns_and_hide_each_others_collectives() -> None:
    """Each part computes while the other's sums are reduced: only the last collective, and no other, is exposed."""
    problem = layers(4, 2)
    schedule = list_schedule(problem)
    compute = sum(t.modes[0].seconds for t in problem.tasks if t.collective is None)
    last = max(t.modes[0].seconds for t in problem.tasks if t.collective is not None)
    assert schedule.makespan_s < compute * 1.10 + last  # what collectives take of the machine slows compute down
    names = [problem.tasks[i].name for i in schedule.order]
    assert names[:5] == ["norm0.0", "qkv0.0", "attention0.0", "out0.0", "reduce0.0"]


def test_start_is_issued_before_what_needs_another_result() -> None:
    """Starts before waits: the second start does not sit behind the wait of the first."""
    problem = layers(2, 2)
    names = [problem.tasks[i].name for i in list_schedule(problem).order]
    assert names.index("reduce0.1") < names.index("norm_0.0")


def test_work_that_no_collective_hangs_on_fills_the_gaps() -> None:
    """Weight gradients come after what feeds the next collective, and run while it is in flight."""
    kernel = (Mode("k", 1.0, {"sm": 1.0}),)
    tasks: list[Task] = []
    for layer in range(3):
        before = (len(tasks) - 1,) if layer else ()
        tasks.append(Task(f"weights{layer}", "compute", kernel, before))
        tasks.append(Task(f"inputs{layer}", "compute", kernel, before))
        tasks.append(Task(f"reduce{layer}", "nvlink", (Mode("nccl", 1.0),), (len(tasks) - 1,), collective=ALL_REDUCE))
    problem = Problem(tuple(tasks))
    assert program(problem, synchronous=True).makespan_s == 9
    assert list_schedule(problem).makespan_s == 6 + 1 - 1


def test_prefetch_of_weights_is_limited_by_memory() -> None:
    """Gathers need nothing: without a limit all are issued early; with one, two layers' weights live at a time."""
    tasks: list[Task] = []
    for layer in range(6):
        gather = Task(f"gather{layer}", "nvlink", (Mode("nccl", 1.0),), collective=ALL_REDUCE, allocates_bytes=100)
        tasks.append(gather)
        before = (len(tasks) - 1, *((len(tasks) - 2,) if layer else ()))
        frees = (len(tasks) - 1,)
        tasks.append(
            Task(f"layer{layer}", "compute", (Mode("k", 1.0, {"sm": 1.0}),), tuple(sorted(before)), frees=frees)
        )
    for limit, makespan in ((None, 7), (200, 7), (100, 12)):
        schedule = list_schedule(Problem(tuple(tasks), memory_limit_bytes=limit))
        assert schedule.makespan_s == makespan
        assert limit is None or schedule.peak_bytes <= limit
    with pytest.raises(Infeasible) as refusal:
        list_schedule(Problem(tuple(tasks), memory_limit_bytes=99))
    assert refusal.value.required_bytes == 100


def test_same_problem_same_schedule() -> None:
    problem = layers(3, 3)
    assert list_schedule(problem) == list_schedule(problem)
