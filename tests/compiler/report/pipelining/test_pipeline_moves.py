"""Messages, waits and bytes held, against the simulator and against what can be worked out by hand."""

from __future__ import annotations

import msgspec
import pytest

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.report.pipelining.facts import facts_of
from opweave.compiler.report.pipelining.moves import Moves
from tests.compiler.report.pipelining import pipelines


@pytest.mark.parametrize("name", pipelines.everything())
def test_the_highest_point_of_a_curve_is_the_simulators_peak(name: str) -> None:
    """And what a rank holds at the end is what is resident: everything that came has gone."""
    schedule = pipelines.everything()[name]
    for rank, curve in enumerate(Moves(schedule).curves):
        assert max(held for _, held in curve) == schedule.peak_bytes[rank]
        assert curve[-1][1] == curve[0][1] == schedule.schedule.problem.resident_bytes[rank]
        assert [time for time, _ in curve] == sorted(time for time, _ in curve)


def test_messages_of_a_straight_pipeline() -> None:
    """Each microbatch crosses each of three borders twice, and takes the sender's time for it."""
    schedule = pipelines.plain(ranks=4, microbatches=8)
    messages = Moves(schedule).messages
    assert len(messages) == 2 * 3 * 8
    assert {m.arrives_ns - m.leaves_ns for m in messages if m.receiver > m.sender} == {3}
    assert {m.arrives_ns - m.leaves_ns for m in messages if m.receiver < m.sender} == {2}
    assert sum(m.nbytes for m in messages) == 3 * 8 * (64 + 32)
    assert all(abs(m.sender - m.receiver) == 1 for m in messages)
    first = messages[0]
    assert (str(first.sent), str(first.needed), first.leaves_ns) == ("0F0", "1F0", 10)
    backwards = [m for m in messages if m.receiver < m.sender]
    assert (str(backwards[0].sent), str(backwards[0].needed)) == ("3B0", "2B0")


def test_stages_on_one_rank_send_each_other_nothing() -> None:
    problem = uniform(pipelines.SENDING, placed("v", 2, 2), 1)
    orders = pipelines.orders_of("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0")
    messages = Moves(timed(PipelineSchedule(problem, orders))).messages
    assert [(m.sender, m.receiver) for m in messages] == [(0, 1), (1, 0), (0, 1), (1, 0)]


def test_shards_exchange_no_messages() -> None:
    """Two stages, two microbatches: one border, each way."""
    assert len(Moves(pipelines.sharded()).messages) == 4


def test_waits_are_what_transfers_cost() -> None:
    """Of two ranks and one microbatch by hand: rank 1 waits 3 for the activation, rank 0 waits 2 for its gradient."""
    schedule = pipelines.plain(ranks=2, microbatches=1)
    assert Moves(schedule).waits_ns == (2, 3)
    without = pipelines.plain(ranks=2, microbatches=1, stage=pipelines.UNIT)
    assert Moves(without).waits_ns == (0, 0)


def test_a_transfer_behind_work_is_no_wait() -> None:
    """The second activation is on its way while rank 1 computes the first."""
    problem = uniform(msgspec.structs.replace(pipelines.UNIT, forward_send_ns=3), (0, 1), 2)
    orders = pipelines.orders_of("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    assert Moves(timed(PipelineSchedule(problem, orders))).waits_ns[1] == 3


@pytest.mark.parametrize("name", pipelines.everything())
def test_facts_add_up(name: str) -> None:
    """Work and idle time make the makespan; work is what the actions on the rank take."""
    schedule: TimedSchedule = pipelines.everything()[name]
    facts = facts_of(schedule)
    assert facts.peak_bytes == max(schedule.peak_bytes)
    assert facts.actions == sum(map(len, schedule.schedule.orders))
    for rank in facts.ranks:
        order = schedule.schedule.orders[rank.rank]
        took = zip(order, schedule.starts[rank.rank], schedule.finishes[rank.rank], strict=True)
        assert rank.work_ns == sum(finish - start for action, start, finish in took if not action.kind.copies)
        assert rank.work_ns + rank.idle_ns == facts.makespan_ns
        assert 0 <= rank.wait_ns <= rank.idle_ns
        assert rank.span_ns == schedule.spans_ns[rank.rank]


def test_copies_and_all_reduces_are_counted() -> None:
    assert [rank.copy_ns for rank in facts_of(pipelines.offloading()).ranks] == [20, 0]
    assert [rank.reduce_ns for rank in facts_of(pipelines.split()).ranks] == [17] * 4


def test_messages_count_for_their_sender() -> None:
    """The first rank sends activations only, the last one gradients only."""
    ranks = facts_of(pipelines.plain(ranks=3, microbatches=8)).ranks
    assert [(rank.sent, rank.sent_bytes) for rank in ranks] == [(8, 8 * 64), (16, 8 * 96), (8, 8 * 32)]


def test_over_the_limit() -> None:
    facts = facts_of(pipelines.split())
    assert [rank.within for rank in facts.ranks] == [False, False, True, True]
    assert not facts.within
    assert facts_of(pipelines.plain()).within


def test_a_microbatch_starts_where_its_first_action_does() -> None:
    moves = Moves(pipelines.plain())
    assert moves.start_of(Action.of("0F1")) == 10
