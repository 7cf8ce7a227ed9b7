"""Whether a pipeline schedule is right, by the judge of all plans, which knows nothing of pipelines."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import InternalError
from ..plan import Plan
from ..verify import Finding, verify, verify_ranks
from .plans import rank_plans
from .schedule import TimedSchedule

__all__ = ["faults_of_plans", "verified"]


def faults_of_plans(plans: Mapping[int, Plan]) -> tuple[tuple[int | None, Finding], ...]:
    """What is wrong with the plans of ranks: with each alone, by rank, and then with all together."""
    alone = [(rank, finding) for rank, plan in sorted(plans.items()) for finding in verify(plan).faults]
    return (*alone, *((None, finding) for finding in verify_ranks(plans)))


def verified(timed: TimedSchedule) -> dict[int, Plan]:
    """The plan of each rank of ``timed``, in which the verifier found no fault; seconds for 100,000 actions.

    Raises:
        InternalError: a fault, or a rank that by its plan holds another number of bytes than the schedule claims.
        OptionError: a rank's limit is below what is resident on it.
    """
    plans = rank_plans(timed)
    for rank, finding in faults_of_plans(plans):
        where = "the ranks together" if rank is None else f"rank {rank}"
        raise InternalError(f"a pipeline schedule has a fault, {where}: {finding}", hint="please report this")
    for rank, plan in plans.items():
        peak = verify(plan).peak_bytes + timed.schedule.problem.resident_bytes[rank]
        if peak != timed.peak_bytes[rank]:
            raise InternalError(
                f"rank {rank} holds {peak} bytes by its plan, {timed.peak_bytes[rank]} by its schedule",
                hint="please report this",
            )
    return plans
