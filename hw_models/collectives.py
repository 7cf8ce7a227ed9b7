"""What a collective costs on a machine, in each way it can be done there: seconds, and what it takes from compute.

Message bytes are those of the whole message, as ``compiler.graph.Collective`` counts them. The formulas, what they are
fitted to and how well, are in ``docs/formulations/collectives.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import MachineError
from .fabric import CollectiveKind, CollectiveRate, Fabric, Scope, Traffic, steps, wire_bytes
from .model import HardwareModel

__all__ = ["CollectiveMode", "collective_modes", "collective_seconds"]

#: What a machine's interference table calls a collective.
NETWORK = "network"


@dataclass(frozen=True)
class CollectiveMode:
    """One way of doing a collective: ``seconds`` alone, on the lane ``link``, and what it takes meanwhile.

    ``compute_share`` of the first compute engine, which it keeps from others; ``memory_share`` of the scratchpad's
    bandwidth; and of each link in ``link_shares`` that part of one direction, ``link`` among them.
    """

    algorithm: str
    link: str
    seconds: float
    compute_share: float
    memory_share: float
    programs: int
    link_shares: Mapping[str, float] = field(default_factory=dict)


def collective_modes(
    kind: str,
    nbytes: int,
    ranks: Sequence[int],
    machine: HardwareModel,
    *,
    fuses: str = "",
    algorithms: Sequence[str] | None = None,
) -> tuple[CollectiveMode, ...]:
    """Ways of doing a collective of ``nbytes`` among ``ranks`` (global numbers), the fastest first.

    With ``fuses`` those that do that as well (``"rms_norm"``: add a residual and normalise), and no others; with
    ``algorithms`` only those of that name. One rank alone has nothing to do: one mode of no time.

    Raises:
        MachineError: the machine has no such collective, no such devices, or no rate for it.
    """
    fabric = _checked(kind, nbytes, ranks, machine)
    rates = [rate for rate in fabric.rates if rate.fuses == fuses]
    if len(ranks) == 1:
        return (CollectiveMode("none", machine.links[0].name, 0.0, 0.0, 0.0, 0),)
    nodes = Counter(rank // fabric.devices_per_node for rank in ranks)
    job = _Job(CollectiveKind(kind), nbytes, tuple(nodes.values()), machine)
    modes = job.within(rates) if len(nodes) == 1 else job.across(rates)
    modes = [mode for mode in modes if algorithms is None or mode.algorithm in algorithms]
    if not modes:
        where = f"{len(ranks)} ranks on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"
        asked = f" with {fuses!r} fused" if fuses else ""
        asked += f" by {', '.join(map(repr, algorithms))}" if algorithms is not None else ""
        raise MachineError(
            f"machine {machine.name!r} states no rate for {kind} among {where}{asked}",
            hint="docs/adding-a-machine.md says how a fabric's rates are stated",
        )
    return tuple(sorted(modes, key=lambda mode: (mode.seconds, mode.compute_share, mode.algorithm)))


def collective_seconds(kind: str, nbytes: int, ranks: Sequence[int], machine: HardwareModel) -> float:
    """Seconds that the fastest way takes while nothing else runs.

    Raises:
        MachineError: as for ``collective_modes``.
    """
    return collective_modes(kind, nbytes, ranks, machine)[0].seconds


def _checked(kind: str, nbytes: int, ranks: Sequence[int], machine: HardwareModel) -> Fabric:
    fabric = machine.fabric
    if fabric is None:
        raise MachineError(
            f"machine {machine.name!r} is one device: it states no fabric, and has no collectives",
            hint="'opweave hw list' shows the machines; those of several devices begin with their number, as 8xh100-nvlink",
        )
    if kind not in list(CollectiveKind):
        raise MachineError(f"no collective is named {kind!r}; there are {', '.join(CollectiveKind)}")
    if not ranks or len(set(ranks)) != len(ranks) or min(ranks) < 0 or max(ranks) >= fabric.devices:
        raise MachineError(
            f"machine {machine.name!r} has {fabric.devices} devices; ranks {list(ranks)} are not different ones, "
            f"from 0 to {fabric.devices - 1}"
        )
    if nbytes < 0:
        raise MachineError(f"a collective of {nbytes} bytes was asked for; it takes 0 or more")
    return fabric


def _seconds(rate: CollectiveRate, nbytes: float, ranks: int) -> float:
    """Seconds by ``rate`` among ``ranks``: of the message with as many bytes on the wire, with other steps; but not
    less than its programs take for one rank's part.
    """
    scale = wire_bytes(rate.kind, rate.traffic, ranks) / wire_bytes(rate.kind, rate.traffic, rate.ranks)
    seconds = rate.seconds_at(nbytes * scale)
    if rate.part_bytes_per_s is not None:
        seconds = max(seconds, rate.fixed_s + nbytes / ranks / (rate.programs * rate.part_bytes_per_s))
    return seconds + _more_steps_s(rate, ranks)


def _more_steps_s(rate: CollectiveRate, ranks: int) -> float:
    of_ranks, measured = (steps(rate.kind, rate.traffic, count) for count in (ranks, rate.ranks))
    return rate.step_s * (of_ranks - measured)


@dataclass(frozen=True)
class _Phase:
    """Seconds by one rate, and the bytes a rank then has on that rate's link and in its memory."""

    rate: CollectiveRate
    seconds: float
    wire: float
    memory: float


def _phase(rate: CollectiveRate, nbytes: float, ranks: int) -> _Phase:
    wire = nbytes * wire_bytes(rate.kind, rate.traffic, ranks)
    memory = rate.memory_bytes_per_byte * wire / wire_bytes(rate.kind, rate.traffic, rate.ranks)
    return _Phase(rate, _seconds(rate, nbytes, ranks), wire, memory)


@dataclass(frozen=True)
class _Job:
    """A collective of ``nbytes`` among ranks of which ``on_node`` are on each node that has any."""

    kind: CollectiveKind
    nbytes: int
    on_node: tuple[int, ...]
    machine: HardwareModel

    @property
    def ranks(self) -> int:
        return sum(self.on_node)

    def within(self, rates: Sequence[CollectiveRate]) -> list[CollectiveMode]:
        """Modes among the devices of one node."""
        local = [rate for rate in rates if rate.kind is self.kind and rate.scope is Scope.WITHIN_NODE]
        phases = [_phase(rate, self.nbytes, self.ranks) for rate in local]
        return [mode for phase in phases for mode in self._modes(phase.rate.algorithm, phase.seconds, [phase])]

    def across(self, rates: Sequence[CollectiveRate]) -> list[CollectiveMode]:
        """Modes among devices of several nodes: one ring through all, or level by level; all pairs for all-to-all."""
        modes: list[CollectiveMode] = []
        for outer in rates:
            if outer.scope is not Scope.ACROSS_NODES:
                continue
            if outer.kind is self.kind:
                flat = self._all_pairs if self.kind is CollectiveKind.ALL_TO_ALL else self._ring
                modes += flat(outer, _best_within(rates, self.kind, outer.algorithm))
                modes += self._levels(outer, rates)
        return modes

    def _ring(self, outer: CollectiveRate, inner: CollectiveRate | None) -> list[CollectiveMode]:
        """A ring over all ranks, as many times as a node has ranks, each through another one's way out of the node."""
        nodes, ways = len(self.on_node), min(self.on_node)
        if self.ranks > nodes and inner is None:
            return []
        wire = self.nbytes * wire_bytes(self.kind, Traffic.PEERS, self.ranks)
        slowest = ways * outer.wire_bytes_per_s
        seconds = outer.fixed_s + _more_steps_s(outer, nodes)
        phases = [_Phase(outer, 0.0, wire / ways, 0.0)]
        if inner is not None and self.ranks > nodes:
            slowest = min(slowest, inner.wire_bytes_per_s)
            turns = steps(self.kind, Traffic.PEERS, self.ranks) - steps(self.kind, Traffic.PEERS, nodes)
            seconds += inner.step_s * turns
            phases.append(_phase(inner, self.nbytes, self.ranks))
        else:
            phases = [_phase(outer, self.nbytes, self.ranks)]
        seconds = max(seconds + wire / slowest, *(phase.seconds for phase in phases), 0.0)
        return self._modes(outer.algorithm, seconds, phases)

    def _levels(self, outer: CollectiveRate, rates: Sequence[CollectiveRate]) -> list[CollectiveMode]:
        """Within each node, then between devices of the same place in their nodes, then within each node again."""
        nodes, local = len(self.on_node), self.on_node[0]
        before, behind = _LEVELS.get(self.kind, (None, None))
        if local == 1 or len(set(self.on_node)) > 1 or before is behind:
            return []
        modes: list[CollectiveMode] = []
        for algorithm in dict.fromkeys(rate.algorithm for rate in rates if rate.scope is Scope.WITHIN_NODE):
            inner = [_best_within(rates, kind, algorithm) for kind in (before, behind) if kind is not None]
            if None not in inner:
                phases = [_phase(rate, self.nbytes, local) for rate in inner if rate is not None]
                phases.append(_phase(outer, self.nbytes / local, nodes))
                name = f"levels_{algorithm}"
                modes += self._modes(name, sum(phase.seconds for phase in phases), phases)
        return modes

    def _all_pairs(self, outer: CollectiveRate, inner: CollectiveRate | None) -> list[CollectiveMode]:
        """Every rank to every other: both ways at a time, each with the bytes for the ranks that it leads to."""
        found: list[_Phase] = []
        for local in sorted(set(self.on_node)):
            others = self.ranks - local
            wire = self.nbytes * others / self.ranks
            seconds = outer.fixed_s + outer.step_s * (others - outer.ranks + 1) + wire / outer.wire_bytes_per_s
            memory = outer.memory_bytes_per_byte * wire / wire_bytes(self.kind, outer.traffic, outer.ranks)
            found.append(_Phase(outer, seconds, wire, memory))
            if local > 1:
                if inner is None:
                    return []
                found.append(_phase(inner, self.nbytes * local / self.ranks, local))
        slowest = {phase.rate.scope: max(p.seconds for p in found if p.rate is phase.rate) for phase in found}
        phases = [next(p for p in found if p.rate.scope is scope and p.seconds == s) for scope, s in slowest.items()]
        return self._modes(outer.algorithm, max(slowest.values()), phases)

    def _modes(self, algorithm: str, seconds: float, phases: Sequence[_Phase]) -> list[CollectiveMode]:
        """The mode that these phases make up; one for each measured pair where the machine states interference.

        Its lane is the link of the last phase that leaves the node, or of the first.
        """
        lane = next((p.rate.link for p in phases if p.rate.scope is Scope.ACROSS_NODES), phases[0].rate.link)
        programs = max(phase.rate.programs for phase in phases)
        stated = [share for share in map(self._compute_share, phases) if share is not None]
        pairs = [(max(stated, default=0.0), 1.0)]
        if not stated:
            tables = [table for table in self.machine.interference if table.kernel == NETWORK]
            pairs = [pair for t in tables for pair in zip(t.given_up, t.reached, strict=True)] or pairs
        memory, bandwidth = sum(p.memory for p in phases), self.machine.scratchpad_memory.bandwidth_bytes_per_s
        return [
            CollectiveMode(
                algorithm,
                lane,
                seconds / reached,
                share,
                _part(memory, seconds / reached, bandwidth),
                programs,
                self._link_shares(phases, seconds / reached),
            )
            for share, reached in pairs
        ]

    def _compute_share(self, phase: _Phase) -> float | None:
        rate, tiling = phase.rate, self.machine.tiling
        if rate.compute_share is not None or not rate.programs:
            return rate.compute_share
        assert tiling is not None  # checked with the machine
        return rate.programs / tiling.multiprocessors

    def _link_shares(self, phases: Sequence[_Phase], seconds: float) -> dict[str, float]:
        bandwidths = {link.name: link.bandwidth_bytes_per_s for link in self.machine.links}
        names = dict.fromkeys(phase.rate.link for phase in phases)
        wires = {name: sum(p.wire for p in phases if p.rate.link == name) for name in names}
        return {name: _part(wire, seconds, bandwidths[name]) for name, wire in wires.items()}


#: Collectives within a node before and behind the same one between nodes.
_LEVELS: Mapping[CollectiveKind, tuple[CollectiveKind | None, CollectiveKind | None]] = {
    CollectiveKind.ALL_REDUCE: (CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER),
    CollectiveKind.ALL_GATHER: (None, CollectiveKind.ALL_GATHER),
    CollectiveKind.REDUCE_SCATTER: (CollectiveKind.REDUCE_SCATTER, None),
}


def _best_within(rates: Sequence[CollectiveRate], kind: CollectiveKind, algorithm: str) -> CollectiveRate | None:
    """The rate of that algorithm for the longest messages in a node, of those that fuse nothing."""
    local = [rate for rate in rates if rate.scope is Scope.WITHIN_NODE and not rate.fuses]
    fitting = [rate for rate in local if rate.kind is kind and rate.algorithm == algorithm]
    return max(fitting, key=lambda rate: rate.wire_bytes_per_s, default=None)


def _part(nbytes: float, seconds: float, bytes_per_s: float) -> float:
    return min(1.0, nbytes / (seconds * bytes_per_s)) if nbytes else 0.0
