"""Whether each operator's working set can lie in the scratchpad's banks and where it is pinned."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ...compiler.pipeline import Budget
from ...compiler.plan import Plan
from ...errors import Infeasible
from .gaps import best_of
from .no_overlap import Verdict, fit_by_constraints
from .packing import Packing
from .placement import described, listed

__all__ = ["require_places"]

QUESTION_SECONDS = 2.0  # for one operator; a working set is a few buffers, and what takes longer is left to addresses


def require_places(plan: Plan, budget: Budget) -> None:
    """Check that the working set of each operator has places in the scratchpad, when it has banks or buffers pins.

    A sum of bytes that fits is not enough then: dividing buffers among banks is bin packing.

    Raises:
        Infeasible: names the operator, the buffers of its working set with their pins, and the banks.
    """
    memory = plan.machine.scratchpad_memory
    if len(memory.banks) == 1 and not plan.pins:
        return
    streamed = frozenset(plan.streamed)
    packings = [_working_set(plan, touched, streamed) for touched in plan.graph.touches]
    known: set[tuple[object, ...]] = set()
    for op, packing in zip(plan.graph.ops, packings, strict=True):
        kind = tuple(sorted(zip(packing.nbytes, packing.windows, strict=True)))
        if kind not in known and _impossible(packing, budget):
            required = max(packing.together_bytes(packing.items) for packing in packings)
            raise _no_places(packing, op.name, memory.name, required)
        known.add(kind)


def _working_set(plan: Plan, touched: Iterable[str], streamed: Collection[str]) -> Packing:
    """What an operator needs resident of the buffers it touches, as residences of one step."""
    buffers = sorted(name for name in touched if name not in streamed and plan.graph.buffers[name].nbytes)
    return Packing.of_spans(plan, plan.machine.scratchpad_memory, [(name, 0, 1) for name in buffers])


def _impossible(packing: Packing, budget: Budget) -> bool:
    items = list(packing.items)
    offsets = best_of(packing, items, ("size",), tightest=True)
    if all(packing.lies_within(i, offset, packing.capacity) for i, offset in zip(items, offsets, strict=True)):
        return False
    seconds = QUESTION_SECONDS if budget.deterministic else min(QUESTION_SECONDS, budget.remaining_s)
    answer = fit_by_constraints(packing, items, packing.capacity, budget, seconds=seconds)
    return answer.verdict is Verdict.IMPOSSIBLE


def _no_places(packing: Packing, op: str, memory: str, required: int) -> Infeasible:
    ranked = sorted(packing.items, key=lambda i: (-packing.nbytes[i], i))
    buffers = ", ".join(described(packing, i) for i in ranked)
    banks = listed(behind - first for first, behind in packing.banks)
    several = len(packing.banks) > 1
    return Infeasible(
        f"the working set of operator {op!r} has no place in memory {memory!r}, which has "
        f"{'banks' if several else 'one bank'} of {banks} bytes: {buffers}",
        required_bytes=required,
        available_bytes=packing.capacity,
        hint=f"one bank of {required:,} bytes holds the working set of every operator"
        + ("; pins may be in their way" * bool(packing.pins)),
    )
