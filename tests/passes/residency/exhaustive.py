"""The least additional traffic of an order by exhaustive search over residency states, knowing nothing of gaps."""

from __future__ import annotations

from itertools import combinations

from opweave.compiler.plan import Plan

__all__ = ["least_additional_bytes"]

_State = tuple[frozenset[str], frozenset[str]]  # resident buffers, and buffers whose backing copy is current


def least_additional_bytes(plan: Plan) -> int:
    """Tries every set of buffers to keep between any two operators; exponential, for graphs of a few operators.

    Sizes are rounded up to the scratchpad's alignment, of which the capacity must be a multiple.
    """
    graph, memory = plan.graph, plan.machine.scratchpad_memory
    nbytes = {b: base.nbytes for b, base in graph.buffers.items() if base.nbytes and b not in plan.streamed}
    units = {b: -(-size // memory.alignment_bytes) for b, size in nbytes.items()}
    sources = frozenset(b for b in nbytes if graph.buffers[b].role.is_source)
    existing = set(sources)
    states: dict[_State, int] = {(frozenset(), sources): 0}
    streamed = 0
    for position, op in enumerate(plan.order):
        streamed += sum(graph.buffers[b].nbytes for b in graph.reads[op] if b in plan.streamed)
        touched = frozenset(b for b in graph.touches[op] if b in nbytes)
        written = frozenset(b for b in graph.writes[op] if b in nbytes)
        later = {b for other in plan.order[position:] for b in graph.touches[other]} | graph.output_buffers
        following: dict[_State, int] = {}
        for (resident, backed), moved in states.items():
            for keep in _subsets(resident - touched):
                kept = keep | (resident & touched)
                if sum(units[b] for b in keep | touched) * memory.alignment_bytes > memory.capacity_bytes:
                    continue
                spilled = {b for b in resident - kept if b in later and b not in backed}
                fetched = {b for b in touched - kept if b in existing}
                cost = moved + sum(nbytes[b] for b in spilled) + sum(nbytes[b] for b in fetched)
                state = (keep | touched, (backed | spilled) - written)
                following[state] = min(cost, following.get(state, cost))
        states = following
        existing |= written
    outputs = graph.output_buffers & nbytes.keys()
    total = min(cost + sum(nbytes[b] for b in outputs - backed) for (_, backed), cost in states.items())
    read = {b for buffers in graph.reads for b in buffers}
    compulsory = sum(graph.buffers[b].nbytes for b in read if graph.buffers[b].role.is_source)
    return total + streamed - compulsory - sum(nbytes[b] for b in outputs)


def _subsets(buffers: frozenset[str]) -> list[frozenset[str]]:
    ordered = sorted(buffers)
    return [frozenset(chosen) for count in range(len(ordered) + 1) for chosen in combinations(ordered, count)]
