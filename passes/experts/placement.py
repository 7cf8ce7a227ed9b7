"""Expert placement: which expert of each layer lies where, so that devices are evenly loaded and less is moved.

After MoETuner (Go and Mahajan, arXiv 2502.06643): one integer program balances the clusters of experts, with the
constraint that they are equally large, which the printed program lacks; another places the clusters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ...compiler.pipeline import Budget
from ...errors import OptionError, PlanError
from ...hw_models.model import HardwareModel
from .balance import balanced
from .placing import placed, transfer_s
from .problem import Clusters, ExpertProblem, expert_problem
from .trace import RoutingTrace

__all__ = ["ExpertPlacement", "Facts", "PlaceExperts", "facts_of"]


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a placement is worth on the trace that it was made from.

    ``imbalance`` is the load of the fullest device over the mean, averaged over layers, and ``worst_imbalance`` that of
    the worst layer. ``moved_bytes`` go from one device to another between layers, ``across_bytes`` of these from node
    to node; ``transfer_s`` is the longest transfer between two devices, summed over layers. All three are of tokens
    that stay where their expert was, as MoETuner counts them.
    """

    imbalance: float
    worst_imbalance: float
    moved_bytes: int
    across_bytes: int
    transfer_s: float


class ExpertPlacement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``order[layer]`` lists the experts by place: the first ``experts / devices`` places are on the first device.

    So row ``p`` of the new weights is row ``order[p]`` of the old ones, for experts and for the router alike, and the
    router's numbers are places. ``uneven`` and ``transfers`` are (value, bound) of the two programs: tokens away from
    the mean, summed over devices and layers; and seconds.
    """

    machine: str
    devices: int
    order: tuple[tuple[int, ...], ...]
    default: Facts
    found: Facts
    uneven: tuple[float, float]
    transfers: tuple[float, float]
    proved_by: tuple[str, str]
    seconds: float = 0.0
    version: int = 1

    def __post_init__(self) -> None:
        for layer, order in enumerate(self.order):
            if sorted(order) != list(range(len(order))):
                raise PlanError(f"layer {layer} of an expert placement does not list each of its experts once")
            if self.devices < 1 or len(order) % self.devices:
                raise PlanError(f"layer {layer} has {len(order)} experts, which {self.devices} devices do not divide")

    @property
    def remap(self) -> tuple[tuple[int, ...], ...]:
        """The place of each expert, by layer: the inverse of ``order``."""
        return tuple(tuple(int(p) for p in np.argsort(order)) for order in self.order)

    def device_of(self, layer: int, expert: int) -> int:
        """The device that has ``expert`` of ``layer``."""
        return self.order[layer].index(expert) // (len(self.order[layer]) // self.devices)

    def save(self, path: Path) -> None:
        """Write JSON. Raises OptionError where the file cannot be written."""
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        except OSError as error:
            raise OptionError(f"cannot write {str(path)!r}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> ExpertPlacement:
        """Read JSON. Raises PlanError for a file that is none."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise PlanError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{str(path)!r} is no expert placement: {error}") from error


@dataclass(frozen=True)
class PlaceExperts:
    """Place the experts of every layer.

    *Given* a routing trace and a machine of several devices. *Result*: an ``ExpertPlacement``, with the values and
    bounds of both programs. ``tolerance`` is the part of the mean load per device at which a layer is even enough:
    MoETuner's gap is 2.5 %. ``token_bytes`` is what one token's row takes (hidden size times the size of an element).
    In deterministic mode HiGHS is limited by nodes.
    """

    tolerance: float = 0.001
    token_bytes: int = 8192
    devices: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise OptionError(f"experts: tolerance is {self.tolerance}; expected a part of the mean load, below 1")

    @property
    def name(self) -> str:
        """Path name of the method."""
        return "experts/placement"

    def place(self, trace: RoutingTrace, machine: HardwareModel, budget: Budget) -> ExpertPlacement:
        """The placement. Balance comes first: a default that moves less, but is less even, is not kept.

        Raises:
            MachineError: one device, or fewer than asked for.
            OptionError: devices that do not divide the experts.
        """
        begin = time.monotonic()
        problem = expert_problem(trace, machine, devices=self.devices, token_bytes=self.token_bytes)
        mean = float(problem.load.sum()) / (problem.layers * problem.devices)
        half = budget.share(0.5)
        balances = [
            balanced(loads, problem.devices, half.share(1 / left), tolerance=self.tolerance * mean)
            for left, loads in zip(range(problem.layers, 0, -1), problem.load, strict=True)
        ]
        clusters = [balance.clusters for balance in balances]
        chosen = placed(problem, clusters, budget)
        places = [_by_device(problem, *pair) for pair in zip(clusters, chosen.device, strict=True)]
        plain = [problem.default()] * problem.layers
        return ExpertPlacement(
            machine=machine.name,
            devices=problem.devices,
            order=tuple(tuple(e for cluster in layer for e in cluster) for layer in places),
            default=facts_of(problem, plain),
            found=facts_of(problem, places),
            uneven=(math.fsum(b.value for b in balances), math.fsum(b.bound for b in balances)),
            transfers=(chosen.value, chosen.bound),
            proved_by=("ilp" if any(b.proved_by == "ilp" for b in balances) else "analytic", chosen.proved_by),
            seconds=round(time.monotonic() - begin, 3),
        )


def _by_device(problem: ExpertProblem, clusters: Clusters, device: Sequence[int]) -> Clusters:
    by_device = {g: cluster for cluster, g in zip(clusters, device, strict=True)}
    return tuple(tuple(sorted(by_device[g])) for g in range(problem.devices))


def facts_of(problem: ExpertProblem, places: Sequence[Clusters]) -> Facts:
    """Balance and transfers with the experts ``places[layer][device]``, recounted from loads and flows."""
    ratios = []
    for loads, clusters in zip(problem.load, places, strict=True):
        totals = [int(loads[list(cluster)].sum()) for cluster in clusters]
        ratios.append(max(totals) * len(totals) / sum(totals))
    nodes = np.array(problem.node)
    apart = ~np.eye(problem.devices, dtype=bool)
    moved = across = 0
    for layer in range(problem.layers - 1):
        flow = problem.cluster_flow(layer, places[layer], places[layer + 1])
        moved += int(flow[apart].sum())
        across += int(flow[nodes[:, None] != nodes[None, :]].sum())
    return Facts(
        imbalance=math.fsum(ratios) / len(ratios),
        worst_imbalance=max(ratios),
        moved_bytes=moved * problem.token_bytes,
        across_bytes=across * problem.token_bytes,
        transfer_s=transfer_s(problem, places),
    )
