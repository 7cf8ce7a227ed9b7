"""The integer program of placing clusters, as PuLP model for HiGHS, on all layers or on a few at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from ...compiler.pipeline import Budget
from .._solver.highs import less_tolerances, solve
from .problem import ExpertProblem

__all__ = ["MAX_ROWS", "by_program"]

MAX_ROWS = 12_000  # of a model: beyond that layers are solved a few at a time, and the model proves nothing
LEAST_LAYERS = 3  # to solve at a time: of 2 layers on 16 devices HiGHS did not better one answer in a minute
MAX_NODES = 20  # of the search tree in deterministic mode, where no clock may decide

Integers = NDArray[np.int64]


def by_program(
    problem: ExpertProblem, tokens: Sequence[Integers], device: Sequence[Integers], budget: Budget
) -> tuple[list[Integers], float]:
    """A placement at least as good as ``device``, and a bound in seconds, 0 where all layers together are too many.

    Then a few layers at a time are solved around the answer, if at least ``LEAST_LAYERS`` fit in a model.

    Variables ``y[l, c, g]``: cluster ``c`` of layer ``l`` is on device ``g``; one to one. ``t[l]`` is the longest
    transfer behind layer ``l``. As each cluster is on one device, no products are needed:

        t[l] >= sum over h of tokens[c, d] * pair_s[g, h] * y[l + 1, d, h] - most * (1 - y[l, c, g])   for all c, g, d

    with ``most`` the seconds of those tokens on the slowest pair.
    """
    best = [layer.copy() for layer in device]
    together = MAX_ROWS // problem.devices**3
    if len(tokens) <= together:
        return _solved(problem, tokens, best, (0, len(best)), budget)
    if together < LEAST_LAYERS:
        return best, 0.0
    for begin in range(0, len(best), together - 1):
        if budget.halted():
            break
        part = budget.share(together / (len(best) - begin)) if len(best) - begin > together else budget
        best, _ = _solved(problem, tokens, best, (begin, min(len(best), begin + together)), part)
    return best, 0.0


def _solved(
    problem: ExpertProblem, tokens: Sequence[Integers], device: list[Integers], span: tuple[int, int], budget: Budget
) -> tuple[list[Integers], float]:
    """The layers of ``span`` solved, all others where they are; and the bound for what lies between its layers."""
    unit_s = max((float(flow.max()) for flow in tokens), default=0.0) * problem.token_bytes * problem.pair_s.max()
    if unit_s <= 0.0:
        return device, 0.0
    model = pulp.LpProblem("placing", pulp.LpMinimize)
    where = {layer: _assignment(model, layer, problem.devices) for layer in range(*span)}
    longest: dict[Any, float] = {}
    for layer in range(max(0, span[0] - 1), min(len(tokens), span[1])):
        t = model.add_variable(f"t_{layer}", 0, None, pulp.LpContinuous)
        longest[t] = 1.0
        _add_layer(model, t, problem.token_bytes * problem.pair_s / unit_s, tokens[layer], where, layer, device)
    model += pulp.LpAffineExpression(longest), "seconds"
    solution = solve(
        model,
        budget,
        start={f"y_{i}_{c}_{g}": float(device[i][c] == g) for i, y in where.items() for c, g in y},
        absolute_gap=1e-6,
        max_nodes=MAX_NODES if budget.deterministic else None,
    )
    columns = len(where) * problem.devices**2 + len(longest)
    bound = max(0.0, less_tolerances(solution.bound, columns)) if math.isfinite(solution.bound) else 0.0
    found = _read(solution.values, device, span)
    before, after = (_between(problem, tokens, d, span) for d in (device, found))
    return (found if after < before else device), bound * unit_s


def _assignment(model: pulp.LpProblem, layer: int, devices: int) -> dict[tuple[int, int], Any]:
    y = {
        (c, g): model.add_variable(f"y_{layer}_{c}_{g}", 0, 1, pulp.LpInteger)
        for c in range(devices)
        for g in range(devices)
    }
    for i in range(devices):
        model += pulp.LpAffineExpression({y[i, g]: 1 for g in range(devices)}) == 1, f"once_{layer}_{i}"
        model += pulp.LpAffineExpression({y[c, i]: 1 for c in range(devices)}) == 1, f"one_{layer}_{i}"
    return y


def _add_layer(
    model: pulp.LpProblem,
    t: Any,
    pair: NDArray[np.float64],
    tokens: Integers,
    where: Mapping[int, Mapping[tuple[int, int], Any]],
    layer: int,
    device: Sequence[Integers],
) -> None:
    devices = len(pair)
    for c, g, d in np.ndindex(devices, devices, devices):
        count = float(tokens[c, d])
        if not count:
            continue
        row: dict[Any, float] = {t: -1.0}
        limit = 0.0
        if layer + 1 in where:
            row.update({where[layer + 1][d, h]: count * pair[g, h] for h in range(devices) if pair[g, h]})
        else:
            limit -= count * float(pair[g, device[layer + 1][d]])
        if layer in where:
            most = count * float(pair[g].max())
            row[where[layer][c, g]] = most
            limit += most
        elif device[layer][c] != g:
            continue
        model += pulp.LpAffineExpression(row) <= limit, f"longest_{layer}_{c}_{g}_{d}"


def _read(values: Mapping[str, float], device: Sequence[Integers], span: tuple[int, int]) -> list[Integers]:
    found = [layer.copy() for layer in device]
    for layer in range(*span) if values else ():
        size = len(device[layer])
        table = np.array([[values[f"y_{layer}_{c}_{g}"] for g in range(size)] for c in range(size)])
        chosen = table.argmax(axis=1)
        if len(set(chosen.tolist())) == size:
            found[layer] = chosen
    return found


def _between(
    problem: ExpertProblem, tokens: Sequence[Integers], device: Sequence[Integers], span: tuple[int, int]
) -> float:
    layers = range(max(0, span[0] - 1), min(len(tokens), span[1]))
    return math.fsum(problem.slowest_s(tokens[i], device[i], device[i + 1]) for i in layers)
