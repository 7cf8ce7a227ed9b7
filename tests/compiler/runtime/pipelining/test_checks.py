"""What torch made of a schedule is judged before it runs: right lists pass, and each way to be wrong is named."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import pytest

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import PipelineProblem, Route, Stage, Vocabulary
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule
from opweave.compiler.runtime.pipelining.checks import check_lowered
from opweave.compiler.runtime.pipelining.emit import csv_of, emitted, renumbered, whole_backwards
from opweave.compiler.runtime.pipelining.lowering import load, lowered_alone
from opweave.errors import ExecutionError, VerificationError

STAGE = Stage(0, 1, 1, 1, until_weight_gradient_bytes=10, forward_bytes=4, backward_bytes=4)
Lists = dict[int, list[str]]


def actions(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.of, text.split()))


def one_f_one_b() -> PipelineSchedule:
    """Three ranks, three microbatches, backwards whole."""
    problem = uniform(STAGE, placed("loop", 3), 3, memory_limit=30)
    orders = (
        actions("0F0 0F1 0F2 0B0 0B1 0B2"),
        actions("1F0 1F1 1B0 1F2 1B1 1B2"),
        actions("2F0 2B0 2F1 2B1 2F2 2B2"),
    )
    return PipelineSchedule(problem, orders, "1f1b")


def folded() -> PipelineSchedule:
    """A V on two ranks; backwards in halves, but for one."""
    problem = uniform(STAGE, placed("v", 2, 2), 2, memory_limit=40)
    orders = (
        actions("0F0 0F1 3F0 3I0 3F1 3W0 3I1 3W1 0I0 0W0 0I1 0W1"),
        actions("1F0 2F0 1F1 2F1 2I0 1I0 2W0 1W0 2B1 1B1"),
    )
    return PipelineSchedule(problem, orders, "v")


def lists_of(schedule: PipelineSchedule) -> Lists:
    return {rank: list(texts) for rank, texts in lowered_alone(schedule).items()}


@pytest.mark.parametrize("make", [one_f_one_b, folded])
def test_what_torch_lowers_is_proved_right(make: Callable[[], PipelineSchedule]) -> None:
    schedule = make()
    check_lowered(lowered_alone(schedule), schedule)


def swap(lists: Lists, rank: int, one: str, other: str) -> None:
    here, there = lists[rank].index(one), lists[rank].index(other)
    lists[rank][here], lists[rank][there] = other, one


def drop(lists: Lists, rank: int, text: str) -> None:
    lists[rank].remove(text)


def put(lists: Lists, rank: int, text: str, before: str) -> None:
    lists[rank].insert(lists[rank].index(before), text)


def behind(lists: Lists, rank: int, text: str, other: str) -> None:
    lists[rank].remove(text)
    lists[rank].insert(lists[rank].index(other) + 1, text)


def cross(lists: Lists) -> None:
    """Ranks 0 and 1 each want the other's message before they compute what the other waits for."""
    lists[1].remove("1F2")
    lists[1].remove("1SEND_F2")
    put(lists, 1, "1F2", "1REDUCE_GRAD")
    put(lists, 1, "1SEND_F2", "1REDUCE_GRAD")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lists: swap(lists, 1, "1RECV_F0", "1RECV_F1"), r"1F0 before 1RECV_F0|different orders"),
        (lambda lists: swap(lists, 1, "1RECV_F1", "1RECV_F2"), r"1F1 before 1RECV_F1|different orders"),
        (lambda lists: swap(lists, 0, "0RECV_B1", "0RECV_B2"), r"0B1 before 0RECV_B1|different orders"),
        (lambda lists: put(lists, 1, "1F0", "1F1"), "1F0 is done twice: by rank 1"),
        (lambda lists: put(lists, 2, "1F0", "2F1"), "1F0 is done twice: by rank 1, and again by rank 2"),
        (lambda lists: put(lists, 0, "0SEND_F1", "0F2"), "0SEND_F1 is done twice"),
        (lambda lists: swap(lists, 2, "2F1", "2F2"), "rank 2 does 2F2 where the schedule has 2F1"),
        (lambda lists: drop(lists, 0, "0SEND_F1"), "rank 0 never does 0SEND_F1, for which 1RECV_F1"),
        (lambda lists: drop(lists, 0, "0RECV_B2"), "rank 0 never does 0RECV_B2"),
        (lambda lists: put(lists, 2, "2SEND_F1", "2F2"), "2SEND_F1, a message that nothing"),
        (lambda lists: drop(lists, 1, "1B2"), "rank 1 does nothing where the schedule has 1B2"),
        (lambda lists: swap(lists, 0, "0F1", "0SEND_F1"), "0SEND_F1 before 0F1"),
        (lambda lists: behind(lists, 2, "2RECV_F2", "2F2"), "2F2 before 2RECV_F2"),
        (lambda lists: behind(lists, 0, "0RECV_B2", "0B2"), "0B2 before 0RECV_B2"),
        (lambda lists: put(lists, 0, "0WAIT_SEND_F1", "0F1"), "0SEND_F1 does not come before it|is done twice"),
        (lambda lists: drop(lists, 1, "1REDUCE_GRAD"), "never reduces the gradients of stage 1"),
        (lambda lists: swap(lists, 1, "1REDUCE_GRAD", "1SEND_B0"), "after 1 of 3 backwards"),
        (lambda lists: drop(lists, 0, "0UNSHARD"), "0F0 while the weights of stage 0 are not gathered"),
        (lambda lists: drop(lists, 0, "0RESHARD"), "never frees the weights of stage 0"),
        (lambda lists: put(lists, 0, "0UNSHARD", "0F1"), "gathers the weights of stage 0 twice"),
        (cross, "rank 1 does 1B1 where the schedule has 1F2"),
        (lambda lists: put(lists, 0, "(0F1;0B0)OVERLAP_F_B", "0F1"), "not known here"),
    ],
)
def test_each_damage_is_named(damage: Callable[[Lists], None], says: str) -> None:
    """Swapped receives, doubled and missing actions, messages without another end, and the rest."""
    schedule = one_f_one_b()
    lists = lists_of(schedule)
    damage(lists)
    for as_plans in (False, True):
        with pytest.raises(VerificationError, match=says):
            check_lowered(lists, schedule, as_plans=as_plans)


def test_receives_posted_in_another_order_than_sent_are_refused() -> None:
    """Nothing else is wrong with them: both are there before what needs them, and gloo would swap their contents."""
    problem = uniform(STAGE, placed("loop", 2), 2)
    orders = (actions("0F0 0F1 0B0 0B1"), actions("1F0 1F1 1B0 1B1"))
    schedule = PipelineSchedule(problem, orders, "gpipe")
    lists = lists_of(schedule)
    lists[1].remove("1RECV_F1")
    lists[1].insert(lists[1].index("1RECV_F0"), "1RECV_F1")
    with pytest.raises(VerificationError, match="ranks 0 and 1 post their messages in different orders: number 0"):
        check_lowered(lists, schedule)


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    """Both the schedule itself, and lists of a good one in which a send stands behind what waits for its answer."""
    problem = uniform(STAGE, (0, 1, 2, 0), 1)
    good = PipelineSchedule(problem, (actions("0F0 3F0 3B0 0B0"), actions("1F0 1B0"), actions("2F0 2B0")), "loop")
    lists = lists_of(good)
    check_lowered(lists, good)
    crossed = msgspec.structs.replace(good, orders=(actions("3F0 0F0 3B0 0B0"), *good.orders[1:]), method="crossed")
    with pytest.raises(VerificationError, match=r"the schedule itself cannot be executed: rank . waits for ever"):
        check_lowered(lists, crossed)
    with pytest.raises(ExecutionError, match="torch refuses schedule 'crossed'"):
        lowered_alone(crossed)
    lists[0].remove("0SEND_F0")
    put(lists, 0, "0SEND_F0", "3B0")
    waits = "wait for each other for ever: rank 0 at 3RECV_F0, rank 1 at 1RECV_F0, rank 2 at 2RECV_F0"
    with pytest.raises(VerificationError, match=waits):
        check_lowered(lists, good)


def test_messages_of_three_ranks_that_hold_each_other_up_are_refused() -> None:
    """Each pair of ranks agrees on its order, and sends wait for nobody; NCCL still does a rank's in theirs."""
    order = actions("0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1"), actions("1F0 1F1 1B0 1B1"), actions("2F0 2F1 2B0 2B1")
    schedule = PipelineSchedule(uniform(STAGE, (0, 1, 2, 0), 2), order, "loop")
    lists = lists_of(schedule)
    check_lowered(lists, schedule)
    lists[0].remove("3RECV_F0")
    lists[0].insert(lists[0].index("0SEND_F1"), "3RECV_F0")
    check_lowered(lists, schedule)
    lists[1].remove("1RECV_F1")
    lists[1].insert(lists[1].index("1SEND_F0"), "1RECV_F1")
    with pytest.raises(VerificationError, match="for ever: rank 0 at 3RECV_F0, rank 1 at 1RECV_F1, rank 2 at 2RECV_F0"):
        check_lowered(lists, schedule)


def test_the_limit_holds() -> None:
    schedule = one_f_one_b()
    tight = msgspec.structs.replace(
        schedule, problem=msgspec.structs.replace(schedule.problem, memory_limit=(30, 29, 9))
    )
    with pytest.raises(VerificationError, match="rank 2 would hold 10 bytes at once; its limit is 9"):
        check_lowered(lowered_alone(schedule), tight)


def test_the_last_stage_must_keep_the_order_of_microbatches() -> None:
    schedule = folded()
    names = {0: 1, 1: 0}
    orders = tuple(tuple(Action(a.stage, a.kind, names[a.microbatch]) for a in order) for order in schedule.orders)
    other = msgspec.structs.replace(schedule, orders=orders)
    with pytest.raises(VerificationError, match="the last stage does 3F1 as its forward number 0"):
        check_lowered(lowered_alone(other), other)
    assert renumbered(other) == schedule
    assert renumbered(schedule) is schedule


def test_what_torch_has_no_action_for_is_refused_by_name() -> None:
    problem = uniform(STAGE, placed("loop", 2), 2)
    orders = (actions("0F0 0F1 0B0 0B1"), actions("1F0 1B0 1F1 1B1"))

    def refused(says: str, changed: PipelineProblem, orders: tuple[tuple[Action, ...], ...] = orders) -> None:
        with pytest.raises(ExecutionError, match=says):
            emitted(PipelineSchedule(changed, orders, "x"))

    replace = msgspec.structs.replace
    refused("vocabulary shards", replace(problem, vocabulary=Vocabulary((1, 1), (1, 1))))
    refused("2 routes", replace(problem, routes=(Route((0, 1), 1), Route((1, 0), 1))))
    refused(r"through stages \[0\] of 2", replace(problem, routes=(Route((0,), 2),)))
    refused("rank 1 has no stage", replace(problem, stages=(replace(STAGE, rank=0), replace(STAGE, rank=0))))
    refused("host memory", problem, (actions("0F0 0OFFLOAD0"), orders[1]))


def test_csv_has_a_row_a_rank() -> None:
    assert csv_of(one_f_one_b()).splitlines()[2] == "2F0,2B0,2F1,2B1,2F2,2B2"


def test_stages_that_cannot_split_do_their_backward_whole() -> None:
    schedule = whole_backwards(folded(), {3})
    assert schedule.orders[0] == actions("0F0 0F1 3F0 3B0 3F1 3B1 0I0 0W0 0I1 0W1")
    check_lowered(lowered_alone(schedule), schedule)


def test_another_torch_is_told_by_what_is_missing() -> None:
    class Other:
        def _load_csv(self, path: str) -> None:
            """Keeps nothing."""

    with pytest.raises(ExecutionError, match=re.escape("does not say what it made of the schedule")):
        load(Other(), one_f_one_b())
