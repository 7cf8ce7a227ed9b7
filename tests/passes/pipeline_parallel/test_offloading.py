"""Which stages offload: against all choices and all orders of tiny problems, and against offloading nothing or all."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage
from opweave.compiler.pipelining.schedule import ActionKind
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel._copies import away, with_copies, without_copies
from opweave.passes.pipeline_parallel.bounds import lower_bound
from opweave.passes.pipeline_parallel.named import named
from opweave.passes.pipeline_parallel.offloading import choose_offload, offloaded
from opweave.passes.pipeline_parallel.solution import within_limit
from tests.passes.pipeline_parallel.every_order import best_of_all

UNIT = Stage(0, 2, 2, 2, until_weight_gradient_bytes=2, offloaded_bytes=2, offload_ns=1, reload_ns=1)


@st.composite
def tiny(draw: st.DrawFn) -> PipelineProblem:
    """Up to three stages on one or two ranks, one microbatch, a limit that may be too small for all at once."""
    ranks = draw(st.integers(1, 2))
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        held = draw(st.integers(0, 3))
        moved = draw(st.integers(0, held))
        forward, gradient, weights, out, back = (draw(st.integers(0, 3)) for _ in range(5))
        stage = Stage(draw(st.integers(0, ranks - 1)), forward, gradient, weights, until_weight_gradient_bytes=held)
        stages.append(msgspec.structs.replace(stage, offloaded_bytes=moved, offload_ns=out, reload_ns=back))
    limit = (draw(st.integers(1, 6)),) * ranks
    return PipelineProblem(ranks, tuple(stages), (Route(tuple(range(len(stages))), 1),), limit)


def all_choices(problem: PipelineProblem) -> int:
    """The least makespan of all schedules of all choices; -1 if there is none within the limit."""
    found = []
    for parts in product((0, 1), repeat=len(problem.stages)):
        best = best_of_all(offloaded(problem, parts), "makespan", most=3000)
        assume(best is not None)
        found.append(best)
    return min((value for value in found if value is not None and value >= 0), default=-1)


@settings(max_examples=12, deadline=None)
@given(tiny())
def test_bounds_and_schedules_enclose_the_best_of_all_choices(problem: PipelineProblem) -> None:
    """No choice in any order is below the bound; what is found keeps the limit; none is given up that can be kept."""
    best = all_choices(problem)
    if best < 0:
        with pytest.raises(Infeasible):
            choose_offload(problem, Budget.of_seconds(0.2))
        return
    assert lower_bound(away(problem)).value <= best
    solution = choose_offload(problem, Budget.of_seconds(0.2))
    assert within_limit(solution.timed)
    assert solution.bound.value <= best <= solution.value


@pytest.mark.parametrize("limit", [8, 6, 4])
def test_never_worse_than_nothing_or_all(limit: int) -> None:
    """As 1F1B with all activations offloaded, and as with none where that keeps the limit."""
    problem = uniform(UNIT, placed("loop", 4), 6, memory_limit=limit)
    solution = choose_offload(problem, Budget.of_seconds(0.6))
    assert within_limit(solution.timed)
    compared = [timed(named("1f1b", offloaded(problem, [part] * 4))) for part in (0, 1)]
    for line in filter(within_limit, compared):
        assert solution.value <= line.makespan_ns
    assert solution.bound.value <= solution.value


def test_nothing_is_offloaded_where_the_limit_allows_it() -> None:
    """Nor without a limit; every copy might delay something."""
    for limit in (8, None):
        solution = choose_offload(uniform(UNIT, placed("loop", 4), 6, memory_limit=limit), Budget.of_seconds(2))
        assert all(not stage.offloaded_bytes for stage in solution.timed.schedule.problem.stages)
        assert solution.gap == 0


def test_early_stages_offload_what_lives_longest() -> None:
    """Half of 1F1B's memory: the first stages have most microbatches in flight, the last one has always room."""
    solution = choose_offload(uniform(UNIT, placed("loop", 4), 6, memory_limit=4), Budget.of_seconds(1))
    chosen = [bool(stage.offloaded_bytes) for stage in solution.timed.schedule.problem.stages]
    assert chosen[0]
    assert not chosen[-1]


def test_parts_are_of_bytes_and_times() -> None:
    """A third of 3 bytes that take 2 and 4; times rounded up, and nothing at all where nothing goes."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=5, offloaded_bytes=3, offload_ns=2, reload_ns=4)
    problem = offloaded(uniform(stage, (0, 0), 1), (1, 0), 3)
    first, second = problem.stages
    assert (first.offloaded_bytes, first.offload_ns, first.reload_ns) == (1, 1, 2)
    assert second == msgspec.structs.replace(stage, offloaded_bytes=0, offload_ns=0, reload_ns=0)
    for parts in ((1,), (1, 4), (1, -1)):
        with pytest.raises(OptionError, match="for 2 stages; each takes 0 to 3"):
            offloaded(problem, parts, 3)
    with pytest.raises(OptionError, match="offload 0 parts"):
        choose_offload(problem, Budget.of_seconds(1), of=0)


def test_what_is_away_is_neither_held_nor_copied() -> None:
    """All of it, or half."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=5, offloaded_bytes=4, offload_ns=2, reload_ns=4)
    problem = uniform(stage, (0, 0), 1)
    assert away(problem).stages == (Stage(0, 1, 1, 1, until_weight_gradient_bytes=1),) * 2
    assert away(problem, 2).stages == (Stage(0, 1, 1, 1, until_weight_gradient_bytes=3),) * 2
    assert without_copies(problem).stages == (Stage(0, 1, 1, 1, until_weight_gradient_bytes=5),) * 2


def test_copies_are_put_where_they_delay_nothing() -> None:
    """1F1B, on ranks where activations wait: the same compute at the same times, and fewer bytes."""
    problem = offloaded(uniform(UNIT, placed("loop", 4), 6), (1, 1, 0, 0))
    line = timed(named("1f1b", without_copies(problem)))
    copied = timed(with_copies(line, problem))
    assert copied.makespan_ns == line.makespan_ns
    assert (line.peak_bytes, copied.peak_bytes) == ((8, 6, 4, 2), (4, 4, 4, 2))
    for order, copies in zip(line.schedule.orders, copied.schedule.orders, strict=True):
        assert order == tuple(action for action in copies if not action.kind.copies)
    kinds = [action.kind for action in copied.schedule.orders[0]]
    assert kinds.count(ActionKind.OFFLOAD) == kinds.count(ActionKind.RELOAD) == 6
