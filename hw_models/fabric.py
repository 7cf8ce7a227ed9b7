"""What joins the devices of one machine: how many there are, and what each way of doing a collective costs."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Annotated

import msgspec

from ..errors import MachineError

__all__ = [
    "CollectiveKind",
    "CollectiveRate",
    "Fabric",
    "Interference",
    "KernelKind",
    "Scope",
    "Traffic",
    "steps",
    "wire_bytes",
]

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]


class CollectiveKind(StrEnum):
    """What the ranks of a group do with one another's tensors; the names are those of ``compiler.graph``.

    A group of two also sends and receives: one rank's tensor becomes the other's.
    """

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    SEND_RECV = "send_recv"


class Scope(StrEnum):
    """Where a rate holds: among devices of one node, or between nodes with one device of each."""

    WITHIN_NODE = "within_node"
    ACROSS_NODES = "across_nodes"


class Traffic(StrEnum):
    """How bytes reach the others: from device to device (a ring, or every pair), or through a switch that reduces
    what it reads and copies what it writes (multimem instructions).
    """

    PEERS = "peers"
    SWITCH = "switch"


class KernelKind(StrEnum):
    """What was measured beside matrix products: collectives, or products of a matrix and a vector."""

    NETWORK = "network"
    MATRIX_VECTOR = "matrix_vector"


def wire_bytes(kind: CollectiveKind, traffic: Traffic, ranks: int) -> float:
    """Bytes that a rank sends, or receives if those are more, for each byte of the whole message.

    Among peers an all-reduce is a reduce-scatter and an all-gather, each of which leaves out a rank's own part
    (Patarasuk and Yuan, Journal of Parallel and Distributed Computing 69(2), 2009). Through a switch the whole message
    leaves a rank once to be reduced and reaches it once; an all-reduce has its own part beside it.
    """
    if kind in (CollectiveKind.BROADCAST, CollectiveKind.SEND_RECV):
        return 1.0
    if traffic is Traffic.SWITCH:
        return 1 + 1 / ranks if kind is CollectiveKind.ALL_REDUCE else 1.0
    return (2 if kind is CollectiveKind.ALL_REDUCE else 1) * (ranks - 1) / ranks


def steps(kind: CollectiveKind, traffic: Traffic, ranks: int) -> int:
    """Messages between two devices that follow one another; through a switch there are none that grow in number."""
    if traffic is Traffic.SWITCH:
        return 0
    return (2 if kind is CollectiveKind.ALL_REDUCE else 1) * (ranks - 1)


class CollectiveRate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one way of doing a collective costs, as measured with ``ranks`` ranks.

    A message of ``nbytes`` (the whole, as ``compiler.graph.Collective`` counts it) takes ``alpha_s + nbytes /
    bandwidth_bytes_per_s``; or, where these are left out, what lies on the line between two of the measurements
    ``measured_s`` of ``measured_bytes``. ``step_s`` is the part of it for each of the ``steps`` that follow one
    another. ``algorithm`` names the way and ``traffic`` how it scales; with ``fuses``, it does that as well.

    While it runs it occupies one multiprocessor for each of its ``programs``, or ``compute_share`` of the compute
    engine where that is stated, and moves ``memory_bytes_per_byte`` bytes in the scratchpad for each of the message.
    Where each rank works on one part of the message, as with a switch, ``part_bytes_per_s`` is what one program gets
    through of it: with fewer ranks the parts are larger, and few programs no longer fill the link.
    """

    kind: CollectiveKind
    algorithm: str
    link: str
    ranks: PositiveInt
    alpha_s: NonNegativeFloat = 0.0
    bandwidth_bytes_per_s: PositiveFloat | None = None
    measured_bytes: tuple[PositiveInt, ...] = ()
    measured_s: tuple[PositiveFloat, ...] = ()
    step_s: NonNegativeFloat = 0.0
    traffic: Traffic = Traffic.PEERS
    scope: Scope = Scope.WITHIN_NODE
    programs: NonNegativeInt = 0
    compute_share: NonNegativeFloat | None = None
    part_bytes_per_s: PositiveFloat | None = None
    memory_bytes_per_byte: NonNegativeFloat = 0.0
    fuses: str = ""

    @property
    def fixed_s(self) -> float:
        """Seconds of a message without bytes, with ``ranks`` ranks."""
        return self.seconds_at(0)

    def seconds_at(self, nbytes: float) -> float:
        """Seconds of a message of ``nbytes`` with ``ranks`` ranks; outside what was measured, the nearest line."""
        if self.bandwidth_bytes_per_s is not None:
            return self.alpha_s + nbytes / self.bandwidth_bytes_per_s
        sizes, times = self.measured_bytes, self.measured_s
        right = next((i for i in range(1, len(sizes)) if nbytes <= sizes[i]), len(sizes) - 1)
        slope = (times[right] - times[right - 1]) / (sizes[right] - sizes[right - 1])
        return times[right] + (nbytes - sizes[right]) * slope

    @property
    def wire_bytes_per_s(self) -> float:
        """Bytes a rank has on the wire in a second of a message that is long."""
        if self.bandwidth_bytes_per_s is not None:
            rate = self.bandwidth_bytes_per_s
        else:
            rate = (self.measured_bytes[-1] - self.measured_bytes[-2]) / (self.measured_s[-1] - self.measured_s[-2])
        return rate * wire_bytes(self.kind, self.traffic, self.ranks)

    def problem(self) -> str:
        """What no machine may state, in words; empty where all is well."""
        return self._problem_of_curve() or self._problem_of_use()

    def _problem_of_curve(self) -> str:
        if self.ranks < 2:
            return f"has ranks {self.ranks}, allowed are 2 or more"
        if (self.bandwidth_bytes_per_s is None) == (not self.measured_bytes):
            return "takes either bandwidth_bytes_per_s, with alpha_s, or measured_bytes and measured_s"
        if self.measured_bytes and self.alpha_s:
            return "takes alpha_s beside bandwidth_bytes_per_s only"
        if len(self.measured_bytes) != len(self.measured_s) or len(self.measured_s) == 1:
            counts = f"{len(self.measured_bytes)} measured_bytes and {len(self.measured_s)} measured_s"
            return f"has {counts}, allowed are as many of both, 2 or more"
        for name in ("measured_bytes", "measured_s"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                return f"has {name} that do not increase"
        if self.fixed_s < 0:
            return "has measurements whose first line takes less than no time without bytes"
        if self.fixed_s < self.step_s * steps(self.kind, self.traffic, self.ranks):
            return f"takes {self.fixed_s:g} s for a message without bytes, less than its steps of {self.step_s:g} s"
        return ""

    def _problem_of_use(self) -> str:
        if self.traffic is Traffic.SWITCH and self.kind is CollectiveKind.ALL_TO_ALL:
            return "has traffic 'switch', allowed is 'peers': a switch neither reduces nor copies in an all_to_all"
        if self.traffic is Traffic.SWITCH and self.scope is Scope.ACROSS_NODES:
            return "has traffic 'switch' across nodes, allowed is 'peers'"
        if self.part_bytes_per_s is not None and not self.programs:
            return "has part_bytes_per_s, which is that of one program, and no programs"
        if self.compute_share is not None and self.compute_share > 1:
            return f"has compute_share {self.compute_share}, allowed are numbers from 0 to 1"
        return ""


class Fabric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``devices`` equal devices, ``devices_per_node`` in a node, and the ``rates`` of their collectives.

    Device ``d`` holds rank ``d`` and is in node ``d // devices_per_node``. The machine describes one of them. Where
    several rates have one kind, algorithm and number of programs, the library behind them takes the fastest.
    """

    devices: PositiveInt
    devices_per_node: PositiveInt
    rates: tuple[CollectiveRate, ...]

    def check(
        self, machine: str, links: Collection[str], multiprocessors: int | None, *, shares_measured: bool
    ) -> None:
        """Check that ``machine``, with these links and this many multiprocessors, can have this fabric.

        With ``shares_measured``, a table of interference says what part of compute a rate takes that does not.

        Raises:
            MachineError: it cannot; the message names the field.
        """
        if self.devices < 2 or self.devices % self.devices_per_node:
            raise MachineError(
                f"machine {machine!r}: fabric.devices is {self.devices}, allowed are multiples of its "
                f"devices_per_node, {self.devices_per_node}, from 2"
            )
        seen: set[CollectiveRate] = set()
        for index, rate in enumerate(self.rates):
            where = f"machine {machine!r}: fabric.rates[{index}] ({rate.kind.value}, {rate.algorithm!r})"
            if problem := rate.problem():
                raise MachineError(f"{where} {problem}")
            if rate.link not in links:
                raise MachineError(f"{where} has link {rate.link!r}, allowed are its links: {', '.join(sorted(links))}")
            if not (rate.programs or shares_measured) and rate.compute_share is None:
                raise MachineError(
                    f"{where} states neither programs nor compute_share",
                    hint="copy engines have compute_share = 0; a table of interference of 'network' says it, too",
                )
            if rate.programs and rate.compute_share is None and rate.programs > (multiprocessors or 0):
                raise MachineError(
                    f"{where} has programs {rate.programs}, allowed are up to its tiling's multiprocessors, "
                    f"{multiprocessors or 'none'}",
                    hint="state the machine's tiling, or the compute_share of the rate",
                )
            if rate in seen:
                raise MachineError(f"{where} is stated twice")
            seen.add(rate)


class Interference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What another kernel gains from what a matrix multiplication gives up, measured in pairs.

    Where the multiplication gives up the part ``given_up[i]`` of its speed, a kernel of ``kernel`` reaches the part
    ``reached[i]`` of its own. Both increase; nothing is known between the pairs.
    """

    kernel: KernelKind
    given_up: tuple[PositiveFloat, ...]
    reached: tuple[PositiveFloat, ...]

    def check(self, machine: str, before: Collection[Interference]) -> None:
        """Check that ``machine`` can state this table behind those ``before``.

        Raises:
            MachineError: it cannot; the message names the field.
        """
        problem = "is stated twice" if self.kernel in [table.kernel for table in before] else ""
        if not self.given_up or len(self.given_up) != len(self.reached):
            problem = f"has {len(self.given_up)} of given_up and {len(self.reached)} of reached"
        for name in ("given_up", "reached"):
            values = list(getattr(self, name))
            if values != sorted(set(values)) or max(values, default=0) > 1:
                problem = problem or f"has {name} {values}, allowed are increasing numbers up to 1"
        if problem:
            raise MachineError(f"machine {machine!r}: the interference of {self.kernel.value!r} {problem}")
