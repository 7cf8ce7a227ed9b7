"""Improving orders, one after the other: annealing over clusters of operators in compiled code."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...compiler.pipeline import Budget
from .clusters import clusters
from .problem import OrderProblem
from .track import Arrays, Integers, Track

__all__ = ["Found", "search_orders"]

FIRST_MOVES = 40  # per block, of the first round; later rounds are longer, as the first must end early
LONGEST_ROUND = 16  # times the moves of the first
MOVES_AT_ONCE = 2_000  # between two looks at the clock
HOT, COLD = 0.4, 0.004  # temperatures of a round, as shares of the bytes that one eviction moves on average
RESERVE = 0.05  # share of the time left that a round does not plan with
SLOTS = 64  # resident buffers that a track has room for at first
POLL_S = 0.02  # seconds between two looks at whether to end, while code is compiled


@dataclass(frozen=True)
class Found:
    """An order and the bytes that eviction with known future moves in it: an upper bound on its additional traffic."""

    order: tuple[int, ...]
    spill: int


def search_orders(
    problem: OrderProblem,
    budget: Budget,
    *,
    seed_orders: Iterable[Sequence[int]] = (),
    blocks: Sequence[Sequence[int]] | None = None,
    target: int = 0,
    patience: int = 6,
    most_moves: int = 1 << 62,
) -> Iterator[Found]:
    """Orders of falling spill, the best of ``seed_orders`` (program order by default) arranged by clusters first.

    Rounds of simulated annealing on the sequence of ``blocks`` (``clusters(problem)`` by default), alternately under
    two eviction rules, from the best order found or from a seed order. Ends at a spill of ``target`` bytes or less,
    which may be any lower bound; after ``patience`` rounds in a row that brought nothing; after ``most_moves``; and
    when the budget ends, but never by the clock in deterministic mode. Time per move, some microseconds, hardly depends
    on the number of operators; moves per round are in proportion to it, or fewer where there is no time for so many.

    The first use on a machine compiles for some seconds; a budget that ends meanwhile ends the search without a result.
    """
    halted = budget.halted
    if not problem.touches or not _is_compiled(halted):
        return
    search = _Search(problem, clusters(problem) if blocks is None else blocks, budget.seed, most_moves)
    seeds = [search.sequence_of(order) for order in seed_orders] or [list(range(len(search.blocks)))]
    for sequence in seeds:
        for rule in search.rules:
            if search.begin(sequence, rule):
                yield search.found()
    fruitless = 0
    for number in range(1 << 62):
        if search.spill <= target or fruitless >= patience or search.moves_left <= 0 or halted():
            return
        fruitless += 1
        start = None if number % 4 < 2 else seeds[number // 4 % len(seeds)]
        for _ in search.round(number, start, target, budget):
            fruitless = 0
            yield search.found()


class _Search:
    """A track of the order being changed, and the best sequence of blocks so far."""

    def __init__(self, problem: OrderProblem, blocks: Sequence[Sequence[int]], seed: int, moves: int) -> None:
        from .walk import FURTHEST, LEAST_COST  # numba: only where it is needed

        self.blocks = blocks
        self.rules = (FURTHEST, LEAST_COST)
        self.moves_left = moves
        self._arrays = Arrays.of(problem, blocks)
        self._track = Track.of(self._arrays, SLOTS)
        self._random = np.random.default_rng(seed).integers(1, 1 << 63, 1, dtype=np.uint64)
        self._keys = np.random.default_rng(seed).integers(1, 1 << 63, len(blocks))
        self._best = np.arange(len(blocks))
        self._control = np.array([1 << 60, 0])

    @property
    def spill(self) -> int:
        """Bytes that the best order moves."""
        return int(self._control[0])

    def found(self) -> Found:
        """The best order."""
        return Found(tuple(op for block in self._best.tolist() for op in self.blocks[block]), self.spill)

    def sequence_of(self, order: Sequence[int]) -> list[int]:
        """Blocks in a legal order close to ``order``: the block whose last operator comes first there is next."""
        position = {op: p for p, op in enumerate(order)}
        last = [max(position[op] for op in block) for block in self.blocks]
        arrays = self._arrays
        waiting = np.diff(arrays.before_begin).tolist()
        ready = [(last[k], k) for k, count in enumerate(waiting) if not count]
        heapq.heapify(ready)
        sequence: list[int] = []
        while ready:
            block = heapq.heappop(ready)[1]
            sequence.append(block)
            for k in arrays.after[arrays.after_begin[block] : arrays.after_begin[block + 1]].tolist():
                waiting[k] -= 1
                if not waiting[k]:
                    heapq.heappush(ready, (last[k], k))
        return sequence

    def begin(self, sequence: Sequence[int], rule: int) -> bool:
        """Put the track at ``sequence``; whether that is better than the best."""
        from .walk import IMPOSSIBLE, place

        self._track.sequence[:] = sequence
        while True:
            place(self._arrays, self._track, 0, len(self.blocks))
            if self._walk(rule) != IMPOSSIBLE:
                return self._keep()
            larger = Track.of(self._arrays, 2 * len(self._track.resident))
            larger.sequence[:] = self._track.sequence
            self._track = larger

    def _walk(self, rule: int) -> int:
        """Decide every eviction of the track's order anew; bytes moved."""
        from .walk import walk

        return int(walk(self._arrays, self._track, 0, len(self._track.order), rule, True))

    def _keep(self) -> bool:
        """Keep the track's sequence if it is better than the best; whether it is."""
        if self._track.total[0] >= self.spill:
            return False
        self._control[0] = self._track.total[0]
        self._best[:] = self._track.sequence
        return True

    def round(self, number: int, start: Sequence[int] | None, target: int, budget: Budget) -> Iterator[None]:
        """Anneal from ``start``, or from the best sequence; stops at every improvement.

        The temperature falls with the moves, or with the time that is left where that is too short for them.
        """
        rule = self.rules[number % 2]
        self.begin(self._best.tolist() if start is None else start, rule)
        evictions = int(np.count_nonzero(self._track.moved))
        unit = self._track.total[0] / max(1, evictions)
        moves = len(self.blocks) * FIRST_MOVES * min(LONGEST_ROUND, 1 << number // 2)
        pieces, time_s = -(-moves // MOVES_AT_ONCE), budget.remaining_s
        piece, progress = 0, 0.0
        self._control[1] = target
        while progress < 1.0 and self.spill > target and self.moves_left > 0 and not budget.halted():
            piece += 1
            before, hot = self.spill, unit * HOT * (COLD / HOT) ** progress
            progress = piece / pieces
            if not budget.deterministic:
                progress = max(progress, 1.0 - (budget.remaining_s - RESERVE * time_s) / time_s)
            self.move(MOVES_AT_ONCE, hot, unit * HOT * (COLD / HOT) ** min(1.0, progress), rule)
            if self.spill < before:
                yield
        if self._join(rule):
            yield

    def _join(self, rule: int) -> bool:
        """Take from the track's sequence the stretches in which it is better than the best; whether that helped.

        A stretch lies between two places up to which both have run the same blocks. What a stretch costs depends a
        little on what is resident when it begins, so the result is walked before it counts.
        """
        other, theirs = self._track.sequence.copy(), self._moved()
        if self._control[0] == self._track.total[0]:
            return False
        best = self._best.copy()
        self.begin(best.tolist(), rule)
        mine = self._moved()
        done = (np.bitwise_xor.accumulate(self._keys[sequence]) for sequence in (best, other))
        (cuts,) = np.nonzero(np.equal(*done))
        begins = np.concatenate(([0], cuts[:-1] + 1))
        better = np.add.reduceat(theirs, begins) < np.add.reduceat(mine, begins)
        return self.begin(np.where(np.repeat(better, np.diff(cuts, prepend=-1)), other, best).tolist(), rule)

    def _moved(self) -> Integers:
        """Bytes that evictions move before the operators of each block of the track's sequence."""
        return np.add.reduceat(self._track.moved, self._track.start[:-1])

    def move(self, moves: int, hot: float, cold: float, rule: int) -> None:
        """Try ``moves`` moves on the track while the temperature falls."""
        from .annealing import anneal

        self.moves_left -= moves
        anneal(self._arrays, self._track, self._random, moves, hot, cold, rule, self._best, self._control)
        self._walk(rule)
        self._keep()


def _is_compiled(halted: Callable[[], bool]) -> bool:
    """Load the compiled code, compiling it where there is none yet; ``False`` if ``halted`` says so meanwhile."""
    if halted():
        return False
    thread = threading.Thread(target=_compile)  # no daemon: an interpreter that ends must not pull a compiler's rug
    thread.start()
    while thread.is_alive():
        if halted():
            return False
        thread.join(POLL_S)
    return True


def _compile() -> None:
    """Run the compiled functions once, on a problem of one operator."""
    problem = OrderProblem(1, ((),), ((),), (1,), (1,), ((0,),), (frozenset({0}),), ((0,),), (False,), (-1,))
    search = _Search(problem, ((0,),), 0, 0)
    search.begin((0,), search.rules[0])
    search.move(0, 1.0, 1.0, search.rules[0])
