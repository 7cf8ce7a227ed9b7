"""The least price of an order by exhaustive search over residency states and recomputations, knowing nothing of gaps.

A state is the set of resident buffers and the set of those whose backing copy is current; stores are paid when they
are first needed, which is never later than they could have been made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from opweave.compiler.graph import OpKind
from opweave.compiler.plan import Load, Plan, Recompute, Store

__all__ = ["Price", "least_price", "paid"]

_Set = frozenset[str]
_States = dict[tuple[_Set, _Set], int]


@dataclass(frozen=True)
class Price:
    """What a load, a store and running an operator (by index) again cost."""

    load: Callable[[int], int]
    store: Callable[[int], int]
    again: Callable[[int], int]


def paid(plan: Plan, price: Price) -> int:
    """What ``plan`` pays beyond one load of each source it uses and one store of each output."""
    graph = plan.graph
    nbytes = {b: base.nbytes for b, base in graph.buffers.items() if base.nbytes and b not in plan.streamed}
    index = {op.name: i for i, op in enumerate(graph.ops)}
    total = 0
    for i in plan.instructions:
        match i:
            case Load(buffer=b):
                total += price.load(nbytes[b])
            case Store(buffer=b):
                total += price.store(nbytes[b])
            case Recompute(op=name):
                total += price.again(index[name])
    used = {b for touched in graph.touches for b in touched} & nbytes.keys()
    total -= sum(price.load(nbytes[b]) for b in used if graph.buffers[b].role.is_source)
    return total - sum(price.store(nbytes[b]) for b in graph.output_buffers & nbytes.keys())


def least_price(plan: Plan, price: Price, *, anywhere: bool = False) -> int:
    """The least of ``paid`` over every residency with recomputations in the order of their runs before each operator.

    They make, in chains of any length, what the operator needs and the one before it did not touch; ``anywhere`` lets
    every operator run again before every other. The capacity is a multiple of the alignment.
    """
    search = _Search(plan, price)
    sources = frozenset(b for b in search.nbytes if plan.graph.buffers[b].role.is_source)
    states: _States = {(frozenset(), sources): 0}
    for position, op in enumerate(plan.order):
        for again in search.candidates(position, anywhere=anywhere):
            for state, cost in search.after(states, again, rerun=True).items():
                states[state] = min(cost, states.get(state, cost))
        states = search.after(states, op, rerun=False)
    nbytes, outputs = search.nbytes, plan.graph.output_buffers & search.nbytes.keys()
    total = min(cost + sum(price.store(nbytes[b]) for b in outputs - backed) for (_, backed), cost in states.items())
    used = {b for touched in plan.graph.touches for b in touched} & sources
    total -= sum(price.load(nbytes[b]) for b in used)
    return total - sum(price.store(nbytes[b]) for b in outputs)


class _Search:
    def __init__(self, plan: Plan, price: Price) -> None:
        self.plan, self.graph, self.price = plan, plan.graph, price
        self.memory = plan.machine.scratchpad_memory
        streamed = frozenset(plan.streamed)
        self.nbytes = {b: t.nbytes for b, t in plan.graph.buffers.items() if t.nbytes and b not in streamed}
        self.units = {b: -(-n // self.memory.alignment_bytes) for b, n in self.nbytes.items()}

    def candidates(self, position: int, *, anywhere: bool) -> list[int]:
        """Operators that may run again before ``position``, in the order of their runs."""
        order, graph = self.plan.order, self.graph
        past = order[:position]
        admissible = [o for o in past if self._repeatable(o, past)]
        if anywhere or position == 0:
            return admissible
        needed, recent = set(graph.touches[order[position]]), set(graph.touches[order[position - 1]])
        found: set[int] = set()
        wanted = needed - recent
        while wanted:
            more = {o for o in admissible if wanted & set(graph.writes[o]) and not recent & set(graph.writes[o])}
            wanted = {b for o in more - found for b in graph.reads[o]} - needed - recent
            found |= more
        return [o for o in admissible if o in found]

    def _repeatable(self, op: int, past: tuple[int, ...]) -> bool:
        graph = self.graph
        own = all(
            b in graph.ops[op].outputs and sum(b in written for written in graph.writes) == 1 for b in graph.writes[op]
        )
        later = past[past.index(op) + 1 :]
        updated = {b for other in later for b in graph.writes[other]}
        return own and graph.ops[op].kind is OpKind.COMPUTE and updated.isdisjoint(graph.reads[op])

    def after(self, states: _States, op: int, *, rerun: bool) -> _States:
        """States in which ``op`` may leave what it found."""
        touched = frozenset(b for b in self.graph.touches[op] if b in self.nbytes)
        made = frozenset(b for b in touched & set(self.graph.writes[op]) if b in self.graph.ops[op].outputs)
        written = frozenset() if rerun else touched & set(self.graph.writes[op])
        following: _States = {}
        for (resident, backed), paid_before in states.items():
            fetched = touched - made - resident
            stored = fetched - backed
            cost = paid_before + (self.price.again(op) if rerun else 0)
            cost += sum(self.price.load(self.nbytes[b]) for b in fetched)
            cost += sum(self.price.store(self.nbytes[b]) for b in stored)
            for keep in _subsets(resident - touched):
                if (
                    sum(self.units[b] for b in keep | touched) * self.memory.alignment_bytes
                    > self.memory.capacity_bytes
                ):
                    continue
                state = (keep | touched, (backed | stored) - written)
                following[state] = min(cost, following.get(state, cost))
        return following


def _subsets(buffers: _Set) -> Iterator[_Set]:
    ordered = sorted(buffers)
    for count in range(len(ordered) + 1):
        yield from map(frozenset, combinations(ordered, count))
