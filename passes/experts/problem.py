"""The problem of placing experts: tokens that each gets, tokens that go from one to another, and the links between."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import MachineError, OptionError
from ...hw_models.fabric import CollectiveKind, Scope
from ...hw_models.model import HardwareModel
from .trace import RoutingTrace

__all__ = ["ExpertProblem", "expert_problem", "pair_seconds_per_byte"]

Clusters = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ExpertProblem:
    """Experts of each layer over ``devices``, equally many on each.

    ``load`` [layers, experts] and ``flow`` [layers - 1, experts, experts] count tokens, as ``RoutingTrace`` does. A
    token's row is ``token_bytes`` long; ``pair_s`` [devices, devices] are seconds a byte from one device to another, 0
    on the same one; ``node`` numbers the node of each device.
    """

    load: NDArray[np.int64]
    flow: NDArray[np.int64]
    pair_s: NDArray[np.float64]
    node: tuple[int, ...]
    token_bytes: int

    @property
    def layers(self) -> int:
        """How many layers have experts."""
        return len(self.load)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return int(self.load.shape[1])

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.node)

    @property
    def room(self) -> int:
        """Experts of a layer that a device holds."""
        return self.experts // self.devices

    def default(self) -> Clusters:
        """Experts by device as models are cut without placement: the first on the first, and so on."""
        return tuple(tuple(range(g * self.room, (g + 1) * self.room)) for g in range(self.devices))

    def cluster_flow(self, layer: int, here: Clusters, there: Clusters) -> NDArray[np.int64]:
        """Tokens from the clusters of ``layer`` to those of the next one, [devices, devices]."""
        rows = np.array([self.flow[layer][list(cluster)].sum(axis=0) for cluster in here])
        return np.array([rows[:, list(cluster)].sum(axis=1) for cluster in there]).T

    def slowest_s(self, flow: NDArray[np.int64], here: NDArray[np.int64], there: NDArray[np.int64]) -> float:
        """Seconds of the longest transfer between two devices, clusters being on devices ``here`` and ``there``."""
        return float((flow * self.pair_s[np.ix_(here, there)]).max()) * self.token_bytes


def expert_problem(
    trace: RoutingTrace, machine: HardwareModel, *, devices: int | None = None, token_bytes: int = 8192
) -> ExpertProblem:
    """Place the experts of ``trace`` on the first ``devices`` of ``machine``, on all when ``None``.

    Raises:
        MachineError: one device, or fewer than asked for.
        OptionError: devices that do not divide the experts, or rows of no bytes.
    """
    if machine.fabric is None:
        raise MachineError(
            f"machine {machine.name!r} is one device: it states no fabric, and experts have one place",
            hint="'opweave hw list' shows the machines; those of several devices have names like 8xh100-nvlink",
        )
    count = machine.fabric.devices if devices is None else devices
    if not 1 <= count <= machine.fabric.devices:
        raise MachineError(
            f"experts are to be placed on {count} devices; {machine.name!r} has {machine.fabric.devices}"
        )
    if trace.experts % count:
        raise OptionError(
            f"{trace.experts} experts do not divide among {count} devices",
            hint="choose a number of devices that divides the number of experts",
        )
    if token_bytes < 1:
        raise OptionError(f"a token's row has {token_bytes} bytes; expected 1 or more")
    node = tuple(device // machine.fabric.devices_per_node for device in range(count))
    return ExpertProblem(trace.load, trace.flow, pair_seconds_per_byte(machine, node), node, token_bytes)


def pair_seconds_per_byte(machine: HardwareModel, node: tuple[int, ...]) -> NDArray[np.float64]:
    """Seconds a byte between devices on the nodes ``node``: what the links of the machine's all-to-alls state.

    Raises:
        MachineError: the machine states no all-to-all there.
    """
    result = np.zeros((len(node), len(node)))
    for scope in Scope:
        pairs = np.equal.outer(node, node) == (scope is Scope.WITHIN_NODE)
        np.fill_diagonal(pairs, False)
        if pairs.any():
            result[pairs] = _seconds_per_byte(machine, scope)
    return result


def _seconds_per_byte(machine: HardwareModel, scope: Scope) -> float:
    assert machine.fabric is not None
    links = {
        rate.link for rate in machine.fabric.rates if rate.kind is CollectiveKind.ALL_TO_ALL and rate.scope is scope
    }
    fastest = max((link.bandwidth_bytes_per_s for link in machine.links if link.name in links), default=math.nan)
    if math.isnan(fastest):
        where = scope.value.replace("_", " ")
        raise MachineError(f"machine {machine.name!r} states no all-to-all {where}, so no link that tokens pass")
    return 1.0 / fastest
