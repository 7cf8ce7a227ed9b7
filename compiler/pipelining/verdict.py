"""Whether a pipeline schedule is right, by the judge of all plans, which knows nothing of pipelines."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import InternalError
from ..plan import Plan
from ..verify import Finding, verify, verify_ranks
from .plans import rank_plans
from .schedule import ActionKind, TimedSchedule

__all__ = ["faults_of_plans", "verified"]

_REPORT = "please report this"


def faults_of_plans(plans: Mapping[int, Plan]) -> tuple[tuple[int | None, Finding], ...]:
    """What is wrong with the plans of ranks: with each alone, by rank, and then with all together."""
    alone = [(rank, finding) for rank, plan in sorted(plans.items()) for finding in verify(plan).faults]
    return (*alone, *((None, finding) for finding in verify_ranks(plans)))


def verified(timed: TimedSchedule) -> dict[int, Plan]:
    """The plan of each rank of ``timed``, in which the verifier found no fault; seconds for 100,000 actions.

    Raises:
        InternalError: a fault, a rank that by its plan holds another number of bytes than the schedule claims, or what
            plans do not time, copies and all-reduces, missing or in less time than it takes.
        OptionError: a rank's limit is below what is resident on it.
    """
    plans = rank_plans(timed)
    for rank, finding in faults_of_plans(plans):
        where = "the ranks together" if rank is None else f"rank {rank}"
        raise InternalError(f"a pipeline schedule has a fault, {where}: {finding}", hint=_REPORT)
    for rank, plan in plans.items():
        peak = verify(plan).peak_bytes + timed.schedule.problem.resident_bytes[rank]
        if peak != timed.peak_bytes[rank]:
            raise InternalError(
                f"rank {rank} holds {peak} bytes by its plan, {timed.peak_bytes[rank]} by its schedule",
                hint=_REPORT,
            )
    _check_beside(timed)
    return plans


def _check_beside(timed: TimedSchedule) -> None:
    """Copies and all-reduces take their time: a plan's own are as fast as they are said to be."""
    stages, done = timed.schedule.problem.stages, {stage: end - at for line in timed.reduced for stage, at, end in line}
    for order, starts, finishes in zip(timed.schedule.orders, timed.starts, timed.finishes, strict=True):
        for action, start, finish in zip(order, starts, finishes, strict=True):
            if action.kind.copies:
                stage = stages[action.stage]
                least = stage.offload_ns if action.kind is ActionKind.OFFLOAD else stage.reload_ns
                _check_time(str(action), finish - start, least)
            elif action.kind in (ActionKind.WEIGHT_GRADIENT, ActionKind.BACKWARD):
                least = stages[action.stage].reduce_ns
                _check_time(f"the all-reduce of stage {action.stage}", done.get(action.stage, 0), least)


def _check_time(what: str, given: int, least: int) -> None:
    if given < least:
        raise InternalError(f"a pipeline schedule gives {what} {given} of the {least} that it takes", hint=_REPORT)
