"""The least additional traffic and the least peak over all orders, by exhaustive search; for a handful of operators."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.errors import Infeasible
from opweave.passes.address.exact import ExactPlacement
from opweave.passes.address.placement import PlacementError
from opweave.passes.residency.emit import emit
from opweave.passes.residency.gaps import GapProblem

__all__ = ["least_peak", "least_placeable_traffic", "least_traffic", "topological_orders"]

_State = tuple[
    frozenset[int], frozenset[str], frozenset[str]
]  # operators done, resident buffers, current backing copies


def topological_orders(plan: Plan) -> Iterator[tuple[int, ...]]:
    """Every order of the plan's graph that respects its dependencies."""
    predecessors = plan.graph.predecessors

    def extend(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(order) == len(predecessors):
            yield order
        for op, before in enumerate(predecessors):
            if op not in order and set(before) <= set(order):
                yield from extend((*order, op))

    return extend(())


def least_traffic(plan: Plan) -> int:
    """Additional bytes of the best order with its best residency, placeable or not; knows nothing of gaps.

    A walk over all states that some order can be in after some operators, and all sets of buffers to keep between two
    operators. Sizes are rounded up to the scratchpad's alignment, of which the capacity must be a multiple.
    """
    graph = plan.graph
    nbytes = {b: base.nbytes for b, base in graph.buffers.items() if base.nbytes and b not in plan.streamed}
    sources = frozenset(b for b in nbytes if graph.buffers[b].role.is_source)
    states: dict[_State, int] = {(frozenset(), frozenset(), sources): 0}
    for _ in graph.ops:
        following: dict[_State, int] = {}
        for (done, resident, backed), moved in states.items():
            for op in _ready(plan, done):
                for state, cost in _steps(plan, nbytes, done, resident, backed, op):
                    following[state] = min(moved + cost, following.get(state, moved + cost))
        states = following
    outputs = graph.output_buffers & nbytes.keys()
    total = min(cost + sum(nbytes[b] for b in outputs - backed) for (_, _, backed), cost in states.items())
    streamed = sum(graph.buffers[b].nbytes for reads in graph.reads for b in reads if b in plan.streamed)
    read = {b for reads in graph.reads for b in reads}
    compulsory = sum(graph.buffers[b].nbytes for b in read if graph.buffers[b].role.is_source)
    return total + streamed - compulsory - sum(nbytes[b] for b in outputs)


def _ready(plan: Plan, done: frozenset[int]) -> list[int]:
    return [op for op, before in enumerate(plan.graph.predecessors) if op not in done and done.issuperset(before)]


def _steps(
    plan: Plan, nbytes: dict[str, int], done: frozenset[int], resident: frozenset[str], backed: frozenset[str], op: int
) -> Iterator[tuple[_State, int]]:
    """Every state after ``op`` runs next, and the bytes moved to get there."""
    graph, memory = plan.graph, plan.machine.scratchpad_memory
    alignment = memory.alignment_bytes
    existing = {b for b in nbytes if graph.buffers[b].role.is_source} | {b for o in done for b in graph.writes[o]}
    later = {b for o, touched in enumerate(graph.touches) if o not in done for b in touched} | graph.output_buffers
    touched = frozenset(b for b in graph.touches[op] if b in nbytes)
    written = frozenset(b for b in graph.writes[op] if b in nbytes)
    for keep in _subsets(resident - touched):
        kept = keep | (resident & touched)
        if sum(-(-nbytes[b] // alignment) for b in keep | touched) * alignment > memory.capacity_bytes:
            continue
        spilled = {b for b in resident - kept if b in later and b not in backed}
        fetched = {b for b in touched - kept if b in existing}
        cost = sum(nbytes[b] for b in spilled) + sum(nbytes[b] for b in fetched)
        yield (done | {op}, keep | touched, (backed | spilled) - written), cost


def _subsets(buffers: frozenset[str]) -> list[frozenset[str]]:
    ordered = sorted(buffers)
    return [frozenset(chosen) for count in range(len(ordered) + 1) for chosen in combinations(ordered, count)]


def least_placeable_traffic(plan: Plan, *, all_orders: bool = True, placed: bool = True) -> int:
    """Additional bytes of the best residency that has a placement, of any order or of the plan's own.

    Tries all subsets of gaps of each order, the cheapest first, and asks ``address/exact`` for a placement. Pins and
    banks are honoured; without ``placed``, so far as bytes go.
    """
    best: int | None = None
    for order in topological_orders(plan) if all_orders else (plan.order,):
        ordered = plan.with_order(order)
        try:
            problem = GapProblem.of(ordered)
        except Infeasible:  # what is pinned as resident does not fit in this order
            continue
        every = range(len(problem.intervals))
        choices = [c for count in range(len(every) + 1) for c in combinations(every, count)]
        for dropped in sorted(choices, key=problem.additional_bytes):
            if best is not None and problem.additional_bytes(dropped) >= best:
                break
            fits = bool((problem.slack(dropped) >= 0).all())
            if fits and (not placed or _is_placeable(emit(ordered, problem, dropped))):
                best = problem.additional_bytes(dropped)
    assert best is not None, "refetching everything is always placeable"
    return best


def _is_placeable(plan: Plan) -> bool:
    try:
        ExactPlacement().apply(plan, Budget.of_seconds(60.0, workers=1, deterministic=True))
    except PlacementError as error:
        failure = error
    else:
        return True
    assert failure.proven
    return False


def least_peak(plan: Plan) -> int:
    """Bytes of the least peak of any order, every buffer being live from its first to its last use."""
    graph = plan.graph
    nbytes = {b: base.nbytes for b, base in graph.buffers.items() if b not in plan.streamed}
    users = {b: frozenset(o for o, touched in enumerate(graph.touches) if b in touched) for b in nbytes}
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for _ in graph.ops:
        following: dict[frozenset[int], int] = {}
        for done, peak in states.items():
            for op in _ready(plan, done):
                after = done | {op}
                live = sum(nbytes[b] for b, of in users.items() if of & after and of - done)
                following[after] = min(max(peak, live), following.get(after, max(peak, live)))
        states = following
    return min(states.values())
