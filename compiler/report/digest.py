"""The facts of a plan that every report states, gathered once: nothing here is claimed, all of it is recounted.

Traffic, peak and faults are the verifier's count; latency, utilisation and the roofline are the simulator's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from ...errors import PlanError
from ..plan import Certificate, Plan
from ..simulate import latency_ns, timeline_summary
from ..verify import Verification, verify
from .view import is_timed, role_of

__all__ = ["CertificateFacts", "Digest", "MovedBuffer", "digest"]


class CertificateFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate with its gap; ``stands`` says whether the plan still has the value that was certified."""

    pass_name: str
    objective: str
    value: int
    bound: int
    gap: float
    proved_by: str
    scope: str
    stands: bool


class MovedBuffer(msgspec.Struct, frozen=True, kw_only=True):
    """What one buffer moves between backing memory and scratchpad or engines, in bytes."""

    buffer: str
    role: str
    nbytes: int
    loaded_bytes: int
    stored_bytes: int
    streamed_bytes: int
    compulsory_bytes: int
    additional_bytes: int


class PassFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A pass that ran, how long it took, and its remark."""

    name: str
    seconds: float
    note: str


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How long an engine works, and which part of the latency that is."""

    name: str
    kind: str
    busy_s: float
    utilisation: float


class TimeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Simulated latency against the roofline bound; ``terms`` are the seconds of each roof, the bound their largest."""

    latency_s: float
    bound_s: float
    bound_by: str
    terms: dict[str, float]
    engines: tuple[EngineFacts, ...]


class FaultFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One fault the verifier found."""

    fault: str
    message: str
    step: int | None


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Size of the model."""

    name: str
    path: str
    operators: int
    tensors: int
    buffers: int
    flops: int


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and its planned memory."""

    name: str
    description: str
    scratchpad: str
    backing: str
    capacity_bytes: int
    alignment_bytes: int


class TrafficFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes moved between backing memory and scratchpad or engines."""

    compulsory_bytes: int
    additional_bytes: int
    total_bytes: int
    loaded_bytes: int
    stored_bytes: int
    streamed_bytes: int


class Digest(msgspec.Struct, frozen=True, kw_only=True):
    """All facts; ``operators`` counts imported operators by how (native, fallback, opaque) and by type."""

    model: ModelFacts
    machine: MachineFacts
    level: str
    verified: bool
    faults: tuple[FaultFacts, ...]
    instructions: dict[str, int]
    residences: int
    streamed_buffers: int
    peak_bytes: int
    arena_bytes: int
    traffic: TrafficFacts
    certificates: tuple[CertificateFacts, ...]
    passes: tuple[PassFacts, ...]
    time: TimeFacts | None
    operators: dict[str, dict[str, int]]
    moved: tuple[MovedBuffer, ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON has them: dictionaries, lists, numbers and strings."""
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return plain


def digest(plan: Plan, verification: Verification | None = None) -> Digest:
    """Recount ``plan``; a ``verification`` of the same plan spares verifying it again."""
    counted = verification or verify(plan)
    memory = plan.machine.scratchpad_memory
    return Digest(
        model=_model(plan),
        machine=MachineFacts(
            name=plan.machine.name,
            description=plan.machine.description,
            scratchpad=plan.machine.scratchpad,
            backing=plan.machine.backing,
            capacity_bytes=memory.capacity_bytes,
            alignment_bytes=memory.alignment_bytes,
        ),
        level=counted.level,
        verified=not counted.faults,
        faults=tuple(FaultFacts(fault=f.fault.value, message=f.message, step=f.step) for f in counted.faults),
        instructions=dict(Counter(type(i).__name__.lower() for i in plan.instructions)),
        residences=len(plan.residences or ()),
        streamed_buffers=len(plan.streamed),
        peak_bytes=counted.peak_bytes,
        arena_bytes=counted.arena_bytes,
        traffic=TrafficFacts(
            compulsory_bytes=counted.compulsory_bytes,
            additional_bytes=counted.additional_bytes,
            total_bytes=counted.total_bytes,
            loaded_bytes=sum(t.loaded_bytes for t in counted.traffic),
            stored_bytes=sum(t.stored_bytes for t in counted.traffic),
            streamed_bytes=sum(t.streamed_bytes for t in counted.traffic),
        ),
        certificates=tuple(
            _certificate(plan, record.name, record.certificate, counted)
            for record in plan.passes
            if record.certificate is not None
        ),
        passes=tuple(PassFacts(name=r.name, seconds=r.seconds, note=r.note) for r in plan.passes),
        time=_time(plan, counted),
        operators={kind: dict(counts) for kind, counts in plan.source.operators.items()},
        moved=_moved(plan, counted),
    )


def _model(plan: Plan) -> ModelFacts:
    graph = plan.graph
    return ModelFacts(
        name=graph.name,
        path=plan.source.path,
        operators=len(graph.ops),
        tensors=len(graph.tensors),
        buffers=len(graph.buffers),
        flops=sum(op.flops for op in graph.ops),
    )


def _certificate(plan: Plan, name: str, certificate: Certificate, counted: Verification) -> CertificateFacts:
    recounted = {
        "additional_traffic_bytes": counted.additional_bytes,
        "peak_bytes": counted.peak_bytes,
        "arena_bytes": counted.arena_bytes,
        "latency_ns": latency_ns(plan) if certificate.objective == "latency_ns" else 0,
    }
    return CertificateFacts(
        pass_name=name,
        objective=certificate.objective,
        value=certificate.value,
        bound=certificate.bound,
        gap=certificate.gap,
        proved_by=certificate.proved_by,
        scope=certificate.scope,
        stands=certificate.value == recounted[certificate.objective],
    )


def _moved(plan: Plan, counted: Verification) -> tuple[MovedBuffer, ...]:
    """Buffers by additional traffic, then by all traffic, then by name."""
    base = plan.graph.buffers
    rows = [
        MovedBuffer(
            buffer=t.buffer,
            role=role_of(plan, t.buffer),
            nbytes=base[t.buffer].nbytes if t.buffer in base else 0,
            loaded_bytes=t.loaded_bytes,
            stored_bytes=t.stored_bytes,
            streamed_bytes=t.streamed_bytes,
            compulsory_bytes=t.compulsory_bytes,
            additional_bytes=t.total_bytes - t.compulsory_bytes,
        )
        for t in counted.traffic
    ]
    return tuple(sorted(rows, key=lambda r: (-r.additional_bytes, -r.compulsory_bytes, r.buffer)))


def _time(plan: Plan, counted: Verification) -> TimeFacts | None:
    if not is_timed(plan):
        return None
    try:
        timeline = timeline_summary(plan)
    except PlanError:
        if counted.faults:
            return None  # the faults say what is wrong with the times
        raise
    terms = {"compute": timeline.compute_bound_s, "transfer": timeline.transfer_bound_s}
    if timeline.communication_bound_s:
        terms["communication"] = timeline.communication_bound_s
    return TimeFacts(
        latency_s=timeline.latency_s,
        bound_s=timeline.bound_s,
        bound_by=timeline.bound_by,
        terms=terms,
        engines=tuple(
            EngineFacts(name=e.engine, kind=e.kind, busy_s=e.busy_s, utilisation=e.utilisation)
            for e in timeline.engines
        ),
    )
