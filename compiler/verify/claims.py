"""Whether the certificates a plan carries agree with the recount.

A certificate stands until a later pass takes the same decision again, which is the folder in its name, or certifies
the same objective; a pass of ``joint`` takes all decisions. An order's peak was counted before residences were
decided, so it is not held against them. A latency hangs on every decision, so it stands only while no later pass has
decided anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..plan import PassRecord, Plan
from .faults import Fault, Finding
from .timing import is_timed

__all__ = ["check_claims"]


def check_claims(plan: Plan, additional_bytes: int, arena_bytes: int) -> Iterator[Finding]:
    """Standing certificates have the value counted here; none has a bound above its value."""
    counted: dict[str, int] = {}
    if plan.residences is not None:
        counted["additional_traffic_bytes"] = additional_bytes
        if all(residence.offset is not None for residence in plan.residences):
            counted["arena_bytes"] = arena_bytes
    finish = [i.finish_s or 0.0 for i in plan.instructions] if is_timed(plan) else [math.inf]
    if all(map(math.isfinite, finish)):
        counted["latency_ns"] = math.ceil(max(finish) * 1e9)
    standing = _standing(plan)
    for record in plan.passes:
        certificate = record.certificate
        if certificate is None:
            continue
        if certificate.bound > certificate.value:
            message = f"pass {record.name!r} claims the bound {certificate.bound}, above its value {certificate.value}"
            yield Finding(Fault.CLAIM_REFUTED, message)
        recount = counted.get(certificate.objective)
        hangs_on_later = certificate.objective == "latency_ns" and record is not plan.passes[-1]
        if (
            any(record is other for other in standing)
            and not hangs_on_later
            and recount not in (None, certificate.value)
        ):
            message = (
                f"pass {record.name!r} claims {certificate.objective} = {certificate.value}, counted are {recount}"
            )
            yield Finding(Fault.CLAIM_REFUTED, message)


def _standing(plan: Plan) -> list[PassRecord]:
    """The records whose decision no later one has taken again, nor certified by the same objective."""
    folders = [record.name.partition("/")[0] for record in plan.passes]
    objectives = [record.certificate and record.certificate.objective for record in plan.passes]
    return [
        record
        for i, record in enumerate(plan.passes)
        if not {folders[i], "joint"} & set(folders[i + 1 :]) and objectives[i] not in objectives[i + 1 :]
    ]
