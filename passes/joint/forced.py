"""Traffic that every order has to move, by an ILP without any order in it.

A buffer used before operator ``o`` by one of its ancestors, and after it by one of its descendants, lies across ``o``
in every order. What lies across ``o`` together with the working set of ``o`` exceeds the capacity by some bytes, which
must be dropped. Where the graph leaves little freedom, as in training, this is nearly all there is to the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pulp

from ...compiler.pipeline import Budget
from .._solver.highs import solve
from ..order.problem import OrderProblem

__all__ = ["forced_bytes"]

MAX_OPERATORS = 8_000  # above, the ancestors of every operator take too much memory
MAX_TERMS = 400_000
MAX_NODES = 2_000  # of the search tree in deterministic mode


@dataclass(frozen=True)
class _Stretch:
    """Between two uses of ``buffer``, one an ancestor of the other: the operators ``across`` which it must lie."""

    buffer: int
    across: tuple[int, ...]


def forced_bytes(problem: OrderProblem, capacity: int, budget: Budget) -> int:
    """Bytes that dropping and loading again move in every order and residency within ``capacity``; 0 if unknown.

    Minimise ``sum(nbytes[s] * drop[s]) + sum(nbytes[b] * store[b])`` over stretches ``s``, subject to
    ``sum(footprint[s] * drop[s] for s across o) >= need[o]`` for each operator ``o``, and ``store[b] >= drop[s]`` for
    each stretch ``s`` of a buffer ``b`` that backing memory holds only if it is stored for this. See
    docs/formulations.md.
    """
    if len(problem.touches) > MAX_OPERATORS:
        return 0
    stretches = _stretches(problem)
    if stretches is None:
        return 0
    rows = _rows(problem, capacity, stretches)
    if not rows:
        return 0
    unit = math.gcd(*(problem.nbytes[s.buffer] for s in stretches))
    model, columns = _model(problem, stretches, rows, unit)
    solution = solve(model, budget, absolute_gap=0.99, max_nodes=MAX_NODES if budget.deterministic else None)
    if not math.isfinite(solution.bound):
        return 0
    # Tolerances may add to the bound what search.py of the gap ILP takes off as well.
    return unit * max(0, math.ceil(solution.bound - 1e-6 - 1e-7 * columns - 1e-9 * abs(solution.bound)))


def _stretches(problem: OrderProblem) -> list[_Stretch] | None:
    """Every stretch that lies across an operator; ``None`` when there are too many terms."""
    ancestors = _closure(problem.predecessors, range(len(problem.touches)))
    descendants = _closure(problem.successors, reversed(range(len(problem.touches))))
    found: list[_Stretch] = []
    terms = 0
    for buffer, users in enumerate(problem.users):
        own = sum(1 << op for op in users)
        chain = _chain(users, ancestors)
        for first, last in pairwise(chain):
            across = tuple(_bits(descendants[first] & ancestors[last] & ~own))
            terms += len(across)
            if terms > MAX_TERMS:
                return None
            if across:
                found.append(_Stretch(buffer, across))
    return found


def _closure(edges: Sequence[Sequence[int]], ops: Sequence[int] | Iterator[int]) -> list[int]:
    """Bitmask of everything reachable along ``edges`` from each operator; ``ops`` come after what they lead to."""
    reached = [0] * len(edges)
    for op in ops:
        for other in edges[op]:
            reached[op] |= reached[other] | 1 << other
    return reached


def _chain(users: Sequence[int], ancestors: Sequence[int]) -> list[int]:
    """A long sequence of ``users`` in which each must come before the next."""
    best: dict[int, list[int]] = {}
    for op in users:
        before = (best[other] for other in best if ancestors[op] >> other & 1)
        best[op] = [*max(before, key=len, default=[]), op]
    return max(best.values(), key=len, default=[])


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _rows(problem: OrderProblem, capacity: int, stretches: Sequence[_Stretch]) -> list[tuple[int, tuple[int, ...]]]:
    """For each operator that needs some: bytes to be freed across it, and the stretches that lie there."""
    members: list[list[int]] = [[] for _ in problem.touches]
    for i, stretch in enumerate(stretches):
        for op in stretch.across:
            members[op].append(i)
    needs: dict[tuple[int, ...], int] = {}
    for op, across in enumerate(members):
        held = sum(problem.footprint[b] for b in problem.touches[op])
        need = held + sum(problem.footprint[stretches[i].buffer] for i in across) - capacity
        if need > 0:
            needs[tuple(across)] = max(need, needs.get(tuple(across), 0))
    return [(need, across) for across, need in needs.items()]


def _model(
    problem: OrderProblem, stretches: Sequence[_Stretch], rows: Sequence[tuple[int, tuple[int, ...]]], unit: int
) -> tuple[pulp.LpProblem, int]:
    """The ILP in multiples of ``unit`` bytes, and how many columns it has."""
    model = pulp.LpProblem("forced", pulp.LpMinimize)
    used = sorted({i for _, across in rows for i in across})
    drop = {i: model.add_variable(f"drop_{i}", 0, 1, pulp.LpBinary) for i in used}
    owners = sorted({stretches[i].buffer for i in used if _needs_store(problem, stretches[i].buffer)})
    store = {b: model.add_variable(f"store_{b}", 0, 1) for b in owners}
    moved = [(drop[i], problem.nbytes[stretches[i].buffer] // unit) for i in used]
    moved += [(store[b], problem.nbytes[b] // unit) for b in owners]
    model += pulp.LpAffineExpression(moved)
    for number, (need, across) in enumerate(rows):
        # More than the need satisfies the row alone either way: lowered, the relaxation is tighter.
        terms = [(drop[i], min(need, problem.footprint[stretches[i].buffer]) / need) for i in across]
        model += pulp.LpAffineExpression(terms) >= 1, f"capacity_{number}"
    for i in used:
        if stretches[i].buffer in store:
            model += store[stretches[i].buffer] >= drop[i], f"store_{i}"
    return model, len(used) + len(owners)


def _needs_store(problem: OrderProblem, buffer: int) -> bool:
    """Whether dropping ``buffer``, which a single operator writes, takes a store that is not made anyway."""
    writers = sum(buffer in problem.writes[op] for op in problem.users[buffer])
    return writers == 1 and not problem.is_source[buffer] and problem.final_writer[buffer] < 0
