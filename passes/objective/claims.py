"""What earlier passes proved, once a plan has changed: certificates that still hold, restated, and those withdrawn."""

from __future__ import annotations

import msgspec

from ...compiler.plan import Certificate, PassRecord, Plan
from ...compiler.verify import verify
from ..residency.gaps import GapProblem, base_bytes

__all__ = ["for_another_order", "for_recomputation", "for_the_full_capacity", "restated"]


def for_another_order(plan: Plan) -> Plan:
    """``plan`` with only those certificates that speak of every order; the others were about its own."""
    kept = (
        record
        if record.certificate is None or record.certificate.scope == "order"
        else msgspec.structs.replace(record, certificate=None)
        for record in plan.passes
    )
    return msgspec.structs.replace(plan, passes=tuple(kept))


def for_recomputation(plan: Plan) -> Plan:
    """``plan`` with bounds on its traffic that hold as well for plans that compute dropped tensors again.

    What was proven without recomputation may not hold; what no plan avoids does, as running again only reads more.
    """
    base = base_bytes(plan)
    return msgspec.structs.replace(plan, passes=tuple(_recomputable(record, base) for record in plan.passes))


def _recomputable(record: PassRecord, base: int) -> PassRecord:
    certificate = record.certificate
    if certificate is None or certificate.objective != "additional_traffic_bytes" or certificate.bound <= base:
        return record
    weaker = msgspec.structs.replace(certificate, bound=base, proved_by="analytic")
    return msgspec.structs.replace(record, certificate=weaker)


def for_the_full_capacity(plan: Plan, before: Plan) -> Plan:
    """``plan``, made for a smaller scratchpad out of ``before``, with the bounds that hold in the real one.

    What a pass proved for less capacity says nothing about more. The traffic of the order is bounded by what was
    proven of it ``before``, or else by what no residency avoids.
    """
    bound = max(
        [
            GapProblem.of(plan).base_bytes,
            *(c.bound for c in before.certificates if c.objective == "additional_traffic_bytes"),
        ]
    )
    kept = len(before.passes)
    fresh = (_weakened(record, bound) for record in plan.passes[kept:])
    return msgspec.structs.replace(plan, passes=(*plan.passes[:kept], *fresh))


def _weakened(record: PassRecord, traffic_bound: int) -> PassRecord:
    certificate = record.certificate
    if certificate is None or certificate.objective == "arena_bytes":  # of the residences alone, whatever the capacity
        return record
    if certificate.objective != "additional_traffic_bytes":
        return msgspec.structs.replace(record, certificate=None)
    bound = min(certificate.value, traffic_bound)
    weaker = Certificate("additional_traffic_bytes", certificate.value, bound, "analytic", "residency")
    return msgspec.structs.replace(record, certificate=weaker)


def restated(plan: Plan) -> Plan:
    """``plan`` with the values of its traffic certificates for every order as they are now, and no refuted one.

    A bound over every order stays a bound for plans of the kind it was proven for; that it is above the plan's traffic
    shows one of another kind, such as one that recomputes. A bound over less goes with the value it was stated for.
    """
    traffic = verify(msgspec.structs.replace(plan, passes=())).additional_bytes
    return msgspec.structs.replace(plan, passes=tuple(_restated(record, traffic) for record in plan.passes))


def _restated(record: PassRecord, traffic: int) -> PassRecord:
    certificate = record.certificate
    if certificate is None or certificate.objective != "additional_traffic_bytes" or certificate.value == traffic:
        return record
    if certificate.scope != "order" or certificate.bound > traffic:
        return msgspec.structs.replace(record, certificate=None)
    return msgspec.structs.replace(record, certificate=msgspec.structs.replace(certificate, value=traffic))
