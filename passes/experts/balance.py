"""Which experts share a device: equally many, with loads as even as can be. MoETuner's first integer program.

Layers do not depend on one another. For each: longest load first to the emptiest device that has room (Graham's rule),
then exchanges of two experts as long as one helps; then, unless that is proven to be good enough, HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pulp
from numpy.typing import NDArray

from ...compiler.pipeline import Budget
from ...errors import OptionError
from .._solver.highs import less_tolerances, solve
from .problem import Clusters

__all__ = ["Balance", "balanced", "uneven", "uneven_bound"]

MAX_NODES = 200  # of the search tree of one layer in deterministic mode, where no clock may decide


@dataclass(frozen=True)
class Balance:
    """Clusters of experts; ``value``: tokens by which their loads differ from the mean, summed, and its ``bound``."""

    clusters: Clusters
    value: float
    bound: float
    proved_by: Literal["analytic", "ilp"] = "analytic"


def uneven(loads: Sequence[int] | NDArray[np.int64], clusters: Clusters) -> float:
    """Sum over clusters of how far their loads, in tokens, are from the mean."""
    values = np.asarray(loads)
    totals = [int(values[list(cluster)].sum()) for cluster in clusters]
    mean = sum(totals) / len(totals)
    return math.fsum(abs(total - mean) for total in totals)


def uneven_bound(loads: Sequence[int] | NDArray[np.int64], devices: int) -> float:
    """What no clusters of equal size undercut.

    Loads are whole, and the mean may not be. And the cluster of the expert with the largest load has at least the
    smallest loads beside it: what it is above the mean, the others are below; likewise for the smallest load.
    """
    values = np.sort(np.asarray(loads))
    total, room = int(values.sum()), len(values) // devices
    rest = total % devices
    whole = 2 * rest * (devices - rest) / devices
    most = int(values[-1]) + int(values[: room - 1].sum()) - total / devices
    least = total / devices - int(values[0]) - int(values[len(values) - room + 1 :].sum())
    return max(whole, 2 * most, 2 * least)


def balanced(loads: NDArray[np.int64], devices: int, budget: Budget, *, tolerance: float = 0.0) -> Balance:
    """Clusters for ``devices`` of ``loads`` [experts], in tokens; the search ends within ``tolerance`` tokens a device.

    Raises:
        OptionError: devices that do not divide the experts.
    """
    if devices < 1 or len(loads) % devices:
        raise OptionError(f"{len(loads)} experts do not divide among {devices} devices")
    clusters = _exchanged(loads, _longest_first(loads, devices))
    best = Balance(clusters, uneven(loads, clusters), uneven_bound(loads, devices))
    if best.value - best.bound > tolerance * devices + 1e-9 and not budget.halted():
        best = _by_program(loads, best, budget, tolerance * devices)
    return best


def _longest_first(loads: NDArray[np.int64], devices: int) -> Clusters:
    clusters: list[list[int]] = [[] for _ in range(devices)]
    totals = [0] * devices
    for expert in sorted(range(len(loads)), key=lambda e: (-int(loads[e]), e)):
        open_ = (c for c in range(devices) if len(clusters[c]) < len(loads) // devices)
        emptiest = min(open_, key=lambda c: (totals[c], c))
        clusters[emptiest].append(expert)
        totals[emptiest] += int(loads[expert])
    return tuple(map(tuple, clusters))


def _exchanged(loads: NDArray[np.int64], clusters: Clusters) -> Clusters:
    """Exchange two experts as long as the sum of squared loads falls, then as long as the sum of distances does."""
    place = np.empty(len(loads), np.int64)
    for number, cluster in enumerate(clusters):
        place[list(cluster)] = number
    totals = np.bincount(place, weights=loads, minlength=len(clusters))
    mean = totals.mean()
    moved = loads[None, :] - loads[:, None]  # [i, j]: what the cluster of i gains when i leaves for j
    for power in (2, 1):
        while True:
            mine, other = totals[place][:, None] - mean, totals[place][None, :] - mean
            cost = abs(mine) ** power + abs(other) ** power
            change = abs(mine + moved) ** power + abs(other - moved) ** power - cost
            change[place[:, None] == place[None, :]] = 0.0
            i, j = np.unravel_index(int(change.argmin()), change.shape)
            if change[i, j] >= -1e-6 * (1 + cost[i, j]):
                break
            totals[place[i]] += moved[i, j]
            totals[place[j]] -= moved[i, j]
            place[i], place[j] = place[j], place[i]
    return tuple(tuple(np.flatnonzero(place == c).tolist()) for c in range(len(clusters)))


def _by_program(loads: NDArray[np.int64], best: Balance, budget: Budget, gap: float) -> Balance:
    """The integer program: x[e, c], sum over c = 1, sum over e = experts / devices, distance[c] >= |load - mean|."""
    devices, experts = len(best.clusters), len(loads)
    mean = int(loads.sum()) / devices
    hottest = sorted(range(experts), key=lambda e: (-int(loads[e]), e))
    model = pulp.LpProblem("balance", pulp.LpMinimize)
    x = {
        (e, c): model.add_variable(f"x_{e}_{c}", 0, 1, pulp.LpInteger)
        for rank, e in enumerate(hottest)
        for c in range(min(devices, rank + 1))  # clusters are alike: the first expert is in the first one, and so on
    }
    far = [model.add_variable(f"far_{c}", 0, None, pulp.LpContinuous) for c in range(devices)]
    model += pulp.LpAffineExpression(dict.fromkeys(far, 1.0)), "distance"
    for e in range(experts):
        model += pulp.LpAffineExpression({v: 1 for (i, _), v in x.items() if i == e}) == 1, f"once_{e}"
    for c in range(devices):
        members = {e: v for (e, i), v in x.items() if i == c}
        model += pulp.LpAffineExpression(dict.fromkeys(members.values(), 1)) == experts // devices, f"size_{c}"
        for sign, name in ((1.0, "above"), (-1.0, "below")):
            row: dict[Any, float] = {v: sign * int(loads[e]) for e, v in members.items()}
            model += pulp.LpAffineExpression({**row, far[c]: -1.0}) <= sign * mean, f"{name}_{c}"
    start = _start(best.clusters, hottest, loads, mean)
    nodes = MAX_NODES if budget.deterministic else None
    solution = solve(model, budget, start=start, absolute_gap=max(gap, 1e-6), max_nodes=nodes)
    bound = less_tolerances(solution.bound, len(x) + devices) if math.isfinite(solution.bound) else 0.0
    if bound > best.bound:
        best = replace(best, bound=min(bound, best.value), proved_by="ilp")
    chosen = {e: c for (e, c), v in x.items() if solution.values.get(v.name, 0.0) > 0.5}
    if len(chosen) < experts:
        return best
    clusters = tuple(tuple(e for e in range(experts) if chosen[e] == c) for c in range(devices))
    if any(len(cluster) != experts // devices for cluster in clusters):
        return best
    value = uneven(loads, clusters)
    return replace(best, clusters=clusters, value=value) if value < best.value else best


def _start(clusters: Clusters, hottest: Sequence[int], loads: NDArray[np.int64], mean: float) -> dict[str, float]:
    """The values of an answer, its clusters numbered as the program breaks their symmetry."""
    rank = {e: r for r, e in enumerate(hottest)}
    ordered = sorted(clusters, key=lambda cluster: min(rank[e] for e in cluster))
    values = {f"x_{e}_{c}": float(e in cluster) for c, cluster in enumerate(ordered) for e in rank}
    return values | {f"far_{c}": abs(float(loads[list(cluster)].sum()) - mean) for c, cluster in enumerate(ordered)}
