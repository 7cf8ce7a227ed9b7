"""What an order decides about: dependencies, buffers with their users, and what an order costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...compiler.pipeline import Decision
from ...compiler.plan import Certificate, Plan
from ...hw_models.model import aligned_bytes

__all__ = ["Eviction", "OrderProblem", "ancestor_masks", "decide", "depths", "descendant_masks"]


class Eviction(NamedTuple):
    """A buffer leaves before ``step`` and is back for ``next_use``, both positions in the order; moves ``nbytes``."""

    step: int
    next_use: int
    nbytes: int


@dataclass(frozen=True)
class OrderProblem:
    """Operators and planned buffers as indices; streamed and empty buffers occupy nothing and are left out.

    ``nbytes`` and ``footprint`` are per buffer, in bytes: its size, and its size rounded up to the scratchpad's
    alignment. ``touches`` and ``writes`` list buffers per operator, ``users`` operators per buffer in program order.
    ``is_source`` says that the buffer exists in backing memory beforehand; ``final_writer`` is the operator that
    leaves an output's final bytes (-1 for other buffers). ``capacity`` is the scratchpad's bytes, raised to the
    largest working set where it is smaller: no order can go below that.
    """

    capacity: int
    predecessors: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    footprint: tuple[int, ...]
    touches: tuple[tuple[int, ...], ...]
    writes: tuple[frozenset[int], ...]
    users: tuple[tuple[int, ...], ...]
    is_source: tuple[bool, ...]
    final_writer: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan) -> OrderProblem:
        """The order problem of ``plan``'s graph on its machine; the plan's own order plays no part."""
        graph = plan.graph
        streamed = set(plan.streamed)
        names = [name for name, base in graph.buffers.items() if base.nbytes and name not in streamed]
        index = {name: i for i, name in enumerate(names)}
        touches = tuple(tuple(index[b] for b in buffers if b in index) for buffers in graph.touches)
        users: list[list[int]] = [[] for _ in names]
        final_writer = [-1] * len(names)
        for op, buffers in enumerate(graph.writes):
            for buffer in touches[op]:
                users[buffer].append(op)
            for name in buffers:
                if name in graph.output_buffers and name in index:
                    final_writer[index[name]] = op
        alignment = plan.machine.scratchpad_memory.alignment_bytes
        nbytes = tuple(graph.buffers[name].nbytes for name in names)
        footprint = tuple(aligned_bytes(size, alignment) for size in nbytes)
        largest = max((sum(footprint[b] for b in buffers) for buffers in touches), default=0)
        return cls(
            capacity=max(plan.machine.scratchpad_memory.capacity_bytes, largest),
            predecessors=graph.predecessors,
            successors=graph.successors,
            nbytes=nbytes,
            footprint=footprint,
            touches=touches,
            writes=tuple(frozenset(index[b] for b in buffers if b in index) for buffers in graph.writes),
            users=tuple(map(tuple, users)),
            is_source=tuple(graph.buffers[name].role.is_source for name in names),
            final_writer=tuple(final_writer),
        )

    def largest_working_set(self) -> int:
        """Bytes of the largest working set of one operator: every order's peak is at least that."""
        return max((sum(self.nbytes[b] for b in buffers) for buffers in self.touches), default=0)

    def peak_bytes(self, order: Sequence[int]) -> int:
        """Largest sum of live bytes, every buffer being live from its first to its last use."""
        left = [len(users) for users in self.users]
        live = peak = 0
        for op in order:
            for buffer in self.touches[op]:
                if left[buffer] == len(self.users[buffer]):
                    live += self.nbytes[buffer]
                left[buffer] -= 1
            peak = max(peak, live)
            live -= sum(self.nbytes[b] for b in self.touches[op] if not left[b])
        return peak

    def spill_bytes(self, order: Sequence[int]) -> int:
        """Additional traffic of ``order`` in bytes: that of its ``evictions``."""
        return sum(eviction.nbytes for eviction in self.evictions(order))

    def evictions(self, order: Sequence[int]) -> list[Eviction]:
        """What has to leave a scratchpad of ``capacity`` and come back, under the better of two eviction rules.

        The rules are furthest next use (Belady) and least cost for the room made. Both account exactly for what is
        clean, what must be stored first, and outputs that are stored anyway, so their traffic is an upper bound on
        the least additional traffic of the order.
        """
        # The walk of residency/eviction.py decides better, on a problem built for one order. A search asks about
        # thousands of orders, and building that problem alone takes several times as long as both walks here.
        uses: list[list[int]] = [[] for _ in self.users]
        for step, op in enumerate(order):
            for buffer in self.touches[op]:
                uses[buffer].append(step)
        furthest = self._evict(order, uses, by_cost=False)
        if not furthest:
            return furthest
        return min(furthest, self._evict(order, uses, by_cost=True), key=lambda es: sum(e.nbytes for e in es))

    def _evict(self, order: Sequence[int], uses: list[list[int]], *, by_cost: bool) -> list[Eviction]:
        cursor = [0] * len(uses)  # index into uses of each buffer's next use
        clean = list(self.is_source)
        resident: set[int] = set()
        evictions: list[Eviction] = []
        used = 0
        for step, op in enumerate(order):
            touched = self.touches[op]
            missing = [b for b in touched if b not in resident]
            need = used + sum(self.footprint[b] for b in missing)
            if need > self.capacity:
                candidates = {b: uses[b][cursor[b]] for b in resident.difference(touched)}
                for victim in self._victims(candidates, need - self.capacity, clean, by_cost=by_cost):
                    moved = self.nbytes[victim] * (1 if clean[victim] else 2)
                    evictions.append(Eviction(step, candidates[victim], moved))
                    clean[victim] = True
                    need -= self.footprint[victim]
                    resident.discard(victim)
            used = need
            resident.update(missing)
            for buffer in self.writes[op]:
                clean[buffer] = self.final_writer[buffer] == op
            for buffer in touched:
                cursor[buffer] += 1
                if cursor[buffer] == len(uses[buffer]):
                    resident.discard(buffer)
                    used -= self.footprint[buffer]
        return evictions

    def _victims(self, candidates: dict[int, int], deficit: int, clean: list[bool], *, by_cost: bool) -> list[int]:
        if not by_cost:
            return self._first(sorted(candidates, key=lambda b: (-candidates[b], -self.footprint[b], b)), deficit)
        cost = {b: self.nbytes[b] * (1 if clean[b] else 2) for b in candidates}
        ranked = sorted(candidates, key=lambda b: (cost[b] / self.footprint[b], -candidates[b], -self.footprint[b], b))
        several = self._first(ranked, deficit)
        single = min(
            (b for b in candidates if self.footprint[b] >= deficit),
            key=lambda b: (cost[b], -candidates[b], b),
            default=None,
        )
        return several if single is None or sum(cost[b] for b in several) < cost[single] else [single]

    def _first(self, ranked: list[int], deficit: int) -> list[int]:
        """The first of ``ranked`` that together free ``deficit`` bytes, less those that later ones make superfluous."""
        chosen: list[int] = []
        for buffer in ranked:
            if deficit <= 0:
                break
            chosen.append(buffer)
            deficit -= self.footprint[buffer]
        for buffer in reversed(chosen[:-1]):
            if deficit + self.footprint[buffer] <= 0:
                chosen.remove(buffer)
                deficit += self.footprint[buffer]
        return chosen


def depths(predecessors: Sequence[Sequence[int]]) -> list[int]:
    """Longest path of dependencies that leads to each operator, in operators; those without predecessors have 0."""
    depth: list[int] = []
    for before in predecessors:
        depth.append(1 + max((depth[p] for p in before), default=-1))
    return depth


def decide(plan: Plan, problem: OrderProblem, order: Sequence[int], *, note: str = "") -> Decision:
    """``plan`` with ``order``, certified by its peak against the largest working set, a bound for every order."""
    peak = problem.peak_bytes(order)
    certificate = Certificate("peak_bytes", peak, problem.largest_working_set(), "analytic", "order")
    return Decision(plan.with_order(order), certificate, note)


def ancestor_masks(predecessors: Sequence[Sequence[int]]) -> list[int]:
    """Each operator's ancestors as a bit mask; operators come in an order that respects dependencies."""
    ancestors: list[int] = []
    for before in predecessors:
        reached = 0
        for op in before:
            reached |= ancestors[op] | 1 << op
        ancestors.append(reached)
    return ancestors


def descendant_masks(successors: Sequence[Sequence[int]]) -> list[int]:
    """Each operator's descendants as a bit mask; operators come in an order that respects dependencies."""
    descendants = [0] * len(successors)
    for op in reversed(range(len(successors))):
        for later in successors[op]:
            descendants[op] |= descendants[later] | 1 << later
    return descendants
