"""The order of least peak for a program that others feed: what frames it stays first and last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...compiler.graph import Graph, OpKind
from ...compiler.pipeline import Budget
from ...compiler.plan import Certificate, Plan
from ..order._peak_search import (
    EFFORT,
    LeastPeak,
    aligned_peak,
    certificate,
    least_peak_order,
    plain_bound,
    working_set_bound,
)
from ..order.problem import OrderProblem
from .windows import improved, live_bytes_of

__all__ = ["Ordering", "framed", "ordering"]

SHARE = 0.5  # of the budget, for the search over all operators
WINDOWS_SHARE = 0.8  # of what is left, for windows of them; the rest repeats the proof in plain bytes
WORK = 40_000_000  # operators times down-sets expanded in deterministic mode


@dataclass(frozen=True)
class Ordering:
    """An order of operators (indices), what it proves, and the peaks it is compared with.

    ``certificate`` states its largest sum of live bytes and the bound over all orders, in plain bytes;
    ``program_bytes`` is the same sum in program order.
    """

    order: tuple[int, ...]
    certificate: Certificate
    program_bytes: int


def ordering(plan: Plan, budget: Budget, *, search: bool) -> Ordering:
    """The order of least peak of ``plan``'s graph; without ``search`` program order, whose bound is a working set's.

    Program order is kept wherever it does not need more: it uses what it has just made.
    """
    problem = framed(OrderProblem.of(plan), plan.graph)
    program = tuple(range(len(plan.graph.ops)))
    if search:
        effort = max(1, min(EFFORT, WORK // max(1, len(program))))
        found = least_peak_order(problem, budget.share(SHARE), start=program, effort=effort)
        if found.bound < found.peak:
            order = improved(problem, found.order, found.bound, budget.share(WINDOWS_SHARE))
            found = LeastPeak(order, aligned_peak(problem, order), found.bound)
        plain = plain_bound(problem, found, budget, effort=effort)
    else:
        peak = aligned_peak(problem, program)
        found = LeastPeak(program, peak, working_set_bound(problem, problem.footprint))
        plain = working_set_bound(problem, problem.nbytes)
    order = _near_program(problem, found)
    proven = certificate(problem, problem.peak_bytes(order), plain)
    return Ordering(order, proven, problem.peak_bytes(program))


def framed(problem: OrderProblem, graph: Graph) -> OrderProblem:
    """``problem`` with operators that bring what exists before all others, and those that take results behind them."""
    bring = [i for i, op in enumerate(graph.ops) if op.kind is OpKind.BOUNDARY and not op.inputs]
    take = [i for i, op in enumerate(graph.ops) if op.kind is OpKind.BOUNDARY and op.inputs and not op.outputs]
    if not bring and not take:
        return problem
    between = [i for i in range(len(graph.ops)) if i not in {*bring, *take}]
    before = [set(others) for others in problem.predecessors]
    for op in between:
        before[op].update(bring)
    for op in take:
        before[op].update(between, bring)
    return replace(problem, predecessors=tuple(tuple(sorted(o)) for o in before), successors=_mirrored(before))


def _near_program(problem: OrderProblem, found: LeastPeak) -> tuple[int, ...]:
    """``found``'s order, in program order wherever that needs no more than its peak.

    Where both have run the same operators, the same bytes are live, so what lies between two such positions may be
    taken from either.
    """
    live = live_bytes_of(problem, range(len(found.order)))
    order: list[int] = []
    begin = latest = 0
    for end, op in enumerate(found.order, 1):
        latest = max(latest, op)
        if latest == end - 1:  # operators 0 to end - 1 have run
            fits = max(live[begin:end]) <= found.peak
            order += range(begin, end) if fits else found.order[begin:end]
            begin = end
    return tuple(order)


def _mirrored(before: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    after: list[list[int]] = [[] for _ in before]
    for op, others in enumerate(before):
        for other in others:
            after[other].append(op)
    return tuple(tuple(sorted(others)) for others in after)
