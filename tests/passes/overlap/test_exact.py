"""Bounds and orders of one layer, held against every order and every mode of tiny problems."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Collective, CollectiveKind
from opweave.compiler.pipeline import Budget
from opweave.errors import OptionError
from opweave.passes.overlap._cp_sat import minimised
from opweave.passes.overlap._relaxed import Relaxed
from opweave.passes.overlap.bounds import bound_of
from opweave.passes.overlap.exact import ExactOverlap
from opweave.passes.overlap.lower_bound import least_of
from opweave.passes.overlap.problem import Mode, Problem, Task
from opweave.passes.overlap.simulate import Simulator, given_modes

LANES = ("compute", "copy", "link")
ALL_REDUCE = Collective(CollectiveKind.ALL_REDUCE, "tp", (0, 1), 8)


@st.composite
def modes(draw: st.DrawFn, lane: str) -> tuple[Mode, ...]:
    fixed = lane == "link" and draw(st.booleans())
    needs = st.dictionaries(st.sampled_from(("sm", "hbm")), st.sampled_from((0.25, 0.4, 0.75, 1.0)), max_size=2)
    count = draw(st.integers(1, 2)) if lane == "link" else 1
    return tuple(Mode(f"m{m}", draw(st.integers(0, 6)) / 2, draw(needs), fixed) for m in range(count))


@st.composite
def problems(draw: st.DrawFn, most: int = 5) -> Problem:
    """Problems with everything in them: modes that are fixed, that absorb, launches, events, bytes that die."""
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, most))):
        lane = draw(st.sampled_from(LANES))
        before = tuple(j for j in range(i) if draw(st.integers(0, 2)) == 0)
        frees = tuple(j for j in (*before, i) if draw(st.integers(0, 1)) == 0)  # what frees bytes has read them
        collective = ALL_REDUCE if lane == "link" else None
        size = draw(st.integers(0, 3))
        tasks.append(Task(f"t{i}", lane, draw(modes(lane)), before, collective, allocates_bytes=size, frees=frees))
    if draw(st.booleans()):
        tasks = _with_absorption(tasks)
    return Problem(tuple(tasks), draw(st.sampled_from((0.0, 0.5))), draw(st.sampled_from((0.0, 0.25))))


def _with_absorption(tasks: list[Task]) -> list[Task]:
    """The first collective gets a mode that does the next task that waits for it, too."""
    for i, task in enumerate(tasks):
        after = [j for j in range(i + 1, len(tasks)) if i in tasks[j].before and tasks[j].collective is None]
        if task.collective is not None and after:
            fused = replace(task.modes[0], name="fused", seconds=task.modes[0].seconds + 0.5, absorbs=(after[0],))
            return [*tasks[:i], replace(task, modes=(*task.modes, fused)), *tasks[i + 1 :]]
    return tasks


def _least(problem: Problem) -> float:
    """The least makespan of all orders and modes within the memory limit; infinite where there is none."""
    simulator = Simulator(problem, streams=False)
    best = float("inf")
    for chosen in product(*(range(len(task.modes)) for task in problem.tasks)):
        for order in permutations(range(len(problem.tasks))):
            seconds, peak = simulator.measure(order, chosen)
            if problem.memory_limit_bytes is None or peak <= problem.memory_limit_bytes:
                best = min(best, seconds)
    return best


@settings(max_examples=30, deadline=None)
@given(problems())
def test_no_schedule_undercuts_the_bound(problem: Problem) -> None:
    """Neither the arithmetic bound nor the solver's; and the schedule is at least that of the program's order."""
    least = _least(problem)
    found = ExactOverlap(0.05, streams=False).schedule(problem, Budget.of_seconds(20, deterministic=True))
    given = Simulator(problem, streams=False).measure(range(len(problem.tasks)), given_modes(problem))[0]
    assert bound_of(problem) <= least * (1 + 1e-9) + 1e-12
    assert found.bound_s <= least * (1 + 1e-9) <= found.makespan_s * (1 + 2e-9)
    assert found.makespan_s <= given


@settings(max_examples=40, deadline=None)
@given(problems(), st.one_of(st.none(), st.integers(1, 9)))
def test_model_is_a_relaxation(problem: Problem, limit: int | None) -> None:
    """The program's own bound, not capped by what was found: it leaves room for the best schedule there is."""
    problem = replace(problem, memory_limit_bytes=limit)
    least = _least(problem)
    if 0 < least < float("inf"):
        relaxed = Relaxed(problem, least_of(problem), least * 1.0001)
        outcome = minimised(relaxed.model, Budget.of_seconds(20, deterministic=True), effort=0.05)
        assert not outcome.infeasible
        assert outcome.bound * relaxed.unit_s <= least * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(3, 8))
def test_memory_limit_is_kept(problem: Problem, limit: int) -> None:
    """Where the program's order keeps it, so does the answer, and the bound is one on what keeps it."""
    limited = replace(problem, memory_limit_bytes=limit)
    given = Simulator(limited, streams=False).timed(range(len(limited.tasks)), given_modes(limited))
    if given.peak_bytes <= limit:
        found = ExactOverlap(streams=False).schedule(limited, Budget.of_seconds(20, deterministic=True))
        assert found.peak_bytes <= limit
        assert found.bound_s <= _least(limited) * (1 + 1e-9)


@pytest.mark.parametrize(("limit", "least"), [(4, 1.0), (3, 2.0), (2, 2.0), (1, None)])
def test_model_counts_bytes(limit: int, least: float | None) -> None:
    """Two tasks of a second on two lanes, two bytes each until they end: side by side only where four bytes fit."""
    pair = tuple(Task(f"t{i}", LANES[i], (Mode("m", 1.0),), allocates_bytes=2, frees=(i,)) for i in range(2))
    problem = Problem(pair, memory_limit_bytes=limit)
    relaxed = Relaxed(problem, least_of(problem), 4.0)
    outcome = minimised(relaxed.model, Budget.of_seconds(20, deterministic=True), effort=1.0)
    assert outcome.infeasible == (least is None)
    if least is not None:
        assert outcome.bound * relaxed.unit_s == pytest.approx(least, rel=1e-3)


def layer(parts: int = 2, layers: int = 1) -> Problem:
    """A dense tensor-parallel layer cut by tokens: two all-reduces a part, in one of three numbers of programs."""
    tasks: list[Task] = []
    last: list[tuple[int, ...]] = [()] * parts

    def add(name: str, seconds: float, need: str, before: tuple[int, ...], part: int) -> tuple[int, ...]:
        needs = {"sm": 1.0, "hbm": 0.4} if need == "sm" else {"sm": 0.5, "hbm": 1.0}
        tasks.append(Task(name, "compute", (Mode("alone", seconds, needs),), before, part=part))
        return (len(tasks) - 1,)

    def reduce(name: str, before: tuple[int, ...], part: int) -> tuple[int, ...]:
        ways = tuple(
            Mode(f"{n}", seconds, {"sm": n / 132, "hbm": 0.2}, True) for n, seconds in ((4, 1.2e-4), (8, 9e-5))
        )
        tasks.append(Task(name, "link", ways, before, ALL_REDUCE, part=part))
        return (len(tasks) - 1,)

    for number in range(layers):
        keys: tuple[int, ...] = ()
        for part in range(parts):
            mark = f"{number}.{part}"
            qkv = add(f"qkv{mark}", 9e-5, "sm", last[part], part)
            keys = (*keys, *qkv)
            out = add(f"attention{mark}", 1.2e-4 + 2e-5 * part, "sm", keys, part)
            norm = add(f"norm{mark}", 1e-5, "hbm", reduce(f"reduce_a{mark}", out, part), part)
            down = add(f"mlp{mark}", 3.2e-4, "sm", norm, part)
            last[part] = reduce(f"reduce_m{mark}", down, part)
    return Problem(tuple(tasks), 2e-6, 1e-6)


def test_same_answer_every_time() -> None:
    """Cut short by work, not by a clock, in deterministic mode."""
    method, problem = ExactOverlap(effort=0.02), layer()
    first, second = (method.schedule(problem, Budget.of_seconds(60, deterministic=True)) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_layer_is_nearly_closed() -> None:
    """A layer in two parts: the model proves more than the arithmetic, to within 1 % of what the simulator runs."""
    problem = layer()
    found = ExactOverlap(effort=5.0).schedule(problem, Budget.of_seconds(60, deterministic=True))
    assert found.proved_by == "cp"
    assert found.bound_s > bound_of(problem)
    assert found.makespan_s <= 1.01 * found.bound_s


def test_without_time_or_tasks() -> None:
    """What cannot be searched is answered by the program's order, with the arithmetic bound."""
    problem = layer()
    given = Simulator(problem).timed(range(len(problem.tasks)), given_modes(problem))
    for method, seconds in ((ExactOverlap(), 0.0), (ExactOverlap(max_tasks=3), 5.0)):
        found = method.schedule(problem, Budget.of_seconds(seconds))
        assert (found.order, found.start_s) == (given.order, given.start_s)
        assert found.proved_by == "analytic"
        assert 0 < found.bound_s <= bound_of(problem)
    empty = ExactOverlap().schedule(Problem(()), Budget.of_seconds(5))
    assert (empty.makespan_s, empty.bound_s) == (0.0, 0.0)


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="effort"):
        ExactOverlap(effort=0)
