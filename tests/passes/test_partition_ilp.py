"""The partition of least time: against every partition of small graphs, and what must hold of larger ones."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.partition import Partition, PartitionProblem, SavedValue, Step
from opweave.compiler.pipeline import Budget, Progress
from opweave.errors import Infeasible, InternalError, ModelError, OptionError
from opweave.passes.partition.ilp import IlpPartition


def _choose(problem: PartitionProblem, limit_bytes: int, seconds: float = 20.0) -> Partition:
    return IlpPartition().choose(problem, limit_bytes, Budget.of_seconds(seconds, workers=1, deterministic=True))


def _exhaustive(problem: PartitionProblem, limit_bytes: int) -> int | None:
    """The least time over every way to keep, offload or drop each value; ``None`` if none fits."""
    ways = [
        ("drop", *(["keep"] if value.can_keep else []), *(["offload"] if value.can_offload else []))
        if value.producer is not None
        else ("drop",)
        for value in problem.values
    ]
    found: list[int] = []
    for choice in product(*ways):
        kept = frozenset(v for v, way in enumerate(choice) if way == "keep")
        count = problem.recount(kept, frozenset(v for v, way in enumerate(choice) if way == "offload"))
        if count is not None and count.kept_bytes <= limit_bytes:
            found.append(count.total_ps)
    return min(found, default=None)


@st.composite
def problems(draw: st.DrawFn) -> PartitionProblem:
    """Small joint graphs with views, steps of two results, steps that cannot run again, and slow links."""
    values = [SavedValue("input", None)]
    steps: list[Step] = []
    small = st.integers(0, 9)
    for s in range(draw(st.integers(1, 5))):
        reads = tuple(draw(st.sets(st.integers(0, len(values) - 1), min_size=1, max_size=3)))
        is_view = draw(st.integers(0, 3)) == 0
        again = 0 if is_view else draw(small)
        steps.append(Step(f"step{s}", reads, draw(small), again, is_view or draw(st.integers(0, 4)) > 0))
        for _ in range(1 if is_view else draw(st.integers(1, 2))):
            link = draw(st.one_of(st.none(), st.integers(0, 12)))
            nbytes, save_ps = draw(small), draw(st.integers(0, 3))
            values.append(SavedValue(f"value{len(values)}", s, nbytes, not is_view, save_ps, link, link))
    backward = [
        Step(f"gradient{b}", tuple(draw(st.sets(st.integers(0, len(values) - 1), max_size=2))), draw(small))
        for b in range(draw(st.integers(1, 4)))
    ]
    return PartitionProblem(tuple(steps), tuple(backward), tuple(values))


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 30))
def test_no_partition_takes_less_time(problem: PartitionProblem, limit_bytes: int) -> None:
    """Equal to exhaustive search, with a bound that proves it; what does not fit is refused with the fewest bytes."""
    least = _exhaustive(problem, limit_bytes)
    if least is not None:
        found = _choose(problem, limit_bytes)
        assert (found.recount.total_ps, found.bound_ps, found.gap) == (least, least, 0.0)
        return
    with pytest.raises(Infeasible) as caught:
        _choose(problem, limit_bytes)
    required = caught.value.required_bytes
    assert _exhaustive(problem, required) is not None
    assert _exhaustive(problem, required - 1) is None
    assert _choose(problem, required).recount.kept_bytes == required


def _chain(length: int = 12, *, link_ps: int | None = None) -> PartitionProblem:
    """A chain in which every backward step needs one activation, the last one first; every fourth step is dear."""
    values = [SavedValue("input", None)]
    steps = []
    for s in range(length):
        steps.append(Step(f"step{s}", (s,), 100, 90 if s % 4 == 0 else 10 + s % 3))
        values.append(SavedValue(f"activation{s}", s, 8 + s % 5, True, 1, link_ps, link_ps))
    backward = tuple(Step(f"gradient{s}", (s + 1,), 200) for s in reversed(range(length)))
    return PartitionProblem(tuple(steps), backward, tuple(values))


@pytest.mark.parametrize("link_ps", [None, 30, 400])
def test_more_room_never_costs_time(link_ps: int | None) -> None:
    """The curve of time against the limit falls to that of keeping everything."""
    problem = _chain(link_ps=link_ps)
    times = [_choose(problem, limit).recount.total_ps for limit in range(0, 130, 13)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == sum(value.save_ps for value in problem.values)
    assert times[0] > times[-1]


def test_a_fast_link_hides_offloading_and_a_slow_one_is_left_alone() -> None:
    fast = _choose(_chain(link_ps=10), 10)
    assert fast.offloaded
    assert fast.recount.total_ps <= 12 + 10 + 10  # what ends the one half and begins the other
    slow = _choose(_chain(link_ps=10_000), 10)
    assert not slow.offloaded
    assert slow.recount.again_ps > 0


def test_transfers_are_exposed_as_a_queue_says() -> None:
    """Stores begin when their value is there, one after the other; loads are waited for when they are needed."""
    values = (
        SavedValue("a", 0, 1, store_ps=50, load_ps=50),
        SavedValue("b", 1, 1, store_ps=50, load_ps=50),
        SavedValue("c", 2, 1, store_ps=50, load_ps=50),
    )
    steps = tuple(Step(f"s{i}", (), 40, 1000) for i in range(3))
    backward = (Step("first", (2,), 40), Step("second", (1,), 40), Step("third", (0,), 40))
    problem = PartitionProblem(steps, backward, values)
    count = problem.recount(frozenset(), frozenset({0, 1, 2}))
    assert count is not None
    assert count.exposed_store_ps == (40 + 3 * 50) - 120
    assert count.exposed_load_ps == 150 - 80
    count = problem.recount(frozenset({1}), frozenset({0, 2}))
    assert count is not None
    assert count.exposed_load_ps == 50  # the first one is needed at once


def test_a_value_is_due_when_the_step_that_reads_it_again_runs() -> None:
    """``a`` is read last by the backward half, and first to compute ``b`` again, which is not saved."""
    values = (SavedValue("a", 0, 1, store_ps=0, load_ps=50), SavedValue("b", 1, 1, store_ps=0, load_ps=50))
    steps = (Step("s", (), 40, 1000), Step("t", (0,), 40, 3))
    problem = PartitionProblem(steps, (Step("first", (1,), 40), Step("second", (0,), 40)), values)
    early, late = (problem.recount(kept, frozenset({0})) for kept in (frozenset[int](), frozenset({1})))
    assert early is not None
    assert late is not None
    assert (early.exposed_load_ps, late.exposed_load_ps) == (50, 10)
    assert _choose(problem, 0).recount.total_ps == 50 + 3


def test_a_view_costs_no_second_copy() -> None:
    """Both a value and its view are needed: one of them is kept, at the price of one."""
    values = (SavedValue("base", 0, 64), SavedValue("view", 1, 64, can_keep=False))
    steps = (Step("draw", (), 10, 10, repeatable=False), Step("transpose", (0,)))
    problem = PartitionProblem(steps, (Step("gradient", (0, 1), 5),), values)
    found = _choose(problem, 64)
    assert found.kept == {0}
    assert (found.recount.kept_bytes, found.recount.total_ps) == (64, 0)


def test_starts_are_never_beaten_by_the_answer() -> None:
    """Without time for the solver, the best of the given answers still comes back, and no bound is claimed."""
    problem = _chain(30)
    best = _choose(problem, 60)
    again = IlpPartition().choose(problem, 60, Budget.of_seconds(0.0), starts=[(best.kept, best.offloaded)])
    assert again.recount.total_ps == best.recount.total_ps
    assert again.bound_ps == 0


def test_no_time_and_a_stop_end_in_an_answer() -> None:
    budget = Budget.of_seconds(60.0)
    budget.stop.set()
    for hurried in (budget, Budget.of_seconds(0.0)):
        found = IlpPartition().choose(_chain(40), 50, hurried)
        assert found.recount.kept_bytes <= 50


def test_the_same_answer_every_time_and_progress_is_told() -> None:
    told: list[Progress] = []
    problem = _chain(40, link_ps=150)
    answers = [
        IlpPartition().choose(problem, 90, Budget.of_seconds(30.0, deterministic=True, workers=1, listen=told.append))
        for _ in range(2)
    ]
    assert answers[0].kept == answers[1].kept
    assert answers[0].offloaded == answers[1].offloaded
    assert answers[0].bound_ps == answers[1].bound_ps
    assert all(progress.pass_name == "partition/ilp" for progress in told)


def test_large_times_keep_a_small_gap() -> None:
    """Milliseconds in picoseconds: the solver counts in coarser units, and the bound stays below the value."""
    chain = _chain(20)
    steps = tuple(Step(s.name, s.reads, s.ps * 10**9, s.again_ps * 10**9 + i) for i, s in enumerate(chain.steps))
    problem = PartitionProblem(steps, chain.backward, chain.values)
    found = _choose(problem, 80)
    assert 0 <= found.gap < 1e-4


def test_what_can_neither_be_saved_nor_repeated_is_named() -> None:
    problem = PartitionProblem(
        (Step("draw", repeatable=False),), (Step("gradient", (0,)),), (SavedValue("noise", 0, 8, can_keep=False),)
    )
    with pytest.raises(ModelError, match="'noise', which can neither be saved nor"):
        _choose(problem, 100)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(OptionError, match="-1 bytes"):
        _choose(_chain(2), -1)


@pytest.mark.parametrize(
    ("kept", "offloaded", "limit", "bound"),
    [({1}, set(), 3, 0), ({0}, set(), 99, 0), (set(), {1}, 99, 0), (set(), set(), 99, 0), ({1}, set(), 99, 7)],
)
def test_a_false_partition_is_an_internal_error(kept: set[int], offloaded: set[int], limit: int, bound: int) -> None:
    """Too many bytes; a view kept; no way to the host; a step that is not repeatable; a bound above the value."""
    values = (SavedValue("view", 1, 8, can_keep=False), SavedValue("base", 0, 8))
    problem = PartitionProblem(
        (Step("draw", (), repeatable=False), Step("transpose", (1,))), (Step("gradient", (0,)),), values
    )
    with pytest.raises(InternalError):
        _ = Partition(problem, limit, frozenset(kept), frozenset(offloaded), bound).recount


@pytest.mark.parametrize(
    "change", [{"steps": (Step("late", (0,)),)}, {"backward": (Step("x", (5,)),)}, {"steps": (Step("n", (), -1),)}]
)
def test_a_problem_that_contradicts_itself_is_an_internal_error(change: dict[str, tuple[Step, ...]]) -> None:
    parts = {"steps": (Step("s"),), "backward": (Step("g", (0,)),)} | change
    with pytest.raises(InternalError):
        PartitionProblem(parts["steps"], parts["backward"], (SavedValue("v", 0, 8),))
