"""What no order avoids: a bound on additional traffic that needs no steps, from buffers alive across an operator.

A buffer *crosses* operator ``o`` if in every order it is in use before and after ``o`` runs, and ``o`` does not touch
it: it was created, or a source used, by an ancestor of ``o``, and a descendant of ``o`` uses it. Where ``o``'s working
set and all that crosses it exceed the capacity, some of that is away while ``o`` runs and is fetched again later. That
is the gap ILP of a fixed order, kept to the gaps and positions that all orders share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pulp

from ...compiler.graph import Graph
from ...compiler.pipeline import Budget
from .._solver.highs import solve
from ._cosma_problem import CosmaProblem, Version, whole_units

__all__ = ["Crossing", "crossing_bound", "crossings"]


@dataclass(frozen=True)
class Crossing:
    """``buffer`` is alive across an operator in every order; if it is away then, one of ``fetchers`` fetches it.

    These are the users that may come next after the operator: not before it, and not behind another user that is.
    """

    buffer: int
    fetchers: tuple[int, ...]


def crossings(graph: Graph, of: CosmaProblem) -> list[list[Crossing]]:
    """What crosses each operator."""
    ancestors, descendants = _closures(graph)
    versions: list[list[Version]] = [[] for _ in of.buffers]
    for version in of.versions:
        versions[version.buffer].append(version)
    found: list[list[Crossing]] = [[] for _ in graph.ops]
    for buffer, chain in enumerate(versions):
        users = sorted({user for version in chain for user in version.users})
        if not users:
            continue
        creator = chain[0].creator
        behind = before = 0
        for user in users:
            behind |= descendants[user]
            before |= ancestors[user]
        across = before & (behind if creator is None else descendants[creator])
        for op in {*users, *(version.creator for version in chain if version.creator is not None)}:
            across &= ~(1 << op)
        for op in _members(across):
            later = sum(1 << user for user in users if descendants[op] >> user & 1)
            fetchers = tuple(u for u in users if not ancestors[op] >> u & 1 and not ancestors[u] & later)
            found[op].append(Crossing(buffer, fetchers))
    return found


def crossing_bound(graph: Graph, of: CosmaProblem, base_bytes: int, budget: Budget, *, max_nodes: int | None) -> int:
    """Bytes of additional traffic that no order and residency of ``graph`` avoids; at least ``base_bytes``."""
    program = pulp.LpProblem("crossing", pulp.LpMinimize)
    fetch: dict[tuple[int, int], Any] = {}
    index = {name: b for b, name in enumerate(of.buffers)}
    touched = [[index[name] for name in names if name in index] for names in graph.touches]
    crossing = crossings(graph, of)
    for d, (sizes, capacity) in enumerate(zip(of.sizes, of.capacities, strict=True)):
        for op, across in enumerate(crossing):
            need = sum(sizes[b] for b in touched[op]) + sum(sizes[c.buffer] for c in across) - capacity
            if need > 0:
                leaving = [(c, min(sizes[c.buffer], need)) for c in across if c.buffer not in of.staying]
                _add_need(program, fetch, f"{d}_{op}", leaving, need)
    if not fetch:
        return base_bytes
    _add_costs(program, fetch, of)
    solution = solve(program, budget, absolute_gap=0.99, max_nodes=max_nodes)
    return base_bytes + of.unit * whole_units(solution.bound, len(program.variables()))


def _add_need(
    program: pulp.LpProblem,
    fetch: dict[tuple[int, int], Any],
    name: str,
    across: list[tuple[Crossing, int]],
    need: int,
) -> None:
    """``sum(size[c] * away[c]) >= need``, and what is away is fetched by one of its fetchers."""
    terms = []
    for crossing, size in across:
        away = program.add_variable(f"away_{name}_{crossing.buffer}", 0, 1, pulp.LpBinary)
        terms.append((away, size))
        fetched = []
        for user in crossing.fetchers:
            key = crossing.buffer, user
            if key not in fetch:
                fetch[key] = program.add_variable(f"fetch_{crossing.buffer}_{user}", 0, 1, pulp.LpBinary)
            fetched.append((fetch[key], -1))
        program += pulp.LpAffineExpression([(away, 1), *fetched]) <= 0, f"fetched_{name}_{crossing.buffer}"
    program += pulp.LpAffineExpression(terms) >= need, f"need_{name}"


def _add_costs(program: pulp.LpProblem, fetch: dict[tuple[int, int], Any], of: CosmaProblem) -> None:
    """Every fetch moves its buffer, and every version fetched that is not backed was stored once."""
    needed = {(version.buffer, user): v for v, version in enumerate(of.versions) for user in version.users}
    store: dict[int, Any] = {}
    terms = []
    for (buffer, user), variable in fetch.items():
        v = needed[buffer, user]
        terms.append((variable, of.nbytes[buffer] // of.unit))
        if of.versions[v].backed:
            continue
        if v not in store:
            store[v] = program.add_variable(f"store_{v}", 0, 1)
            terms.append((store[v], of.nbytes[buffer] // of.unit))
        program += pulp.LpAffineExpression([(store[v], 1), (variable, -1)]) >= 0, f"store_{v}_{user}"
    program += pulp.LpAffineExpression(terms), "moved"


def _closures(graph: Graph) -> tuple[list[int], list[int]]:
    """Ancestors and descendants of each operator as bit masks."""
    count = len(graph.ops)
    ancestors, descendants = [0] * count, [0] * count
    for op, before in enumerate(graph.predecessors):
        for p in before:
            ancestors[op] |= ancestors[p] | 1 << p
    for op in reversed(range(count)):
        for p in graph.predecessors[op]:
            descendants[p] |= descendants[op] | 1 << op
    return ancestors, descendants


def _members(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
