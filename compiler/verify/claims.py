"""Whether the certificates a plan carries agree with the recount.

A certificate stands until a later pass takes the same decision again; a pass's decision is the folder in its name. An
order's peak was counted before residences were decided, so it is not held against them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..plan import Plan
from .faults import Fault, Finding

__all__ = ["check_claims"]


def check_claims(plan: Plan, additional_bytes: int, arena_bytes: int) -> Iterator[Finding]:
    """Standing certificates have the value counted here; none has a bound above its value."""
    counted: dict[str, int] = {}
    if plan.residences is not None:
        counted["additional_traffic_bytes"] = additional_bytes
        if all(residence.offset is not None for residence in plan.residences):
            counted["arena_bytes"] = arena_bytes
    standing = {record.name.partition("/")[0]: record for record in plan.passes}
    for record in plan.passes:
        certificate = record.certificate
        if certificate is None:
            continue
        if certificate.bound > certificate.value:
            message = f"pass {record.name!r} claims the bound {certificate.bound}, above its value {certificate.value}"
            yield Finding(Fault.CLAIM_REFUTED, message)
        recount = counted.get(certificate.objective)
        if standing[record.name.partition("/")[0]] is record and recount not in (None, certificate.value):
            message = (
                f"pass {record.name!r} claims {certificate.objective} = {certificate.value}, counted are {recount}"
            )
            yield Finding(Fault.CLAIM_REFUTED, message)
