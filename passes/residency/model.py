"""One block of the gap ILP as a PuLP model.

Variables are ``drop[i]``, binary, for each open interval ``i``; ``store[v]`` for each version ``v`` whose one store
several of them share; and, where capacity rows are chained, ``freed[r]`` in units of the sizes' common divisor. The
objective is bytes moved, in units of ``objective_unit(block)``. See ``docs/formulations/residency.md``.
"""

from __future__ import annotations

import math
from typing import Any

import pulp

from .formulation import Block, Capacity

__all__ = ["build", "objective_unit"]

MAX_ROW_TERMS = 300_000  # explicit capacity rows beyond this many terms are slower to solve than chained ones


def objective_unit(block: Block) -> int:
    """The greatest number of bytes that divides everything the block can move."""
    return math.gcd(*block.cost.values(), *(nbytes for nbytes, _ in block.shared))


def build(block: Block, *, max_row_terms: int = MAX_ROW_TERMS) -> pulp.LpProblem:
    """``block`` as a model; its variables are named ``drop_<i>``, ``store_<v>`` and ``freed_<d>_<r>``."""
    unit = objective_unit(block)
    problem = pulp.LpProblem("residency", pulp.LpMinimize)
    drop = {i: problem.add_variable(f"drop_{i}", 0, 1, pulp.LpBinary) for i in block.cost}
    store = [problem.add_variable(f"store_{v}", 0, 1) for v in range(len(block.shared))]
    moved = [(drop[i], nbytes // unit) for i, nbytes in block.cost.items()]
    moved += [(store[v], nbytes // unit) for v, (nbytes, _) in enumerate(block.shared)]
    problem += pulp.LpAffineExpression(moved), "bytes_moved"
    for d, capacity in enumerate(block.capacities):
        terms = sum(behind - first for first, behind, _ in capacity.spans.values())
        (_add_rows if terms <= max_row_terms else _add_chain)(problem, drop, capacity, d)
    for c, cut in enumerate(block.cuts):
        problem += pulp.LpAffineExpression([(drop[i], 1) for i in sorted(cut)]) >= 1, f"cut_{c}"
    for v, (_, sharers) in enumerate(block.shared):
        for i in sharers:
            problem += pulp.LpAffineExpression([(store[v], 1), (drop[i], -1)]) >= 0, f"store_{v}_{i}"
    return problem


def _add_rows(problem: pulp.LpProblem, drop: dict[int, Any], capacity: Capacity, d: int) -> None:
    """``sum(size[i] * drop[i] for i across r) >= need[r]``, divided by the sizes' common divisor.

    The need is rounded up, and no size is larger than it: both leave the same choices and tighten the relaxation.
    """
    for r, (members, need) in enumerate(zip(capacity.members(), capacity.need.tolist(), strict=True)):
        unit = math.gcd(*(capacity.spans[i][2] for i in members))
        rhs = -(-need // unit)
        terms = [(drop[i], min(capacity.spans[i][2] // unit, rhs)) for i in members]
        problem += pulp.LpAffineExpression(terms) >= rhs, f"capacity_{d}_{r}"


def _add_chain(problem: pulp.LpProblem, drop: dict[int, Any], capacity: Capacity, d: int) -> None:
    """``freed[r] = freed[r - 1] + (dropped intervals that begin at r) - (those that ended)``, ``freed[r] >= need[r]``.

    The same rows as differences of neighbours: two terms an interval instead of one for each row it spans.
    """
    unit = math.gcd(*(size for _, _, size in capacity.spans.values()))
    changes: list[list[tuple[Any, int]]] = [[] for _ in range(len(capacity.need) + 1)]
    for i, (first, behind, size) in capacity.spans.items():
        changes[first].append((drop[i], -size // unit))
        changes[behind].append((drop[i], size // unit))
    previous = None
    for r, need in enumerate(capacity.need.tolist()):
        freed = problem.add_variable(f"freed_{d}_{r}", -(-need // unit))
        terms = [(freed, 1), *changes[r]] + ([(previous, -1)] if previous is not None else [])
        problem += pulp.LpAffineExpression(terms) == 0, f"capacity_{d}_{r}"
        previous = freed
