"""The simulator against the rules written a second time, and against schedules small enough to time by hand."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import OptionError
from tests.compiler.pipelining.drawn import problems, schedule_of
from tests.compiler.pipelining.recounted import duration_of, peaks_of, reduced_by, starts_of


def schedule(problem: PipelineProblem, *orders: str) -> PipelineSchedule:
    """Orders written as ``0F0 0B0``, one text for each rank."""
    return PipelineSchedule(problem, tuple(tuple(map(Action.of, order.split())) for order in orders))


def starts(line: TimedSchedule) -> dict[str, int]:
    """Start of each action, by its text."""
    return {
        str(action): start
        for order, times in zip(line.schedule.orders, line.starts, strict=True)
        for action, start in zip(order, times, strict=True)
    }


@settings(max_examples=120, deadline=None)
@given(problems(), st.integers(0, 2**20))
def test_times_and_bytes_are_those_of_the_rules(problem: PipelineProblem, seed: int) -> None:
    """Starts, finishes, peaks and the end of the step, of problems of every kind in orders of every kind."""
    drawn = schedule_of(problem, Random(seed))
    found = timed(drawn)
    expected = starts_of(problem, drawn.orders)
    assert found.starts == tuple(tuple(expected[action] for action in order) for order in drawn.orders)
    ends = {action: start + duration_of(problem, action) for action, start in expected.items()}
    assert found.finishes == tuple(tuple(ends[action] for action in order) for order in drawn.orders)
    assert found.peak_bytes == peaks_of(problem, drawn.orders, expected)
    reduced = reduced_by(problem, drawn.orders, expected)
    assert found.makespan_ns == max([*ends.values(), *reduced])
    for rank, order in enumerate(drawn.orders):
        own = [ends[action] for action in order]
        begin = min((expected[action] for action in order), default=0)
        assert found.spans_ns[rank] == (max([*own, reduced[rank]]) - begin if order else 0)


@settings(deadline=None)
@given(problems(), st.integers(0, 2**20), st.integers(0, 2**20))
def test_a_schedule_with_two_actions_exchanged_is_timed_or_refused(
    problem: PipelineProblem, seed: int, place: int
) -> None:
    """An order that contradicts what follows what is refused, any other follows the rules."""
    drawn = schedule_of(problem, Random(seed))
    orders = [list(order) for order in drawn.orders]
    order = max(orders, key=len)
    first = place % max(1, len(order) - 1)
    order[first : first + 2] = reversed(order[first : first + 2])
    exchanged = msgspec.structs.replace(drawn, orders=tuple(map(tuple, orders)))
    try:
        expected = starts_of(problem, exchanged.orders)
    except AssertionError:
        with pytest.raises(OptionError, match="waits for ever"):
            timed(exchanged)
    else:
        if _in_order(problem, exchanged):
            assert timed(exchanged).starts == tuple(tuple(expected[a] for a in order) for order in exchanged.orders)


def _in_order(problem: PipelineProblem, drawn: PipelineSchedule) -> bool:
    """Whether nothing that takes no time stands before what it follows, which the rules' times alone do not show."""
    try:
        timed(drawn)
    except OptionError:
        return False
    return True


def test_one_forward_one_backward_takes_the_time_of_its_formula() -> None:
    """(m + p - 1) (F + I + W), on two ranks with three microbatches."""
    problem = uniform(Stage(0, 1, 1, 1, until_weight_gradient_bytes=5), placed("loop", 2), 3)
    line = timed(schedule(problem, "0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"))
    assert (line.makespan_ns, line.peak_bytes) == (12, (10, 5))
    assert line.bubble == pytest.approx(1 / 4)
    assert line.spans_ns == (12, 9)


def test_a_whole_backward_passes_its_gradient_on_at_its_end() -> None:
    """A half does at the end of I, and so the stage before goes on sooner by what W takes."""
    problem = uniform(Stage(0, 1, 2, 4, backward_send_ns=1), placed("loop", 2), 1)
    assert starts(timed(schedule(problem, "0F0 0B0", "1F0 1B0")))["0B0"] == 2 + 6 + 1
    assert starts(timed(schedule(problem, "0F0 0I0 0W0", "1F0 1I0 1W0")))["0I0"] == 2 + 2 + 1


def test_a_whole_backward_may_take_less_than_its_halves() -> None:
    """``backward_ns`` is what B takes; halves take what they take."""
    problem = uniform(Stage(0, 1, 2, 4, backward_ns=5, between_gradients_bytes=9), (0,), 1)
    assert (timed(schedule(problem, "0F0 0B0")).makespan_ns, timed(schedule(problem, "0F0 0I0 0W0")).makespan_ns) == (
        6,
        7,
    )
    assert timed(schedule(problem, "0F0 0B0")).peak_bytes == (0,)
    assert timed(schedule(problem, "0F0 0I0 0W0")).peak_bytes == (9,)


def test_copies_run_beside_compute_one_at_a_time() -> None:
    """Two copies out of 3 each behind forwards of 1: the second waits for the first, I for its own copy in."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=4, offloaded_bytes=4, offload_ns=3, reload_ns=2)
    problem = uniform(stage, (0,), 2)
    order = "0F0 0OFFLOAD0 0F1 0OFFLOAD1 0RELOAD0 0I0 0W0 0RELOAD1 0I1 0W1"
    line = timed(schedule(problem, order))
    found = starts(line)
    assert (found["0OFFLOAD0"], found["0F1"], found["0OFFLOAD1"], found["0RELOAD0"]) == (1, 1, 4, 7)
    assert (found["0I0"], found["0RELOAD1"], found["0I1"]) == (9, 11, 13)
    assert line.peak_bytes == (8,)  # both until 4, when the first is gone


def test_what_allocates_waits_for_the_copies_that_make_room_for_it() -> None:
    """Three forwards of 4 within a limit of 8: the third waits for the first copy, not for the second."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=4, offloaded_bytes=4, offload_ns=5, reload_ns=1)
    order = "0F0 0OFFLOAD0 0F1 0OFFLOAD1 0F2 0I2 0W2 0RELOAD1 0I1 0W1 0RELOAD0 0I0 0W0"
    mixed = uniform(stage, (0,), 3)
    plain = msgspec.structs.replace(stage, offloaded_bytes=0)
    problem = PipelineProblem(1, (stage, plain), (Route((0,), 2), Route((1,), 1)), (8,))
    limited = timed(schedule(problem, order.replace("0F2 0I2 0W2", "1F2 1I2 1W2")))
    assert (starts(limited)["0F1"], starts(limited)["1F2"], limited.peak_bytes) == (1, 6, (8,))
    free = timed(
        schedule(msgspec.structs.replace(problem, memory_limit=None), order.replace("0F2 0I2 0W2", "1F2 1I2 1W2"))
    )
    assert (starts(free)["1F2"], free.peak_bytes) == (2, (12,))
    with pytest.raises(OptionError, match="never does 0OFFLOAD2"):
        timed(schedule(mixed, order))


def test_nothing_waits_where_no_copy_can_make_room() -> None:
    """A limit that is exceeded all the same costs no time: the reader of the peaks decides."""
    stage = Stage(0, 1, 1, 1, until_weight_gradient_bytes=4, offloaded_bytes=2, offload_ns=5, reload_ns=1)
    order = "0F0 0OFFLOAD0 0F1 0OFFLOAD1 0RELOAD0 0I0 0W0 0RELOAD1 0I1 0W1"
    line = timed(schedule(uniform(stage, (0,), 2, memory_limit=5), order))
    assert (starts(line)["0F1"], line.peak_bytes) == (1, (8,))


def test_vocabulary_shards_with_one_barrier_and_with_two() -> None:
    """With one, I follows S and T may be last; with two, I follows T, one more collective later."""
    shards = Vocabulary((2, 3), (5, 4), broadcast_ns=1, reduce_ns=10, barriers=1, shard_bytes=7)
    problem = msgspec.structs.replace(uniform(Stage(0, 1, 1, 1), placed("loop", 2), 1), vocabulary=shards)
    early = timed(schedule(problem, "0F0 0S0 0I0 0T0 0W0", "1F0 1S0 1I0 1T0 1W0"))
    found = starts(early)
    assert (found["0S0"], found["1S0"], found["1I0"], found["1T0"]) == (3, 3, 16, 17)
    assert (found["0I0"], found["0T0"]) == (17, 18)  # on rank 0 T might start at 16, but for its order
    assert early.peak_bytes == (7, 7)
    twice = msgspec.structs.replace(problem, vocabulary=msgspec.structs.replace(shards, barriers=2))
    late = starts(timed(schedule(twice, "0F0 0S0 0T0 0I0 0W0", "1F0 1S0 1T0 1I0 1W0")))
    assert (late["0T0"], late["1T0"], late["1I0"]) == (16, 16, 31)
    with pytest.raises(OptionError, match="waits for ever"):
        timed(schedule(twice, "0F0 0S0 0T0 0I0 0W0", "1F0 1S0 1I0 1T0 1W0"))


def test_routes_skip_stages_and_take_the_times_of_their_hops() -> None:
    """The second microbatch goes from stage 0 to stage 2, over a link of its own."""
    stages = tuple(Stage(rank, 1, 1, 1, forward_send_ns=1, backward_send_ns=1) for rank in range(3))
    routes = (Route((0, 1, 2), 1), Route((0, 2), 1, (7,), (8,)))
    problem = PipelineProblem(3, stages, routes)
    found = starts(timed(schedule(problem, "0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1W0", "2F0 2I0 2W0 2F1 2I1 2W1")))
    assert (found["1F0"], found["2F0"], found["2F1"], found["2I1"], found["0I1"]) == (2, 4, 9, 10, 19)


def test_gradients_are_reduced_one_stage_at_a_time_while_the_rank_goes_on() -> None:
    """The stage that is done first goes first; the step ends with the last of them."""
    problem = uniform(Stage(0, 1, 1, 1, reduce_ns=4), (0, 0), 1)
    line = timed(schedule(problem, "0F0 1F0 1I0 1W0 0I0 0W0"))
    assert line.reduced == (((1, 4, 8), (0, 8, 12)),)
    assert (line.makespan_ns, line.span_ns) == (12, 12)
    later = timed(schedule(problem, "0F0 1F0 1I0 0I0 1W0 0W0"))
    assert later.makespan_ns == 13


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (("0F0 0B0",), "orders for 1 ranks; there are 2"),
        (("0F0 0B0", "1F0"), "rank 1 never does 1I0, nor 1 other"),
        (("0F0 0B0 0F0", "1F0 1B0"), "rank 0 does 0F0, which is done already"),
        (("0F0 0B0 0W0", "1F0 1B0"), "rank 0 does 0W0, which is done already"),
        (("0F0 0B0 1F0", "1B0"), "rank 0 does 1F0"),
        (("0F0 0B0", "1F0 1B0 2F0"), "rank 1 does 2F0"),
        (("0F0 0B0 0F1", "1F0 1B0"), "rank 0 does 0F1"),
        (("0F0 0B0 0S0", "1F0 1B0"), "rank 0 does 0S0"),
        (("0B0 0F0", "1F0 1B0"), "rank 0 waits for ever to do 0B0"),
    ],
)
def test_orders_that_are_no_schedule_are_refused(orders: tuple[str, ...], message: str) -> None:
    """With the action that is wrong, and the rank."""
    problem = uniform(Stage(0, 1, 1, 1), placed("loop", 2), 1)
    with pytest.raises(OptionError, match=message):
        timed(schedule(problem, *orders))
