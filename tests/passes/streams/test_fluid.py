"""The model of interference, on cases small enough to work out by hand, and what it can never promise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import OpKind
from opweave.compiler.plan import Plan
from opweave.compiler.simulate import simulate
from opweave.hw_models.model import Concurrency
from opweave.hw_models.registry import load
from opweave.passes.streams.fluid import run
from opweave.passes.streams.tasks import Task, bound_s, tasks_of, upward_ranks
from tests.graphs.build import GraphBuilder

FREE = Concurrency(streams=4, issue_s=0.0, event_s=0.0, saturating_elements=1)


def spans(
    *tasks: Task, queues: str, before: dict[int, tuple[int, ...]] | None = None, **costs: float
) -> list[tuple[float, float]]:
    concurrency = Concurrency(
        streams=4, issue_s=costs.get("issue_s", 0.0), event_s=costs.get("event_s", 0.0), saturating_elements=1
    )
    needed = [(before or {}).get(step, ()) for step in range(len(tasks))]
    return run(tasks, list(queues), needed, concurrency)


def test_small_operators_overlap_and_large_ones_take_turns() -> None:
    small, large = Task(0.0, 1.0, 0.5), Task(0.0, 1.0, 1.0)
    assert spans(small, small, queues="ab") == [(0.0, 1.0), (0.0, 1.0)]
    assert spans(large, large, queues="ab") == [(0.0, 2.0), (0.0, 2.0)]
    assert spans(small, small, queues="aa") == [(0.0, 1.0), (1.0, 2.0)]


def test_launches_overlap_with_everything() -> None:
    task = Task(1.0, 2.0, 1.0)
    assert spans(task, task, queues="ab") == [(0.0, 5.0), (0.0, 5.0)]
    assert spans(Task(1.0, 2.0, 1.0), Task(3.0, 1.0, 1.0), queues="ab") == [(0.0, 3.0), (0.0, 4.0)]


def test_what_is_left_speeds_up_when_another_is_done() -> None:
    """Together at 2/3 speed until the short one is done after 1.5 s; the other one has done 1 s of its 3."""
    assert spans(Task(0.0, 1.0, 0.75), Task(0.0, 3.0, 0.75), queues="ab") == [(0.0, 1.5), (0.0, pytest.approx(3.5))]


def test_waiting_for_another_queue_costs_an_event() -> None:
    task = Task(0.0, 1.0, 0.1)
    assert spans(task, task, queues="ab", before={1: (0,)}, event_s=0.25)[1] == (1.25, 2.25)
    assert spans(task, task, queues="aa", before={1: (0,)}, event_s=0.25)[1] == (1.0, 2.0)


def test_operators_are_issued_one_after_another() -> None:
    task = Task(0.0, 1.0, 0.1)
    assert spans(task, task, task, queues="abc", issue_s=0.5) == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]


def test_copies_neither_slow_down_nor_are_slowed() -> None:
    large, copy = Task(0.0, 1.0, 1.0), Task(0.0, 3.0, 0.0, "dma")
    assert spans(large, large, copy, queues="abd") == [(0.0, 2.0), (0.0, 2.0), (0.0, 3.0)]


def test_what_returns_is_behind_everything() -> None:
    receive, back = Task(0.0, 0.0, 0.0, receives=True), Task(0.0, 0.0, 0.0, returns=True)
    task = Task(0.0, 1.0, 1.0)
    assert spans(task, receive, back, task, queues="aaab") == [(0.0, 2.0), (0.0, 0.0), (2.0, 2.0), (0.0, 2.0)]


TASKS = st.builds(Task, st.integers(0, 3).map(float), st.integers(0, 5).map(float), st.sampled_from([0.1, 0.4, 1.0]))


@settings(deadline=None)
@given(st.lists(st.tuples(TASKS, st.integers(0, 2), st.sets(st.integers(0, 10), max_size=3)), max_size=10))
def test_no_assignment_beats_the_bound(steps: list[tuple[Task, int, set[int]]]) -> None:
    """Nor is anything faster than alone, or started before what it waits for."""
    tasks = [task for task, _, _ in steps]
    before = [tuple(sorted(o for o in others if o < step)) for step, (_, _, others) in enumerate(steps)]
    times = run(tasks, [str(queue) for _, queue, _ in steps], before, FREE)
    assert max((finish for _, finish in times), default=0.0) >= bound_s(tasks, before, FREE) - 1e-9
    for step, (start, finish) in enumerate(times):
        assert finish - start >= tasks[step].alone_s - 1e-9
        assert all(times[other][1] <= start for other in before[step])


def test_upward_ranks_are_longest_chains() -> None:
    tasks = [Task(0.0, float(seconds), 1.0) for seconds in (1, 5, 2, 1)]
    assert upward_ranks(tasks, [(), (0,), (0,), (1, 2)]) == [7.0, 6.0, 3.0, 1.0]


def test_work_is_the_roofline_whatever_the_share() -> None:
    """An operator too small for the machine takes longer on a part of it; seconds times share stay the same."""
    build = GraphBuilder("sizes")
    for number in range(8):
        build.unary("relu", build.input(f"x{number}", 1 << (10 + 2 * number)), f"y{number}")
    machine = load("h100-sxm")
    plan = Plan.of_order(build.build("y7"), machine)
    assert machine.concurrency is not None
    tasks = tasks_of(plan, machine.concurrency)
    timed = simulate(plan).instructions
    assert tasks[0].share < 0.1 < 1.0 == tasks[-1].share
    for task, instruction, op in zip(tasks, timed, plan.graph.ops, strict=True):
        assert op.kind is OpKind.COMPUTE
        assert instruction.start_s is not None
        assert instruction.finish_s is not None
        seconds = instruction.finish_s - instruction.start_s
        assert task.launch_s + task.body_s * task.share == pytest.approx(seconds)
        assert task.alone_s >= seconds * (1 - 1e-9)
