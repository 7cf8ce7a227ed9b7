"""A schedule whose claims are false does not pass."""

from __future__ import annotations

import msgspec
import pytest

from opweave.compiler.pipelining.placement import uniform
from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.pipelining.verdict import verified
from opweave.errors import InternalError, OptionError


def _right() -> TimedSchedule:
    problem = uniform(Stage(0, 2, 2, 1, None, 1, 2, forward_send_ns=1), (0, 1), 2, memory_limit=6)
    orders = (("0F0", "0F1", "0I0", "0W0", "0I1", "0W1"), ("1F0", "1I0", "1F1", "1I1", "1W0", "1W1"))
    return timed(PipelineSchedule(problem, tuple(tuple(map(Action.of, order)) for order in orders)))


def test_a_right_schedule_has_plans() -> None:
    """One for each rank, with the schedule's makespan."""
    done = _right()
    plans = verified(done)
    ends = [i.finish_s or 0.0 for plan in plans.values() for i in plan.instructions]
    assert max(ends) == pytest.approx(done.makespan_ns * 1e-9)


def test_false_claims_are_refused() -> None:
    """Fewer bytes than are held, a start before the message is there, a limit that is not kept."""
    done = _right()
    fewer = msgspec.structs.replace(done, peak_bytes=(5, done.peak_bytes[1]))
    with pytest.raises(InternalError, match="rank 0 holds 6 bytes by its plan, 5"):
        verified(fewer)
    starts, finishes = (tuple(t - 1 for t in times[1]) for times in (done.starts, done.finishes))
    early = msgspec.structs.replace(done, starts=(done.starts[0], starts), finishes=(done.finishes[0], finishes))
    with pytest.raises(InternalError, match="rank 1: starts before its operands"):
        verified(early)
    problem = msgspec.structs.replace(done.schedule.problem, memory_limit=(5, 6))
    schedule = msgspec.structs.replace(done.schedule, problem=problem)
    with pytest.raises(InternalError, match="capacity exceeded"):
        verified(msgspec.structs.replace(done, schedule=schedule))


def test_a_rank_that_holds_nothing_needs_no_room() -> None:
    """A limit of what is resident is kept then; by what holds a byte more it is not."""
    stage = Stage(0, 2, 2, 1, resident_bytes=3)
    order = ((Action.of("0F0"), Action.of("0B0")),)
    assert set(verified(timed(PipelineSchedule(uniform(stage, (0,), 1, memory_limit=3), order)))) == {0}
    holding = msgspec.structs.replace(stage, until_weight_gradient_bytes=1)
    with pytest.raises(OptionError, match="rank 0 may hold 3 bytes, of which 3 are taken"):
        verified(timed(PipelineSchedule(uniform(holding, (0,), 1, memory_limit=3), order)))


def test_more_bytes_than_a_machine_has_are_no_fault_without_a_limit() -> None:
    """Bytes may be counted in any unit."""
    stage = Stage(0, 2, 2, 1, until_weight_gradient_bytes=(1 << 50) - 1)
    order = tuple(Action(0, kind, number) for kind in (ActionKind.FORWARD, ActionKind.BACKWARD) for number in range(4))
    done = timed(PipelineSchedule(uniform(stage, (0,), 4), (order,)))
    assert set(verified(done)) == {0}


def test_copies_and_all_reduces_take_their_time() -> None:
    """What is beside computation is not shorter than the problem says, nor left out."""
    stage = Stage(0, 2, 2, 1, None, 0, 2, offloaded_bytes=1, offload_ns=3, reload_ns=2, reduce_ns=4)
    order = tuple(map(Action.of, ("0F0", "0OFFLOAD0", "0RELOAD0", "0B0")))
    done = timed(PipelineSchedule(uniform(stage, (0,), 1), (order,)))
    assert verified(done)
    with pytest.raises(InternalError, match="all-reduce of stage 0 0 of the 4"):
        verified(msgspec.structs.replace(done, reduced=((),)))
    ((_, start, finish),) = done.reduced[0]
    with pytest.raises(InternalError, match="all-reduce of stage 0 3 of the 4"):
        verified(msgspec.structs.replace(done, reduced=(((0, start, finish - 1),),)))
    for place, text in ((1, "0OFFLOAD0 2 of the 3"), (2, "0RELOAD0 1 of the 2")):
        finishes = tuple(finish - (number == place) for number, finish in enumerate(done.finishes[0]))
        with pytest.raises(InternalError, match=text):
            verified(msgspec.structs.replace(done, finishes=(finishes,)))


def test_what_is_freed_at_a_moment_is_not_free_for_a_copy_that_stands_before_it() -> None:
    """The third copy back starts when the first backward ends, and stands before it: both are held, in plans too."""
    stage = Stage(0, 1, 1, 1, None, 0, 2, offloaded_bytes=1, reload_ns=2)
    first = [f"0{kind}{number}" for number in range(3) for kind in ("F", "OFFLOAD")]
    then = [f"0{kind}{number}" for kind in ("RELOAD", "B") for number in range(3)]
    done = timed(PipelineSchedule(uniform(stage, (0,), 3), (tuple(map(Action.of, first + then)),)))
    assert done.starts[0][8] == done.finishes[0][9]
    assert done.peak_bytes == (6,)
    assert set(verified(done)) == {0}
