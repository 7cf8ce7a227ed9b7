"""A first answer without a solver: save what the backward half reads, then give up what costs least a byte."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ...compiler.partition import PartitionProblem, Recount
from ._model import Saved

__all__ = ["better", "keep_what_is_read", "tidied", "without_host"]

MAX_WORK = 3_000_000  # steps looked at: about a second


def better(problem: PartitionProblem, limit_bytes: int, answers: Iterable[Saved]) -> Saved | None:
    """The answer within the limit that takes the least time; of equals that of the fewest bytes, one offloaded
    counting as two; then the one of the first values.
    """

    def rank(answer: Saved) -> tuple[int, int, list[int], list[int]] | None:
        count = problem.recount(*answer)
        if count is None or count.kept_bytes > limit_bytes:
            return None
        saved_bytes = count.kept_bytes + 2 * sum(problem.values[v].nbytes for v in answer[1])
        return count.total_ps, saved_bytes, sorted(answer[0]), sorted(answer[1])

    ranked = [(key, answer) for answer in answers if (key := rank(answer)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def keep_what_is_read(problem: PartitionProblem) -> Saved:
    """Every value that the backward half reads, or what it is a view of, kept."""
    kept: set[int] = set()
    seen: set[int] = set()
    wanted = list(problem.demanded)
    while wanted:
        v = wanted.pop()
        producer = problem.values[v].producer
        if producer is None or v in seen:
            continue
        seen.add(v)
        if problem.values[v].can_keep:
            kept.add(v)
        else:
            wanted.extend(problem.steps[producer].reads)
    return frozenset(kept), frozenset()


def without_host(problem: PartitionProblem) -> PartitionProblem:
    """The same problem where nothing may be offloaded."""
    values = tuple(replace(value, store_ps=None, load_ps=None) for value in problem.values)
    return replace(problem, values=values)


def tidied(problem: PartitionProblem, limit_bytes: int, answer: Saved) -> Saved:
    """``answer`` changed one value at a time: given up where that saves time or is needed for the limit, then kept
    where that saves time and fits.

    The result may still be above the limit, and is then of no use.
    """
    search = _Search(problem, limit_bytes, answer)
    search.drop_unread()
    search.give_up()
    search.take_up()
    search.drop_unread()
    return search.answer


@dataclass
class _Search:
    problem: PartitionProblem
    limit_bytes: int
    answer: Saved
    work: int = field(default=0, init=False)

    def count(self, answer: Saved) -> Recount | None:
        found = self.problem.recount(*answer)
        self.work += 10 + len(self.answer[1]) + (len(found.again) if found is not None else len(self.problem.steps))
        self.work += len(self.problem.values) if self.answer[1] else 0
        return found

    def drop_unread(self) -> None:
        """Values that nothing reads: everything that would is saved itself."""
        count = self.problem.recount(*self.answer)
        if count is None:
            return
        read = set(self.problem.demanded).union(*(self.problem.steps[s].reads for s in count.again))
        self.answer = self.answer[0] & read, self.answer[1] & read

    def give_up(self) -> None:
        """Offload or compute again what is kept, the cheapest byte first, until it fits and nothing more is gained."""
        kept = sorted(self.answer[0])
        moves = [(v, _dropped) for v in kept]
        moves += [(v, _offloaded) for v in kept if self.problem.values[v].can_offload]
        self._take(moves)

    def take_up(self) -> None:
        """Keep what is offloaded or computed again, the most time a byte first, while it fits."""
        count = self.count(self.answer)
        if count is None or count.kept_bytes > self.limit_bytes:
            return
        kept, offloaded = self.answer
        made = {v for v, value in enumerate(self.problem.values) if value.can_keep and value.producer in count.again}
        moves = [(v, _kept) for v in sorted((made | offloaded) - kept)]
        self._take(moves)

    def _take(self, moves: Sequence[tuple[int, Callable[[Saved, int], Saved]]]) -> None:
        """Lazy greedy: a move's price is looked at again when it comes first, and taken if it still does."""
        now = self.count(self.answer)
        if now is None:
            return
        queue = [(float("-inf"), index) for index in range(len(moves))]
        settled: set[int] = set()
        while queue and self.work < MAX_WORK:
            _, index = heapq.heappop(queue)
            v, way = moves[index]
            if v in settled:
                continue
            candidate = way(self.answer, v)
            count = self.count(candidate)
            if count is None or not self._helps(now, count):
                continue
            price = (count.total_ps - now.total_ps) / max(1, self.problem.values[v].nbytes)
            if queue and price > queue[0][0]:
                heapq.heappush(queue, (price, index))
                continue
            if now.kept_bytes <= self.limit_bytes and count.total_ps >= now.total_ps:
                return
            self.answer, now = candidate, count
            settled.add(v)

    def _helps(self, now: Recount, then: Recount) -> bool:
        if now.kept_bytes > self.limit_bytes:
            return then.kept_bytes < now.kept_bytes or then.total_ps < now.total_ps
        return then.kept_bytes <= self.limit_bytes and then.total_ps < now.total_ps


def _dropped(answer: Saved, v: int) -> Saved:
    return answer[0] - {v}, answer[1] - {v}


def _offloaded(answer: Saved, v: int) -> Saved:
    return answer[0] - {v}, answer[1] | {v}


def _kept(answer: Saved, v: int) -> Saved:
    return answer[0] | {v}, answer[1] - {v}
