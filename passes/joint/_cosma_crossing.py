"""What no order avoids: a bound on additional traffic that needs no steps, from buffers alive across an operator.

A buffer *crosses* operator ``o`` if in every order it is in use before and after ``o`` runs, and ``o`` does not touch
it: it was created, or a source used, by an ancestor of ``o``, and a descendant of ``o`` uses it. Where ``o``'s working
set and all that crosses it exceed the capacity, some of that is away while ``o`` runs and is fetched again later. That
is the gap ILP of a fixed order, kept to the gaps and positions that all orders share. Rows may be left out: what is
left is a bound all the same, so their number is limited, those of the largest need first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from ...compiler.graph import Graph
from ...compiler.pipeline import Budget
from .._solver.highs import solve, whole_units
from ..order.problem import ancestor_masks, descendant_masks
from ._cosma_problem import CosmaProblem, Version

__all__ = ["crossing_bound", "crossing_peak"]

MAX_TERMS = 200_000  # of all rows
TERMS_PER_S = 20_000  # found, built and solved on one busy core
DETERMINISTIC_TERMS = 50_000
DETERMINISTIC_NODES = 1_000


def crossing_bound(graph: Graph, of: CosmaProblem, base_bytes: int, budget: Budget) -> int:
    """Bytes of additional traffic that no order and residency of ``graph`` avoids; at least ``base_bytes``."""
    limit = DETERMINISTIC_TERMS if budget.deterministic else min(MAX_TERMS, TERMS_PER_S * budget.remaining_s)
    crossings = _Crossings(graph, of)
    model = _Model(of)
    for d, capacity in enumerate(of.capacities):
        for op, need in crossings.short_of_room(of.sizes[d], capacity, limit / len(of.capacities)).items():
            model.add_need(f"{d}_{op}", crossings.across(op), of.sizes[d], need)
    if not model.fetch:
        return base_bytes
    model.add_costs()
    nodes = DETERMINISTIC_NODES if budget.deterministic else None
    solution = solve(model.program, budget, absolute_gap=0.99, max_nodes=nodes)
    return base_bytes + of.unit * whole_units(solution.bound, len(model.program.variables()))


def crossing_peak(graph: Graph, of: CosmaProblem) -> int:
    """Bytes that no order's peak is below when nothing is moved twice: what is alive at one operator in every order."""
    return int(_Crossings(graph, of).alive(of.nbytes).max(initial=0))


class _Crossings:
    """Which buffers cross which operators, and who may fetch them after it; bit masks are over operators."""

    def __init__(self, graph: Graph, of: CosmaProblem) -> None:
        self.ancestors = ancestor_masks(graph.predecessors)
        self.descendants = descendant_masks(graph.successors)
        chains: list[list[Version]] = [[] for _ in of.buffers]
        for version in of.versions:
            chains[version.buffer].append(version)
        self.users = [sorted({user for version in chain for user in version.users}) for chain in chains]
        masks = [self._mask(chain, users) for chain, users in zip(chains, self.users, strict=True)]
        width = len(graph.ops)
        self.is_across = np.array([_bits(mask, width) for mask in masks], dtype=bool).reshape(len(masks), width)
        index = {name: b for b, name in enumerate(of.buffers)}
        self.touched = [[index[name] for name in names if name in index] for names in graph.touches]

    def _mask(self, chain: list[Version], users: list[int]) -> int:
        """Operators that a buffer, given its versions, crosses."""
        before = behind = 0
        for user in users:
            behind |= self.descendants[user]
            before |= self.ancestors[user]
        creator = chain[0].creator
        across = before & (behind if creator is None else self.descendants[creator])
        for op in {*users, *(version.creator for version in chain if version.creator is not None)}:
            across &= ~(1 << op)
        return across

    def alive(self, sizes: tuple[int, ...]) -> NDArray[np.int64]:
        """Bytes of each operator's working set and all that crosses it: alive while it runs, whatever the order."""
        total = np.array([sum(sizes[b] for b in buffers) for buffers in self.touched], dtype=np.int64)
        for size, row in zip(sizes, self.is_across, strict=True):
            total[row] += size
        return total

    def short_of_room(self, sizes: tuple[int, ...], capacity: int, terms: float) -> dict[int, int]:
        """Bytes to be freed while each operator runs, where any are; as many operators as have ``terms`` crossings."""
        need = self.alive(sizes) - capacity
        count = self.is_across.sum(axis=0)
        chosen = {}
        for op in sorted(np.flatnonzero(need > 0).tolist(), key=lambda op: (-need[op], op)):
            terms -= count[op]
            if terms < 0:
                break
            chosen[op] = int(need[op])
        return chosen

    def across(self, op: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Buffers that cross ``op``, each with its *fetchers*: the users of which one fetches it, if it is away then.

        That is the first user after ``op``: none of its ancestors, and behind no other user that descends from it.
        """
        ancestors, descendants = self.ancestors[op], self.descendants[op]
        for buffer in np.flatnonzero(self.is_across[:, op]).tolist():
            users = [user for user in self.users[buffer] if not ancestors >> user & 1]
            later = sum(1 << user for user in users if descendants >> user & 1)
            yield buffer, tuple(user for user in users if not self.ancestors[user] & later)


@dataclass
class _Model:
    """``fetch[b, u]``: buffer ``b`` is fetched for user ``u`` though it was there before."""

    of: CosmaProblem
    program: pulp.LpProblem = field(default_factory=lambda: pulp.LpProblem("crossing", pulp.LpMinimize))
    fetch: dict[tuple[int, int], Any] = field(default_factory=dict)
    away: dict[tuple[int, tuple[int, ...]], Any] = field(default_factory=dict)

    def add_need(
        self, name: str, across: Iterator[tuple[int, tuple[int, ...]]], sizes: tuple[int, ...], need: int
    ) -> None:
        """``sum(size[b] * away[b, fetchers]) >= need``: no more than all of the need can be freed by one."""
        terms = [(self._away(b, who), min(sizes[b], need)) for b, who in across if b not in self.of.staying]
        self.program += pulp.LpAffineExpression(terms) >= need, f"need_{name}"

    def _away(self, buffer: int, fetchers: tuple[int, ...]) -> Any:
        """Whether ``buffer`` is away where these may fetch it: at most the sum of their fetches."""
        key = buffer, fetchers
        if key not in self.away:
            fetches = [self._fetch(buffer, user) for user in fetchers]
            if len(fetches) == 1:
                self.away[key] = fetches[0]
            else:
                self.away[key] = self.program.add_variable(f"away_{len(self.away)}", 0, 1, pulp.LpBinary)
                terms = [(self.away[key], 1), *((fetch, -1) for fetch in fetches)]
                self.program += pulp.LpAffineExpression(terms) <= 0, f"fetched_{len(self.away)}"
        return self.away[key]

    def _fetch(self, buffer: int, user: int) -> Any:
        if (buffer, user) not in self.fetch:
            self.fetch[buffer, user] = self.program.add_variable(f"fetch_{buffer}_{user}", 0, 1, pulp.LpBinary)
        return self.fetch[buffer, user]

    def add_costs(self) -> None:
        """Every fetch moves its buffer, and every version fetched that is not backed was stored once."""
        of = self.of
        needed = {(version.buffer, user): v for v, version in enumerate(of.versions) for user in version.users}
        store: dict[int, Any] = {}
        terms = []
        for (buffer, user), variable in self.fetch.items():
            v = needed[buffer, user]
            terms.append((variable, of.nbytes[buffer] // of.unit))
            if of.versions[v].backed:
                continue
            if v not in store:
                store[v] = self.program.add_variable(f"store_{v}", 0, 1)
                terms.append((store[v], of.nbytes[buffer] // of.unit))
            self.program += pulp.LpAffineExpression([(store[v], 1), (variable, -1)]) >= 0, f"store_{v}_{user}"
        self.program += pulp.LpAffineExpression(terms), "moved"


def _bits(mask: int, width: int) -> NDArray[np.bool_]:
    """A bit mask as an array of ``width`` truth values."""
    data = np.frombuffer(mask.to_bytes((width + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(data, bitorder="little")[:width].astype(np.bool_)
