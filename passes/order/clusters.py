"""Operators that may run back to back without loss: clusters, proven to leave an order of least traffic.

Claim: among the orders with the least additional traffic, each with its best residency, there is one in which every
cluster runs back to back in the sequence given. It is shown by moving one block of operators past the others: ``after``
moves a later block up to an earlier one, ``before`` moves an earlier block down to a later one, and neither move
raises the traffic. Both keep every other block together, so merging may go on with what has been merged.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .problem import OrderProblem

__all__ = ["clusters"]

MOST = 48  # operators of one cluster; longer ones cost time and bring nothing
LOOKS = 200  # operators that one question about ancestors may visit; past that the answer is "not known", no merge


def clusters(problem: OrderProblem) -> tuple[tuple[int, ...], ...]:
    """Sequences of operators that partition all of them, in a legal order; most are singletons in dense graphs.

    Time grows with operators times the longest cluster. Given the alignment of the scratchpad, sizes are compared in
    plain and in rounded bytes, so the claim holds for both.
    """
    blocks = _Blocks(problem)
    pending = list(range(len(problem.touches)))
    while pending:  # ``pending`` holds leaders of blocks whose surroundings changed
        changed: list[int] = []
        for leader in pending:
            while (merged := blocks.grow(leader)) is not None:
                leader = merged
                changed.append(merged)
        pending = sorted({near for leader in changed for near in blocks.near(leader)})
    return tuple(blocks.in_order())


@dataclass(frozen=True)
class _Size:
    """Bytes in the two measures that count for room."""

    plain: int
    rounded: int

    def __le__(self, other: _Size) -> bool:
        return self.plain <= other.plain and self.rounded <= other.rounded


class _Blocks:
    """A partition of the operators that grows coarser; a block is known by one operator, its leader."""

    def __init__(self, problem: OrderProblem) -> None:
        count = len(problem.touches)
        self._problem = problem
        self._leader = list(range(count))
        self._block: dict[int, tuple[int, ...]] = {op: (op,) for op in range(count)}
        self._written = [False] * len(problem.nbytes)
        for written in problem.writes:
            for buffer in written:
                self._written[buffer] = True

    def near(self, leader: int) -> set[int]:
        """The block and those with an edge to or from it, by leader."""
        problem = self._problem
        ops = self._block[self._leader[leader]]
        ends = {other for op in ops for other in (*problem.predecessors[op], *problem.successors[op])}
        return {self._leader[op] for op in (*ops, *ends)}

    def grow(self, leader: int) -> int | None:
        """Merge the block with one that follows it; the new leader, or ``None`` where no merge is known to be safe."""
        leader = self._leader[leader]
        block = self._block[leader]
        following = sorted({self._leader[s] for op in block for s in self._problem.successors[op]} - {leader})
        for other in following:
            later = self._block[other]
            if len(block) + len(later) <= MOST and (self._after(block, later) or self._before(block, later)):
                merged = block + later
                del self._block[leader], self._block[other]
                self._block[merged[0]] = merged
                for op in merged:
                    self._leader[op] = merged[0]
                return merged[0]
        return None

    def in_order(self) -> list[tuple[int, ...]]:
        """Blocks in a legal order, the earliest first operator first where several may be next."""
        problem = self._problem
        waiting = {
            leader: len({self._leader[p] for op in block for p in problem.predecessors[op]} - {leader})
            for leader, block in self._block.items()
        }
        ready = [leader for leader, count in waiting.items() if not count]
        heapq.heapify(ready)
        result: list[tuple[int, ...]] = []
        while ready:
            leader = heapq.heappop(ready)
            result.append(self._block[leader])
            after = {self._leader[s] for op in self._block[leader] for s in problem.successors[op]} - {leader}
            for other in sorted(after):
                waiting[other] -= 1
                if not waiting[other]:
                    heapq.heappush(ready, other)
        return result

    # -- moving ``later`` up to ``block`` -----------------------------------------------------------------------------

    def _after(self, block: tuple[int, ...], later: tuple[int, ...]) -> bool:
        problem = self._problem
        if not all(self._known_before(p, block) for op in later for p in problem.predecessors[op] if p not in later):
            return False
        mine, theirs = self._span(block), self._span(later)
        shared = mine.keys() & theirs.keys()
        if not shared <= set(problem.touches[block[-1]]):
            return False
        if not all(b in mine or self._begins_in(b, later) or set(problem.users[b]) <= set(later) for b in theirs):
            return False
        outlives = {b for b in theirs if self._used_later(b, later)}
        born = {b for b in outlives if any(b in problem.writes[op] for op in later)}
        return self._is_replaced(born, shared, block, later) and self._fits_after(block, later, mine, theirs, outlives)

    def _is_replaced(self, born: set[int], shared: set[int], block: tuple[int, ...], later: tuple[int, ...]) -> bool:
        """Whether one shared buffer, gone or overwritten after ``later``, outweighs what ``later`` leaves."""
        problem = self._problem
        if not born:
            return True
        cost = sum(problem.nbytes[b] * (1 if problem.final_writer[b] in later else 2) for b in born)
        for b in shared:
            rewritten = any(b in problem.writes[op] for op in later)
            if not rewritten and self._used_later(b, later):
                continue
            touching = [op for op in later if b in problem.touches[op]]
            made = b in problem.writes[block[-1]] and problem.final_writer[b] != block[-1]
            sole = made and (len(touching) == 1 or b in problem.writes[touching[0]])
            if self._size(born) <= self._size([b]) and cost <= problem.nbytes[b] * (2 if sole else 1):
                return True
        return False

    def _fits_after(
        self,
        block: tuple[int, ...],
        later: tuple[int, ...],
        mine: dict[int, tuple[int, int]],
        theirs: dict[int, tuple[int, int]],
        outlives: set[int],
    ) -> bool:
        problem = self._problem
        waiting = {b for b in mine.keys() - theirs.keys() if self._used_later(b, block)}
        for j in range(len(later)):
            resident = waiting | {
                b
                for b, (first, last) in theirs.items()
                if (first <= j and (last >= j or b in outlives)) or (first > j and b in mine)
            }
            if not any(
                self._size(b for b in resident - touched if not (b in waiting and mine[b][1] <= i))
                <= self._size(touched - resident)
                for i, touched in enumerate(set(problem.touches[op]) for op in block)
            ):
                return False
        return True

    # -- moving ``block`` down to ``later`` ---------------------------------------------------------------------------

    def _before(self, block: tuple[int, ...], later: tuple[int, ...]) -> bool:
        problem = self._problem
        if not all(self._known_after(s, later) for op in block for s in problem.successors[op] if s not in block):
            return False
        mine, theirs = self._span(block), self._span(later)
        shared = mine.keys() & theirs.keys()
        if not shared <= set(problem.touches[later[0]]):
            return False
        written = {b for op in block for b in problem.writes[op]}
        inherited = {b for b in mine if not self._begins_in(b, block) and not self._is_first_used_in(b, block)}
        extended = {b for b in inherited if b not in shared or b in written}
        return self._makes_up(extended, shared & written, block, later) and self._fits_before(
            block, later, mine, theirs, inherited
        )

    def _makes_up(self, extended: set[int], made: set[int], block: tuple[int, ...], later: tuple[int, ...]) -> bool:
        """Whether one buffer that ``block`` makes for ``later`` outweighs what has to wait for ``block`` instead."""
        problem = self._problem
        if not extended:
            return True
        cost = sum(problem.nbytes[b] * (1 if problem.is_source[b] and not self._written[b] else 2) for b in extended)
        for b in made:
            last = [op for op in block if b in problem.touches[op]][-1]
            users = [u for u in problem.users[b] if u > last]  # users of what it writes depend on ``last``
            sole = b in problem.writes[last] and problem.final_writer[b] != last
            sole = sole and (users == [later[0]] or b in problem.writes[later[0]])
            if self._size(extended) <= self._size([b]) and cost <= problem.nbytes[b] * (2 if sole else 1):
                return True
        return False

    def _fits_before(
        self,
        block: tuple[int, ...],
        later: tuple[int, ...],
        mine: dict[int, tuple[int, int]],
        theirs: dict[int, tuple[int, int]],
        inherited: set[int],
    ) -> bool:
        problem = self._problem
        outlives = {b for b in mine if self._used_later(b, block)}
        waiting = {
            b
            for b in theirs.keys() - mine.keys()
            if not self._begins_in(b, later) and not self._is_first_used_in(b, later)
        }
        for j in range(len(block)):
            resident = waiting | {
                b
                for b, (first, last) in mine.items()
                if (first <= j and (last >= j or b in outlives)) or (first > j and b in inherited)
            }
            if not any(
                self._size(b for b in resident - touched if not (b in waiting and theirs[b][0] >= i))
                <= self._size(touched - resident)
                for i, touched in enumerate(set(problem.touches[op]) for op in later)
            ):
                return False
        return True

    # -- what holds in every order ------------------------------------------------------------------------------------

    def _size(self, buffers: Iterable[int]) -> _Size:
        chosen = list(buffers)
        nbytes, footprint = self._problem.nbytes, self._problem.footprint
        return _Size(sum(nbytes[b] for b in chosen), sum(footprint[b] for b in chosen))

    def _span(self, block: Sequence[int]) -> dict[int, tuple[int, int]]:
        """First and last index into ``block`` of an operator that touches each buffer."""
        span: dict[int, tuple[int, int]] = {}
        for k, op in enumerate(block):
            for b in self._problem.touches[op]:
                span[b] = (span[b][0] if b in span else k, k)
        return span

    def _begins_in(self, buffer: int, block: Sequence[int]) -> bool:
        return not self._problem.is_source[buffer] and self._problem.users[buffer][0] in block

    def _is_first_used_in(self, buffer: int, block: Sequence[int]) -> bool:
        """Whether ``buffer`` is a source that no operator can use before ``block`` does."""
        return self._problem.is_source[buffer] and all(self._known_after(u, block) for u in self._problem.users[buffer])

    def _used_later(self, buffer: int, block: Sequence[int]) -> bool:
        """Whether an operator that may run after ``block`` uses ``buffer``."""
        return not all(self._known_before(u, block) for u in self._problem.users[buffer])

    def _known_before(self, op: int, block: Sequence[int]) -> bool:
        """Whether ``op`` is in ``block`` or an ancestor of it; ``False`` where the search ends early."""
        return op in block or _leads(op, block, self._problem.predecessors, backward=True)

    def _known_after(self, op: int, block: Sequence[int]) -> bool:
        return op in block or _leads(op, block, self._problem.successors, backward=False)


def _leads(op: int, block: Sequence[int], edges: Sequence[Sequence[int]], *, backward: bool) -> bool:
    """Whether ``edges`` lead from ``block`` to ``op``; looks at ``LOOKS`` operators at most.

    Indices are in a legal order, so nothing behind ``op`` in the direction of the edges leads to it.
    """
    seen = set(block)
    stack = list(block)
    while stack and len(seen) <= LOOKS:
        for other in edges[stack.pop()]:
            if other == op:
                return True
            if other not in seen and (other > op if backward else other < op):
                seen.add(other)
                stack.append(other)
    return False
