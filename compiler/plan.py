"""The space-time plan: instructions occupy engines over time, buffers occupy addresses of a memory over time.

A *step* is the index of an instruction in ``Plan.instructions``. A residence ``[begin, end)`` holds its bytes while
instructions ``begin`` to ``end - 1`` run. Undecided parts are ``None``: an order alone has neither residences nor
times; a residency has residences without offsets. Taking a decision again drops the later ones that hung on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import OptionError, OpweaveError, PlanError
from ..hw_models.model import HardwareModel
from .graph import Graph

__all__ = [
    "SCHEMA_VERSION",
    "Certificate",
    "CollectiveStart",
    "CollectiveWait",
    "Instruction",
    "Load",
    "PassRecord",
    "Pin",
    "Plan",
    "Recompute",
    "Residence",
    "Run",
    "Source",
    "Store",
    "relative_gap",
]

SCHEMA_VERSION = 1


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="run", tag_field="do", omit_defaults=True):
    """Execute operator ``op`` on a compute engine; its buffers are resident, or streamed from backing memory."""

    op: str
    engine: str = ""
    start_s: float | None = None
    finish_s: float | None = None


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="load", tag_field="do", omit_defaults=True):
    """Copy ``buffer`` from backing memory into the residence that begins at this step."""

    buffer: str
    engine: str = ""
    start_s: float | None = None
    finish_s: float | None = None


class Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="store", tag_field="do", omit_defaults=True):
    """Copy ``buffer`` from its residence to backing memory; it stays resident until its residence ends."""

    buffer: str
    engine: str = ""
    start_s: float | None = None
    finish_s: float | None = None


class Recompute(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="recompute", tag_field="do", omit_defaults=True
):
    """Execute operator ``op`` once more, after its ``Run``, on the versions of its operands that the ``Run`` read.

    All its outputs that have bytes begin a residence at this step and hold what they held before. The operator is
    repeatable and the only one that writes them; its operands are resident or streamed, as for a ``Run``.
    """

    op: str
    engine: str = ""
    start_s: float | None = None
    finish_s: float | None = None


class CollectiveStart(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="collective_start", tag_field="do", omit_defaults=True
):
    """Hand collective ``op`` to the links: it reads and writes its buffers from ``start_s`` to ``finish_s``.

    ``engine`` is the link it occupies, ``mode`` how it is done, such as an algorithm and its programs. Nobody may
    read or write what it writes, or write what it reads, before its ``CollectiveWait``.
    """

    op: str
    engine: str = ""
    start_s: float | None = None
    finish_s: float | None = None
    mode: str = ""


class CollectiveWait(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="collective_wait", tag_field="do", omit_defaults=True
):
    """Let what comes behind wait for collective ``op``. It occupies nothing: start and finish are one moment."""

    op: str
    engine: str = ""
    start_s: float | None = None
    finish_s: float | None = None


Instruction = Run | Load | Store | Recompute | CollectiveStart | CollectiveWait


class Residence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``buffer`` occupies ``memory`` from byte ``offset`` during steps ``begin`` to ``end - 1``."""

    buffer: str
    memory: str
    begin: int
    end: int
    offset: int | None = None


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the user has decided about ``buffer``: all its residences begin at byte ``offset``, or lie in bank number
    ``bank`` of the scratchpad; with ``resident`` it has one residence, from its first to its last use.
    """

    buffer: str
    offset: int | None = None
    bank: int | None = None
    resident: bool = False


def relative_gap(value: int, bound: int) -> float:
    """``(value - bound) / value``, and 0 for a value that has reached its bound."""
    return 0.0 if value <= bound else (value - bound) / value


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How good a decision is: its ``value``, a proven lower ``bound``, what proved it, and over which choices.

    ``scope`` says what the bound ranges over: ``"order"`` is every order, residency and placement of the graph;
    ``"residency"`` every residency of the plan's own order; ``"recompute"`` those that recompute nothing but what the
    pass considered; ``"address"`` every placement of the plan's residences. The first two recompute nothing, unless
    the bound is the traffic that no plan avoids.
    """

    objective: Literal["additional_traffic_bytes", "peak_bytes", "arena_bytes", "latency_ns"]
    value: int
    bound: int
    proved_by: Literal["ilp", "lp", "cp", "exhaustive", "analytic"]
    scope: Literal["order", "residency", "recompute", "address"]

    @property
    def gap(self) -> float:
        """``(value - bound) / value``: 0 is optimal, 1 means nothing is proven."""
        return relative_gap(self.value, self.bound)


class PassRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one pass did: its path name with options, the seconds it took, what it proved, and a remark for the user."""

    name: str
    seconds: float
    certificate: Certificate | None = None
    note: str = ""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the model came from, so that a saved plan can be bound to its weights again.

    ``sha256`` is of the model file's bytes; ``dims`` bound symbolic dimensions; ``fill_seed`` says that all-equal
    weights were replaced by random ones; ``operators`` counts how operators were imported, by kind and type.
    """

    path: str = ""
    sha256: str = ""
    dims: dict[str, int] = {}
    fill_seed: int | None = None
    operators: dict[str, dict[str, int]] = {}


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph woven onto a machine.

    ``streamed`` names weight and constant buffers that operators read directly from backing memory, each read moving
    the buffer's bytes once; everything else an operator touches must be resident in the scratchpad. ``pins`` are what
    the user has decided; they hold for every later decision.
    """

    graph: Graph
    machine: HardwareModel
    instructions: tuple[Instruction, ...]
    residences: tuple[Residence, ...] | None = None
    streamed: tuple[str, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    source: Source = Source()
    pins: tuple[Pin, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of_order(
        cls,
        graph: Graph,
        machine: HardwareModel,
        order: Iterable[int] | None = None,
        *,
        streamed: Iterable[str] = (),
        source: Source | None = None,
        pins: Iterable[Pin] = (),
    ) -> Plan:
        """A plan that has decided nothing but the order (operator indices; program order when ``None``)."""
        indices = range(len(graph.ops)) if order is None else order
        runs = tuple(Run(graph.ops[i].name) for i in indices)
        return cls(graph, machine, runs, streamed=tuple(sorted(streamed)), source=source or Source(), pins=tuple(pins))

    @property
    def order(self) -> tuple[int, ...]:
        """Operator indices in the order the plan runs them; recomputing one again changes nothing."""
        index = {op.name: i for i, op in enumerate(self.graph.ops)}
        return tuple(index[i.op] for i in self.instructions if isinstance(i, Run))

    def with_order(self, order: Iterable[int]) -> Plan:
        """The same plan with another order; residences, offsets and times are dropped."""
        fresh = Plan.of_order(
            self.graph, self.machine, order, streamed=self.streamed, source=self.source, pins=self.pins
        )
        return msgspec.structs.replace(fresh, passes=self.passes)

    def with_record(self, record: PassRecord) -> Plan:
        """The same plan with one more pass recorded."""
        return msgspec.structs.replace(self, passes=(*self.passes, record))

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """Certificates of all passes, in the order they ran."""
        return tuple(record.certificate for record in self.passes if record.certificate is not None)

    def to_json(self) -> bytes:
        """The plan as JSON, the same bytes for the same plan."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1)

    @classmethod
    def from_json(cls, data: bytes | str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: not JSON, another schema version, a missing or mistyped field, or a graph or machine that
                contradicts itself. Whether the plan is *right* is the verifier's question.
        """
        try:
            version = msgspec.json.decode(data, type=_Header).schema_version
            if version != SCHEMA_VERSION:
                raise PlanError(
                    f"the plan has schema version {version}; this opweave reads version {SCHEMA_VERSION}",
                    hint="compile the model again with this version of opweave",
                )
            return msgspec.json.decode(data, type=cls)
        except PlanError:
            raise
        except OpweaveError as error:
            raise PlanError(f"the plan contradicts itself: {error.message}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"not a plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON to ``path``, creating its folder. Raises OptionError where that cannot be written."""
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.to_json())
        except OSError as error:
            raise OptionError(f"cannot write plan {str(path)!r}: {error.strerror}", hint="name another file") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file. Raises PlanError as ``from_json``, and when the file cannot be read."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise PlanError(f"cannot read plan {str(path)!r}: {error.strerror}") from error
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise PlanError(f"cannot read plan {str(path)!r}: {error.message}", hint=error.hint) from error


class _Header(msgspec.Struct):
    schema_version: int
