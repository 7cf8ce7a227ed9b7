"""Layers are found where they are; what is solved for one of them holds for all; 80 of them take seconds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Collective, CollectiveKind
from opweave.compiler.pipeline import Budget
from opweave.errors import OptionError
from opweave.passes.overlap.periodic import PeriodicOverlap
from opweave.passes.overlap.problem import Mode, Problem, Task
from opweave.passes.overlap.repeats import repeats
from opweave.passes.overlap.simulate import given_modes, timed

ALL_REDUCE = Collective(CollectiveKind.ALL_REDUCE, "tp", (0, 1), 8)


def _task(name: str, lane: str, seconds: float, *before: int) -> Task:
    collective = ALL_REDUCE if lane == "link" else None
    return Task(
        name, lane, (Mode("alone", seconds, {"sm": 0.2 if collective else 1.0}, lane == "link"),), before, collective
    )


@st.composite
def layered(draw: st.DrawFn) -> tuple[Problem, int, int]:
    """Some tasks of their own, then 4 to 7 equal layers of up to 5 tasks, then some; also period and count."""
    period, count, ahead = draw(st.integers(2, 5)), draw(st.integers(4, 7)), draw(st.integers(0, 3))
    lanes = [draw(st.sampled_from(("compute", "link"))) for _ in range(period)]
    seconds = [1.0 + i + draw(st.integers(0, 3)) / 8 for i in range(period)]  # all different: no shorter period
    back = [
        [d for d in range(1, min(2 * period, i + period) + 1) if draw(st.integers(0, 3)) == 0] for i in range(period)
    ]
    tasks = [_task(f"first{i}", "compute", 0.1 + i / 16) for i in range(ahead)]
    for layer in range(count):
        for i in range(period):
            here = len(tasks)
            before = [here - d for d in back[i] if layer > 1 or d <= i + layer * period]
            tasks.append(_task(f"t{layer}.{i}", lanes[i], seconds[i], *sorted(before)))
    tasks += [_task(f"last{i}", "compute", 0.2 + i / 16, len(tasks) - 1) for i in range(draw(st.integers(0, 2)))]
    return Problem(tuple(tasks)), period, count


@settings(max_examples=60, deadline=None)
@given(layered())
def test_layers_are_found(case: tuple[Problem, int, int]) -> None:
    """All of them but the first ones, which wait for less; each task is like the one a period later."""
    problem, period, count = case
    found = max(repeats(problem), key=lambda repeat: repeat.count * repeat.period)
    assert found.period == period
    assert found.count >= count - 2
    for i in range(found.begin, found.end - found.period):
        assert problem.tasks[i].modes == problem.tasks[i + found.period].modes
    for first, then, distance in found.edges:
        last = found.begin + (found.count - 1) * period
        assert last + first - distance * period in problem.tasks[last + then].before


def test_nothing_repeats_in_what_is_all_different() -> None:
    tasks = tuple(_task(f"t{i}", "compute", 1.0 + i / 8) for i in range(20))
    assert repeats(Problem(tasks)) == ()
    start = timed(Problem(tasks), range(20), [0] * 20)
    assert PeriodicOverlap().schedule(Problem(tasks), Budget.of_seconds(5)).order == start.order


@settings(max_examples=20, deadline=None)
@given(layered())
def test_a_period_holds_for_every_layer(case: tuple[Problem, int, int]) -> None:
    """Laid out for all layers: lanes take one task at a time, operands come first, and nothing beats the bound."""
    problem, _, _ = case
    (period,) = PeriodicOverlap(effort=0.02).periods(problem, Budget.of_seconds(20, deterministic=True))[:1]
    run = period.repeat
    begins = {
        i: period.start_s[(i - run.begin) % run.period] + (i - run.begin) // run.period * period.period_s
        for i in range(run.begin, run.end)
    }
    ends = {i: begin + problem.tasks[i].modes[0].seconds for i, begin in begins.items()}
    for i in range(run.begin, run.end):
        for j in problem.tasks[i].before:
            if j >= run.begin and i - j <= 2 * run.period:
                assert begins[i] >= ends[j] - 1e-9
    for lane in ("compute", "link"):
        mine = sorted((begins[i], ends[i]) for i in begins if problem.tasks[i].lane == lane)
        assert all(second[0] >= first[1] - 1e-9 for first, second in pairwise(mine))
    assert period.bound_s <= period.period_s * (1 + 1e-9)
    whole = timed(problem, range(len(problem.tasks)), given_modes(problem))
    assert whole.makespan_s >= (run.count - 2) * period.bound_s * (1 - 1e-9)


def _dense(layers: int, parts: int, faster: float = 1.0) -> Problem:
    """Dense tensor-parallel layers cut by tokens: matrix products, an all-reduce, a normalisation, and so on."""
    tasks: list[Task] = []
    last: list[tuple[int, ...]] = [()] * parts
    for layer in range(layers):
        keys: tuple[int, ...] = ()
        for part in range(parts):
            for block, seconds in (("attention", 2.2e-4), ("mlp", 3.2e-4)):
                before = tuple(sorted({*last[part], *(keys if block == "attention" else ())}))
                tasks.append(_task(f"{block}{layer}.{part}", "compute", seconds, *before))
                keys = (*keys, len(tasks) - 1) if block == "attention" else keys
                tasks.append(_task(f"reduce_{block}{layer}.{part}", "link", 1.2e-4 / faster, len(tasks) - 1))
                tasks.append(_task(f"norm_{block}{layer}.{part}", "compute", 1e-5, len(tasks) - 1))
                last[part] = (len(tasks) - 1,)
    tasks = [replace(task, part=int(task.name.rpartition(".")[2])) for task in tasks]
    return Problem(tuple(tasks), issue_s=2e-6, event_s=1e-6)


def test_eighty_layers() -> None:
    """Solved in seconds, far better than the program's order, and within 3 % of the bound; cut by no clock."""
    problem = _dense(80, 2)
    order = timed(problem, range(len(problem.tasks)), given_modes(problem))
    found = PeriodicOverlap().schedule(problem, Budget.of_seconds(30, deterministic=True))
    assert found.makespan_s < 0.9 * order.makespan_s
    assert found.makespan_s <= 1.03 * found.bound_s
    again = PeriodicOverlap().schedule(problem, Budget.of_seconds(30, deterministic=True))
    assert again == found


def test_modes_reach_into_the_next_layer() -> None:
    """An all-reduce that also does the normalisation behind it, which begins the next layer: chosen, and done once."""
    plain = _dense(20, 2)
    tasks = list(plain.tasks)
    for i, task in enumerate(tasks):
        if task.collective is not None:
            fused = Mode("fused", task.modes[0].seconds * 1.02, task.modes[0].needs, True, (i + 1,))
            tasks[i] = replace(task, modes=(*task.modes, fused))
    found = PeriodicOverlap().schedule(replace(plain, tasks=tuple(tasks)), Budget.of_seconds(30, deterministic=True))
    without = PeriodicOverlap().schedule(plain, Budget.of_seconds(30, deterministic=True))
    assert found.makespan_s < without.makespan_s - 20 * 2 * 1e-5
    assert sum(mode == 1 for mode in found.modes) >= 70


def test_start_is_kept_where_nothing_is_better() -> None:
    """A schedule to begin with, here from the method itself, is never made worse; without time it is the answer."""
    problem = _dense(6, 2)
    first = PeriodicOverlap().schedule(problem, Budget.of_seconds(30, deterministic=True))
    second = PeriodicOverlap().schedule(problem, Budget.of_seconds(30, deterministic=True), first)
    assert second.makespan_s <= first.makespan_s
    assert PeriodicOverlap().schedule(problem, Budget.of_seconds(0), first).order == first.order
    limited = replace(problem, memory_limit_bytes=0)
    assert PeriodicOverlap().schedule(limited, Budget.of_seconds(5)).peak_bytes == 0


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="max_tasks"):
        PeriodicOverlap(max_tasks=-1)
