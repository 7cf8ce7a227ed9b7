"""Working sets: what must be resident at once for one operator to run, and so the least scratchpad of a model."""

from __future__ import annotations

from ...compiler.graph import Graph, Role
from ...compiler.plan import Plan
from ...errors import Infeasible
from ...hw_models.model import aligned_bytes

__all__ = ["least_capacity", "planned_buffers", "require_fit", "streamable_buffers"]

NAMED_TERMS = 8  # buffers an error lists one by one; the rest are summed up


def planned_buffers(plan: Plan) -> dict[str, int]:
    """Bytes of each buffer that needs a residence while it is used: all but the streamed and the empty ones."""
    streamed = set(plan.streamed)
    return {name: base.nbytes for name, base in plan.graph.buffers.items() if base.nbytes and name not in streamed}


def streamable_buffers(graph: Graph) -> tuple[str, ...]:
    """Buffers that operators may read directly from backing memory: sources other than inputs, never written."""
    written = {buffer for buffers in graph.writes for buffer in buffers}
    read = {buffer for buffers in graph.reads for buffer in buffers}
    fixed = {b for b, base in graph.buffers.items() if base.role.is_source and base.role is not Role.INPUT}
    return tuple(sorted(b for b in fixed & read - written if graph.buffers[b].nbytes))


def least_capacity(plan: Plan) -> int:
    """Bytes of the smallest scratchpad in which the plan's graph can run at all, whatever the order.

    It is the largest working set of one operator, its buffers laid side by side at aligned offsets. Keeping nothing
    but the working set of each operator always works, so the figure is exact, where the scratchpad is one bank and
    nothing is pinned; it is a lower bound otherwise.
    """
    return max((_least_bytes(plan, op) for op in range(len(plan.graph.ops))), default=0)


def require_fit(plan: Plan) -> None:
    """Check that every operator's working set fits the scratchpad on its own.

    Raises:
        Infeasible: names the operator with the largest working set, its bytes, the capacity, and the buffers that
            make it up, largest first; ``required_bytes`` is ``least_capacity(plan)``.
    """
    memory = plan.machine.scratchpad_memory
    needs = [_least_bytes(plan, op) for op in range(len(plan.graph.ops))]
    required = max(needs, default=0)
    if required <= memory.capacity_bytes:
        return
    worst = needs.index(required)
    too_large = sum(need > memory.capacity_bytes for need in needs)
    others = f" ({too_large} of {len(needs)} operators do not fit)" if too_large > 1 else ""
    raise Infeasible(
        f"operator {plan.graph.ops[worst].name!r} needs {required} bytes resident at once, but memory {memory.name!r} "
        f"has {memory.capacity_bytes}{others}; its working set is {_terms(plan, worst)}",
        required_bytes=required,
        available_bytes=memory.capacity_bytes,
        hint=f"the least scratchpad that works for this model is {required} bytes{_alternative(plan, worst)}",
    )


def _alternative(plan: Plan, op: int) -> str:
    """What else would help ``op``: streaming, where its working set holds weights that nobody writes."""
    graph = plan.graph
    written = {buffer for buffers in graph.writes for buffer in buffers}
    roles = {graph.buffers[name].role for name, _ in _working_set(plan, op) if name not in written}
    streamable = any(role.is_source and role is not Role.INPUT for role in roles)
    return "; streaming weights may lower it" if streamable else ""


def _least_bytes(plan: Plan, op: int) -> int:
    """Bytes the working set of ``op`` takes; only the buffer laid last needs no padding, best the most padded one."""
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    sizes = [nbytes for _, nbytes in _working_set(plan, op)]
    padded = [aligned_bytes(nbytes, alignment) for nbytes in sizes]
    return sum(padded) - max((p - n for p, n in zip(padded, sizes, strict=True)), default=0)


def _working_set(plan: Plan, op: int) -> list[tuple[str, int]]:
    """Buffers and bytes of one operator's working set, largest first."""
    streamed = set(plan.streamed)
    sizes = ((name, plan.graph.buffers[name].nbytes) for name in plan.graph.touches[op] if name not in streamed)
    return sorted(((name, nbytes) for name, nbytes in sizes if nbytes), key=lambda term: (-term[1], term[0]))


def _terms(plan: Plan, op: int) -> str:
    terms = _working_set(plan, op)
    named = [f"{name!r} {nbytes}" for name, nbytes in terms[:NAMED_TERMS]]
    rest = terms[NAMED_TERMS:]
    if rest:
        named.append(f"{len(rest)} more {sum(nbytes for _, nbytes in rest)}")
    return ", ".join(named)
