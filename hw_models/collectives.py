"""What a collective costs on a machine, in each way it can be done there: seconds, and what it takes from compute.

Message bytes are those of the whole message, as ``compiler.graph.Collective`` counts them. The formulas, what they are
fitted to and how well, are in ``docs/formulations/collectives.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import MachineError
from ._ways import Phase, Way, across_nodes, within_node
from .fabric import CollectiveKind, Fabric, KernelKind, Scope
from .model import HardwareModel

__all__ = ["CollectiveMode", "collective_modes", "collective_seconds"]


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
    if len(ranks) == 1:
        return (CollectiveMode("none", machine.links[0].name, 0.0, 0.0, 0.0, 0),)
    nodes = Counter(rank // fabric.devices_per_node for rank in ranks)
    if len(nodes) == 1:
        ways = within_node(CollectiveKind(kind), nbytes, len(ranks), fabric.rates, fuses)
    else:
        ways = across_nodes(CollectiveKind(kind), nbytes, tuple(nodes.values()), fabric.rates, fuses)
    ways = [way for way in ways if algorithms is None or way.algorithm in algorithms]
    modes = [mode for way in ways for mode in _modes(way, machine)]
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
            hint="'opweave hw list' shows the machines; those of several devices have names like 8xh100-nvlink",
        )
    if kind not in list(CollectiveKind):
        raise MachineError(f"no collective is named {kind!r}; there are {', '.join(CollectiveKind)}")
    if len(ranks) > fabric.devices:
        raise MachineError(
            f"a collective is among {len(ranks)} ranks; machine {machine.name!r} has {fabric.devices} devices",
            hint="name a machine with as many; 'opweave hw list' shows them",
        )
    if not ranks or len(set(ranks)) != len(ranks) or min(ranks) < 0 or max(ranks) >= fabric.devices:
        raise MachineError(
            f"machine {machine.name!r} has {fabric.devices} devices; ranks {list(ranks)} are not different ones, "
            f"from 0 to {fabric.devices - 1}"
        )
    if nbytes < 0:
        raise MachineError(f"a collective of {nbytes} bytes was asked for; it takes 0 or more")
    return fabric


def _modes(way: Way, machine: HardwareModel) -> list[CollectiveMode]:
    """The mode of ``way``; where no rate says what part of compute it takes, one for each pair that was measured.

    Its lane is the link that leaves the node, if any does.
    """
    lane = min(way.phases, key=lambda phase: phase.rate.scope is Scope.WITHIN_NODE).rate.link
    programs = max(phase.rate.programs for phase in way.phases)
    shares = [share for phase in way.phases if (share := _compute_share(phase, machine)) is not None]
    pairs = [(max(shares), 1.0)] if shares else _measured_pairs(machine)
    return [
        CollectiveMode(
            way.algorithm,
            lane,
            way.seconds / reached,
            share,
            _part(
                sum(phase.memory for phase in way.phases),
                way.seconds / reached,
                machine.scratchpad_memory.bandwidth_bytes_per_s,
            ),
            programs if shares else round(share * _multiprocessors(machine)),
            _link_shares(way, way.seconds / reached, machine),
        )
        for share, reached in pairs
    ]


def _measured_pairs(machine: HardwareModel) -> list[tuple[float, float]]:
    tables = [table for table in machine.interference if table.kernel is KernelKind.NETWORK]
    return [pair for table in tables for pair in zip(table.given_up, table.reached, strict=True)] or [(0.0, 1.0)]


def _multiprocessors(machine: HardwareModel) -> int:
    return machine.tiling.multiprocessors if machine.tiling else 0


def _compute_share(phase: Phase, machine: HardwareModel) -> float | None:
    if phase.rate.compute_share is not None or not phase.rate.programs:
        return phase.rate.compute_share
    return phase.rate.programs / _multiprocessors(machine)  # as many as programs at least: checked with the machine


def _link_shares(way: Way, seconds: float, machine: HardwareModel) -> dict[str, float]:
    shares = {}
    for link in machine.links:
        wires = [phase.wire for phase in way.phases if phase.rate.link == link.name]
        if wires:
            shares[link.name] = _part(sum(wires), seconds, link.bandwidth_bytes_per_s)
    return shares


def _part(nbytes: float, seconds: float, bytes_per_s: float) -> float:
    return min(1.0, nbytes / (seconds * bytes_per_s)) if nbytes else 0.0
