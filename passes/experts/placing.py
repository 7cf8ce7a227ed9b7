"""Which device each cluster of experts lies on, layer by layer. MoETuner's second integer program.

Minimise the sum over layers of the longest transfer between two devices, when tokens go from the clusters of one layer
to those of the next. First layer by layer, each the best one behind the layer before (a bottleneck assignment); then
exchanges of two devices' clusters; then exactly: over all permutations one layer after another where these are few, and
by HiGHS otherwise, over all layers where these are few, else over some of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...compiler.pipeline import Budget
from ._pair_bound import layer_bound_s
from ._program import by_program
from .problem import Clusters, ExpertProblem

__all__ = ["Placement", "placed", "transfer_bound_s", "transfer_s"]

FEW = 120  # permutations of one layer: all of them are tried up to 5 devices

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """The device of each cluster, by layer; ``value``: seconds of the longest transfers, summed, and its ``bound``."""

    device: tuple[tuple[int, ...], ...]
    value: float
    bound: float
    proved_by: Literal["analytic", "ilp", "exhaustive"] = "analytic"


@dataclass(frozen=True)
class Flows:
    """Tokens between clusters, [devices, devices] for each layer but the last, and the problem they belong to."""

    problem: ExpertProblem
    tokens: tuple[Integers, ...]

    def seconds(self, layer: int, device: Sequence[Integers]) -> float:
        """The longest transfer behind ``layer``."""
        return self.problem.slowest_s(self.tokens[layer], device[layer], device[layer + 1])


def transfer_s(problem: ExpertProblem, clusters: Sequence[Clusters]) -> float:
    """The sum over layers, cluster ``g`` of each layer being on device ``g``."""
    flows = _flows(problem, clusters)
    stay = np.arange(problem.devices)
    return math.fsum(problem.slowest_s(tokens, stay, stay) for tokens in flows.tokens)


def transfer_bound_s(problem: ExpertProblem, clusters: Sequence[Clusters]) -> float:
    """What no placement of the clusters undercuts: the most tokens on the fastest pairs, each layer for itself."""
    return math.fsum(layer_bound_s(problem, tokens) for tokens in _flows(problem, clusters).tokens)


def placed(problem: ExpertProblem, clusters: Sequence[Clusters], budget: Budget) -> Placement:
    """The best placement found of ``clusters`` (one tuple of clusters a layer), and its bound."""
    flows = _flows(problem, clusters)
    bound = math.fsum(layer_bound_s(problem, tokens) for tokens in flows.tokens)
    if math.factorial(problem.devices) <= FEW:
        device, value = _by_permutations(flows)
        return Placement(_plain(device), value, value, "exhaustive")
    starts = [_forward(flows), [np.arange(problem.devices) for _ in range(problem.layers)]]
    device = min((_exchanged(flows, start, budget) for start in starts), key=lambda d: _total_s(flows, d))
    best = Placement(_plain(device), _total_s(flows, device), bound)
    if best.value <= bound * (1 + 1e-9) or budget.halted():
        return replace(best, bound=min(bound, best.value))
    found, proven = by_program(problem, flows.tokens, device, budget)
    value = _total_s(flows, found)
    if value < best.value:
        best = replace(best, device=_plain(found), value=value)
    if proven > best.bound:
        best = replace(best, bound=proven, proved_by="ilp")
    return replace(best, bound=min(best.bound, best.value))


def _flows(problem: ExpertProblem, clusters: Sequence[Clusters]) -> Flows:
    layers = range(problem.layers - 1)
    return Flows(problem, tuple(problem.cluster_flow(i, clusters[i], clusters[i + 1]) for i in layers))


def _plain(device: Sequence[Integers]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layer.tolist()) for layer in device)


def _total_s(flows: Flows, device: Sequence[Integers]) -> float:
    return math.fsum(flows.seconds(layer, device) for layer in range(len(flows.tokens)))


def _forward(flows: Flows) -> list[Integers]:
    """Each layer on the devices that are best behind the layer before; the first as its clusters are numbered."""
    device = [np.arange(flows.problem.devices)]
    for tokens in flows.tokens:
        # [cluster, device]: the longest transfer to that cluster if it is there
        seconds = (tokens[:, :, None] * flows.problem.pair_s[device[-1]][:, None, :]).max(axis=0)
        device.append(_bottleneck(seconds))
    return device


def _bottleneck(seconds: NDArray[np.float64]) -> Integers:
    """The columns of the rows such that the largest entry is least: bisection over entries, with augmenting paths."""
    levels = np.unique(seconds)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _matching(seconds <= levels[middle]) is not None else (middle + 1, high)
    found = _matching(seconds <= levels[low])
    assert found is not None  # all entries are allowed at the highest level
    return found


def _matching(allowed: NDArray[np.bool_]) -> Integers | None:
    """A column for each row, all different, that is allowed; ``None`` if there are not."""
    row_of = np.full(len(allowed), -1)

    def augment(row: int, seen: set[int]) -> bool:
        for column in np.flatnonzero(allowed[row]).tolist():
            if column not in seen:
                seen.add(column)
                if row_of[column] < 0 or augment(int(row_of[column]), seen):
                    row_of[column] = row
                    return True
        return False

    if not all(augment(row, set()) for row in range(len(allowed))):
        return None
    return np.argsort(row_of)


def _exchanged(flows: Flows, start: Sequence[Integers], budget: Budget) -> list[Integers]:
    """Exchange the devices of two clusters of a layer as long as it helps, forth and back through the layers."""
    device = [layer.copy() for layer in start]
    improved = True
    while improved and not budget.halted():
        improved = False
        for layer in range(len(device)):
            if budget.halted():
                break
            around = [i for i in (layer - 1, layer) if 0 <= i < len(flows.tokens)]
            now = sum(flows.seconds(i, device) for i in around)
            for a, b in combinations(range(flows.problem.devices), 2):
                device[layer][[a, b]] = device[layer][[b, a]]
                then = sum(flows.seconds(i, device) for i in around)
                if then < now * (1 - 1e-12):
                    now, improved = then, True
                else:
                    device[layer][[a, b]] = device[layer][[b, a]]
    return device


def _by_permutations(flows: Flows) -> tuple[list[Integers], float]:
    """The best of all: for each permutation of a layer the best way there, from layer to layer."""
    ways = [np.array(p) for p in permutations(range(flows.problem.devices))]
    best = np.zeros(len(ways))
    came: list[Integers] = []
    pair_s = np.array([[flows.problem.pair_s[np.ix_(here, there)] for there in ways] for here in ways])
    for tokens in flows.tokens:
        seconds = (tokens * pair_s).max(axis=(2, 3)) * flows.problem.token_bytes + best[:, None]
        came.append(seconds.argmin(axis=0))
        best = seconds.min(axis=0)
    chosen = [int(best.argmin())]
    for back in reversed(came):
        chosen.append(int(back[chosen[-1]]))
    device = [ways[i] for i in reversed(chosen)]
    return device, _total_s(flows, device)
