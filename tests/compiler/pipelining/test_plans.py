"""Schedules written down as plans: the verifier finds nothing wrong with right ones, and names what is with others."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.plans import plans_of_steps, rank_plans
from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.schedule import Action, PipelineSchedule, TimedSchedule
from opweave.compiler.pipelining.simulate import timed
from opweave.compiler.pipelining.transfers import Step, Transfer, TransferKind, with_transfers
from opweave.compiler.plan import Plan, Run
from opweave.compiler.verify import Fault, verify, verify_ranks
from opweave.errors import OptionError
from tests.compiler.pipelining.drawn import problems, schedule_of

STAGE = Stage(0, 3, 2, 1, None, 2, 5, 1, forward_send_ns=7, backward_send_ns=4, forward_bytes=64, backward_bytes=64)


def _faults(plans: dict[int, Plan]) -> set[Fault]:
    alone = {finding.fault for plan in plans.values() for finding in verify(plan).faults}
    return alone | {finding.fault for finding in verify_ranks(plans)}


def _with_limit(done: TimedSchedule, limit: tuple[int, ...]) -> TimedSchedule:
    problem = msgspec.structs.replace(done.schedule.problem, memory_limit=limit)
    return timed(msgspec.structs.replace(done.schedule, problem=problem))


@given(problems(), st.randoms(use_true_random=False))
def test_right_schedules_have_no_fault(problem: PipelineProblem, random: Random) -> None:
    """Of every kind of problem, at exactly the bytes that the simulator counts; a byte less is noticed."""
    done = timed(schedule_of(problem, random))
    resident = problem.resident_bytes
    limit = tuple(max(peak, held + 1) for peak, held in zip(done.peak_bytes, resident, strict=True))
    plans = rank_plans(_with_limit(done, limit))
    assert _faults(plans) == set()
    for rank, plan in plans.items():
        assert verify(plan).peak_bytes + resident[rank] == done.peak_bytes[rank]
    short = tuple(each - 1 if each > held + 1 else each for each, held in zip(limit, resident, strict=True))
    again = _with_limit(done, short)  # what is offloaded may be waited for, and leave less
    missing = any(a < b for a, b in zip(short, again.peak_bytes, strict=True))
    assert _faults(rank_plans(again)) == ({Fault.CAPACITY_EXCEEDED} if missing else set())


@given(problems(), st.randoms(use_true_random=False))
def test_steps_without_times_are_judged_too(problem: PipelineProblem, random: Random) -> None:
    """Leaving out or doubling any one step of any rank is found."""
    problem = msgspec.structs.replace(problem, memory_limit=None)
    steps = with_transfers(timed(schedule_of(problem, random)))
    assert _faults(plans_of_steps(problem, steps)) == set()
    rank = random.choice([rank for rank, own in steps.items() if own] or [0])
    if not steps[rank]:
        return
    place = random.randrange(len(steps[rank]))
    without = {**steps, rank: (*steps[rank][:place], *steps[rank][place + 1 :])}
    assert _faults(plans_of_steps(problem, without)) != set()
    twice = {**steps, rank: (*steps[rank][: place + 1], *steps[rank][place:])}
    assert _faults(plans_of_steps(problem, twice)) != set()


def _one_forward_one_backward(ranks: int, microbatches: int, limit: int | None = None) -> TimedSchedule:
    problem = uniform(STAGE, placed("loop", ranks), microbatches, memory_limit=limit)
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - rank, microbatches)
        order = [f"{rank}F{number}" for number in range(ahead)]
        for number in range(microbatches):
            order += [f"{rank}I{number}", f"{rank}W{number}"]
            order += [f"{rank}F{number + ahead}"] if number + ahead < microbatches else []
        orders.append(tuple(map(Action.of, order)))
    return timed(PipelineSchedule(problem, tuple(orders), "1f1b"))


def _swapped(own: tuple[Step, ...], one: Step, other: Step) -> tuple[Step, ...]:
    exchange = {one: other, other: one}
    return tuple(exchange.get(step, step) for step in own)


def test_swapped_receives_are_found() -> None:
    """Ranks meet in order of issue: the data of one microbatch would be taken for those of another."""
    done = _one_forward_one_backward(2, 3)
    problem, steps = done.schedule.problem, with_transfers(done)
    receives = [Transfer(1, TransferKind.RECV_F, number) for number in range(2)]
    wrong = {**steps, 1: _swapped(steps[1], *receives)}
    assert Fault.COLLECTIVE_ORDER_DIFFERS in _faults(plans_of_steps(problem, wrong))
    (first, *_) = [f for f in verify_ranks(plans_of_steps(problem, wrong)) if f.fault is Fault.COLLECTIVE_ORDER_DIFFERS]
    assert "0SEND_F1 from rank 0" in first.message
    assert "0SEND_F0 from rank 0" in first.message


def test_ranks_that_wait_for_each_other_are_found() -> None:
    """A rank that first does its second chunk, which its own first chunk feeds through the other ranks."""
    problem = uniform(STAGE, placed("loop", 3, 2), 1)
    orders = [[f"{rank}F0", f"{rank + 3}F0"] for rank in range(3)]
    for rank, order in enumerate(orders):
        order += [f"{rank + 3}I0", f"{rank}I0", f"{rank + 3}W0", f"{rank}W0"]
    steps = with_transfers(timed(PipelineSchedule(problem, tuple(tuple(map(Action.of, order)) for order in orders))))
    assert _faults(plans_of_steps(problem, steps)) == set()
    late = (Action.of("0F0"), Transfer(0, TransferKind.SEND_F, 0))
    own = [step for step in steps[0] if step not in late]
    place = own.index(Action.of("3F0")) + 1
    wrong = {**steps, 0: (*own[:place], *late, *own[place:])}
    assert _faults(plans_of_steps(problem, wrong)) == {Fault.RANKS_WAIT_FOR_EACH_OTHER}


def test_too_many_in_flight_are_found() -> None:
    """Three microbatches of seven bytes, and one more while I holds its gradients, in a memory for two."""
    (plan, _) = rank_plans(_one_forward_one_backward(2, 4, limit=15)).values()
    assert verify(plan).faults == ()
    (plan, _) = rank_plans(_one_forward_one_backward(2, 4, limit=14)).values()
    (found,) = verify(plan).faults
    assert found.fault is Fault.CAPACITY_EXCEEDED
    assert "15 bytes are resident, 1 more than the 14" in found.message


def test_too_early_is_found() -> None:
    """An action that starts before its message has arrived; one that takes less time than the problem says."""
    done = _one_forward_one_backward(2, 2)
    plans = rank_plans(done)
    step = next(i for i, instruction in enumerate(plans[1].instructions) if isinstance(instruction, Run))
    run = plans[1].instructions[step]
    assert isinstance(run, Run)
    assert run.op == "1F0"
    assert run.start_s is not None
    early = msgspec.structs.replace(run, start_s=run.start_s - 1e-9)
    short = msgspec.structs.replace(run, finish_s=run.start_s + 2e-9)
    for wrong, fault in ((early, Fault.STARTS_BEFORE_OPERANDS), (short, Fault.FASTER_THAN_MACHINE)):
        instructions = (*plans[1].instructions[:step], wrong, *plans[1].instructions[step + 1 :])
        assert fault in _faults({**plans, 1: msgspec.structs.replace(plans[1], instructions=instructions)})


def test_a_message_that_arrives_before_it_is_sent_is_found() -> None:
    """What both ranks say of one message has to agree in time, too."""
    plans = rank_plans(_one_forward_one_backward(2, 2))
    step = next(
        i for i, instruction in enumerate(plans[0].instructions) if getattr(instruction, "op", "") == "0SEND_F0"
    )
    sent = plans[0].instructions[step]
    late = msgspec.structs.replace(sent, start_s=1.0, finish_s=1.0)
    instructions = (*plans[0].instructions[:step], late, *plans[0].instructions[step + 1 :])
    wrong = {**plans, 0: msgspec.structs.replace(plans[0], instructions=instructions)}
    assert Fault.ENDS_BEFORE_RANKS_START in {finding.fault for finding in verify_ranks(wrong)}
    assert verify_ranks(plans) == ()


def test_a_limit_below_what_is_resident_is_refused() -> None:
    """There is no memory to plan."""
    problem = uniform(msgspec.structs.replace(STAGE, resident_bytes=9), (0,), 1, memory_limit=9)
    with pytest.raises(OptionError, match="rank 0 may hold 9 bytes, of which 9"):
        plans_of_steps(problem, {0: ()})
