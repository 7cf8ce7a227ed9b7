"""A graph planned for the objectives a user names, the most important first."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from ..compiler.pipeline import Budget, confirm
from ..compiler.plan import Certificate, PassRecord, Plan
from ..errors import Infeasible
from .address.banks import require_places
from .arena import least_arena
from .objective.measures import Objective
from .objective.refine import refine
from .planner import Planner
from .residency.gaps import base_bytes
from .residency.workset import require_fit

__all__ = ["plan_by"]

BYTES_HELD = (Objective.PEAK, Objective.ARENA)
PLANNING_SHARE = 0.6  # of the time, where refining follows


def plan_by(plan: Plan, planner: Planner, wanted: Sequence[Objective], budget: Budget) -> Plan:
    """Decide order, residency and addresses of ``plan`` so that ``wanted`` is lexicographically small.

    Traffic alone is what ``planner`` minimises. For anything else its plan is refined (``objective/refine``). For
    ``peak`` and ``arena``, alone or right behind ``traffic``, the plan that is refined is the one of least arena with
    nothing spilled (``arena.least_arena``), where that fits the scratchpad and no passes have been named for order and
    addresses; a remark says where it does not.

    Raises:
        Infeasible: as ``Planner.plan``.
    """
    if tuple(wanted) == (Objective.TRAFFIC,):
        return planner.plan(plan, budget)
    return refine(_planned(plan, planner, wanted, budget.share(PLANNING_SHARE)), wanted, planner.placed, budget)


def _planned(plan: Plan, planner: Planner, wanted: Sequence[Objective], budget: Budget) -> Plan:
    first = wanted[1] if wanted[0] is Objective.TRAFFIC else wanted[0]
    if first not in BYTES_HELD or (planner.order, planner.address) != (Planner.order, Planner.address):
        return planner.plan(plan, budget)
    require_fit(plan)
    require_places(plan, budget)
    begin = time.monotonic()
    try:
        return _certified(least_arena(plan, budget.share(0.5)))
    except Infeasible as failure:
        note = f"no plan that spills nothing: {failure.message}"
    return planner.plan(plan.with_record(PassRecord("arena", time.monotonic() - begin, None, note)), budget)


def _certified(plan: Plan) -> Plan:
    """``plan``, which spills nothing: what holds for its order then holds for every one."""
    least = Certificate("additional_traffic_bytes", base_bytes(plan), base_bytes(plan), "analytic", "order")
    passes = (
        msgspec.structs.replace(record, certificate=least)
        if record.certificate is not None and record.certificate.objective == least.objective
        else record
        for record in plan.passes
    )
    proven = msgspec.structs.replace(plan, passes=tuple(passes))
    confirm("arena", proven, least)
    return proven
