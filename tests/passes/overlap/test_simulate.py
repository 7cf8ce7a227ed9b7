"""The simulator of overlap schedules follows its rules: small cases by hand, random ones by a second simulator."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.errors import InternalError, OptionError
from opweave.passes.overlap.problem import Mode, Problem, Schedule, Task
from opweave.passes.overlap.simulate import Simulator, given_modes, synchronous_waits, timed
from tests.passes.overlap.random_problems import ALL_REDUCE, layers, problems
from tests.passes.overlap.slow_simulator import replay


def compute(name: str, seconds: float, *before: int, lane: str = "compute", **needs: float) -> Task:
    return Task(name, lane, (Mode("kernel", seconds, needs or {"sm": 1.0}),), before)


def reduce(name: str, seconds: float, *before: int, **needs: float) -> Task:
    return Task(name, "nvlink", (Mode("nccl", seconds, needs, fixed=True),), before, collective=ALL_REDUCE)


def in_order(problem: Problem, streams: bool = True) -> Schedule:
    return timed(problem, range(len(problem.tasks)), given_modes(problem), streams=streams)


def test_collective_takes_its_part_of_the_machine_and_the_rest_slows_down() -> None:
    """A quarter of the multiprocessors is gone for 3 s: 4 s of work take 4 + 0.25 * 3 = 4.75 s."""
    problem = Problem((compute("a", 1), reduce("r", 3, 0, sm=0.25), compute("b", 4)))
    schedule = in_order(problem)
    assert schedule.start_s == (0, 1, 1)
    assert schedule.finish_s == pytest.approx((1, 4, 5.75))


def test_operators_share_what_is_scarce_in_proportion() -> None:
    """Both need 0.8 of the bandwidth: each runs at 1 / 1.6 until one is done."""
    problem = Problem((compute("a", 1, hbm=0.8), compute("b", 2, lane="near_memory", hbm=0.8)))
    assert in_order(problem).finish_s == pytest.approx((1.6, 2.6))


def test_start_waits_for_all_that_was_issued_before_it_with_streams_only() -> None:
    problem = Problem((compute("a", 1), compute("b", 5), reduce("r", 1, 0)))
    assert in_order(problem).start_s[2] == 6
    assert in_order(problem, streams=False).start_s[2] == 1
    early = timed(problem, (0, 2, 1), (0, 0, 0))
    assert early.start_s == (0, 1, 1)


def test_wait_of_a_collective_that_feeds_another_blocks_the_stream() -> None:
    """The second collective is started behind the first one's wait, and so is what is issued after it."""
    problem = Problem((reduce("r", 4), reduce("s", 1, 0), compute("a", 1)))
    assert in_order(problem).start_s[2] == 4
    assert timed(problem, (0, 2, 1), (0, 0, 0)).start_s[2] == 0
    assert in_order(problem, streams=False).start_s[2] == 0


def test_host_issues_launches_one_after_another() -> None:
    problem = Problem((compute("a", 1), Task("b", "compute", (Mode("k", 1),), launches=3), compute("c", 1)), issue_s=2)
    assert in_order(problem).start_s == (0, 2, 8)


def test_event_costs_between_lanes_only() -> None:
    problem = Problem((compute("a", 1), reduce("r", 1, 0), compute("b", 1, 1), compute("c", 1, 2)), event_s=0.25)
    assert in_order(problem).start_s == (0, 1.25, 2.5, 3.5)


def test_absorbed_task_takes_no_time_and_its_operands_are_the_collectives() -> None:
    """Fused with the collective, the normalisation is done when that is; the residual is then read at its start."""
    norm = Task("norm", "compute", (Mode("kernel", 2, {"sm": 1.0}),), (0, 1, 2))
    modes = (Mode("nccl", 3, fixed=True), Mode("fused", 4, fixed=True, absorbs=(3,)))
    collective = Task("r", "nvlink", modes, (0,), collective=ALL_REDUCE)
    tasks = (compute("a", 1), compute("residual", 2), collective, norm, compute("b", 1, 3))
    problem = Problem(tasks, issue_s=0.125)
    apart = timed(problem, (0, 2, 1, 3, 4), (0, 0, 0, 0, 0))
    assert (apart.start_s[3], apart.start_s[4]) == (4, 6)
    fused = timed(problem, (0, 1, 2, 3, 4), (0, 0, 1, 0, 0))
    assert (fused.start_s[2], fused.start_s[3], fused.finish_s[3], fused.start_s[4]) == (3, 7, 7, 7)


def test_bytes_live_until_all_that_free_them_are_done() -> None:
    """At 1 s the 5 bytes of a, at 2 s those of a, b and c are alive; a is free once b and c are done."""
    a = Task("a", "compute", (Mode("k", 1),), allocates_bytes=5)
    b = Task("b", "compute", (Mode("k", 1),), (0,), allocates_bytes=7, frees=(0,))
    c = Task("c", "near_memory", (Mode("k", 2),), (0,), allocates_bytes=1, frees=(0,))
    d = Task("d", "compute", (Mode("k", 1),), (1, 2), allocates_bytes=6, frees=(1, 2))
    assert in_order(Problem((a, b, c, d))).peak_bytes == 14


def test_synchronous_waits_leave_nothing_beside_a_collective() -> None:
    problem = layers(2, 2)
    order = range(len(problem.tasks))
    waits = synchronous_waits(problem, order)
    schedule = timed(problem, order, given_modes(problem), waits=waits)
    for index, task in enumerate(problem.tasks):
        if task.collective is not None:
            span = (schedule.start_s[index], schedule.finish_s[index])
            assert all(
                schedule.finish_s[i] <= span[0] or schedule.start_s[i] >= span[1] for i in order if i != index
            ), task.name


@pytest.mark.parametrize(
    ("order", "modes", "message"),
    [((1, 0), (0, 0), "'b' before"), ((0, 0), (0, 0), "each of the 2"), ((0, 1), (0, 1), "'b' has no mode 1")],
)
def test_wrong_schedules_are_refused(order: tuple[int, ...], modes: tuple[int, ...], message: str) -> None:
    problem = Problem((compute("a", 1), compute("b", 1, 0)))
    with pytest.raises(OptionError, match=message):
        timed(problem, order, modes)


@pytest.mark.parametrize(
    "task",
    [
        Task("x", "compute", ()),
        Task("x", "compute", (Mode("k", -1),)),
        Task("x", "compute", (Mode("k", float("nan")),)),
        Task("x", "compute", (Mode("k", 1, {"sm": 1.5}),)),
        Task("x", "compute", (Mode("k", 1),), before=(0,)),
        Task("x", "compute", (Mode("k", 1),), frees=(3,)),
        Task("x", "compute", (Mode("k", 1, absorbs=(0,)),)),
    ],
)
def test_problems_that_contradict_themselves_are_refused(task: Task) -> None:
    with pytest.raises(InternalError, match="'x'"):
        timed(Problem((task,)), (0,), (0,))


def test_nothing_takes_no_time() -> None:
    assert timed(Problem(()), (), ()).makespan_s == 0


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Problem, list[int], list[int], list[tuple[int, int]]]:
    """A problem, an order that every dependency allows, modes, and waits along the order."""
    problem = draw(problems())
    modes = [draw(st.integers(0, len(task.modes) - 1)) for task in problem.tasks]
    needed = [set(task.before) for task in problem.tasks]
    for index, mode in enumerate(modes):
        for other in problem.tasks[index].modes[mode].absorbs:
            needed[index] |= needed[other] - {index}
    order: list[int] = []
    while len(order) < len(needed):
        ready = [i for i, before in enumerate(needed) if i not in order and before <= set(order)]
        order.append(draw(st.sampled_from(ready)))
    count = draw(st.integers(0, 2)) if len(order) > 1 else 0
    places = [sorted(draw(st.sets(st.integers(0, len(order) - 1), min_size=2, max_size=2))) for _ in range(count)]
    absorbed = {other for i, mode in enumerate(modes) for other in problem.tasks[i].modes[mode].absorbs}
    waits = [(order[a], order[b]) for a, b in places if order[b] not in absorbed]
    return problem, order, modes, waits


@settings(max_examples=150, deadline=None)
@given(schedules(), st.booleans())
def test_agrees_with_a_second_simulator(
    case: tuple[Problem, list[int], list[int], list[tuple[int, int]]], streams: bool
) -> None:
    """Every start and finish; bytes alive, where what frees and what allocates at one moment may come either way."""
    problem, order, modes, waits = case
    schedule = timed(problem, order, modes, waits=waits, streams=streams)
    spans = replay(problem, order, modes, waits, streams)
    assert schedule.start_s == pytest.approx([float(start) for start, _ in spans], abs=1e-9)
    assert schedule.finish_s == pytest.approx([float(finish) for _, finish in spans], abs=1e-9)
    owner = {other: i for i, mode in enumerate(modes) for other in problem.tasks[i].modes[mode].absorbs}
    begin = [spans[owner.get(i, i)][0] for i in range(len(spans))]
    ends = [[spans[j][1] for j, task in enumerate(problem.tasks) if i in task.frees] for i in range(len(spans))]

    def alive(moment: Fraction, late: bool) -> int:
        there = [not users or max(users) > moment or (late and max(users) == moment) for users in ends]
        return sum(problem.tasks[i].allocates_bytes for i in range(len(spans)) if begin[i] <= moment and there[i])

    assert max(alive(moment, False) for moment in begin) <= schedule.peak_bytes
    assert schedule.peak_bytes <= max(alive(moment, True) for moment in begin)


def test_large_models_are_timed_at_once() -> None:
    """2,880 tasks of an 80-layer model in four parts: well below the 50 ms that a search can afford."""
    problem = layers(80, 4)
    simulator = Simulator(problem)
    order, modes = list(range(len(problem.tasks))), list(given_modes(problem))
    assert len(problem.tasks) > 2800
    simulator.measure(order, modes)  # compiles
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        simulator.measure(order, modes)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
