"""Local search from the best schedule so far: simulated annealing, in walks that get longer.

Two walk at a time, side by side where there are workers: one from the best schedule known, one from where the search
began, lest all of them end in the same valley. A walk starts hot enough to leave, and cools down.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ._climb import Walk, climb, walk_for
from ._lanes import Integers, schedule_of, sequences_of
from ._play import Room, objective_of, play, room_for
from ._progress import Search
from .list_schedule import Workshop

__all__ = ["improve"]

HOT = (0.05, 0.2, 0.5)  # temperatures that walks start at, in units of a mean task
COLD = 0.01  # and that they end at
FIRST_MOVES = 20_000  # of a walk of the first round
GROWTH = 3  # times as many in each round
WALKS = 4  # of a round
ROUNDS = 2  # in deterministic mode, where no clock may end it,
PLACES = 200_000_000  # and no walk goes over more places, all its moves together
CHUNK_S = 0.1  # between two looks at the clock
SIDE_BY_SIDE = 2
SLOWEST = 0.3  # share of the time left that one walk may take,
SHORTEST = 0.1  # or of the time that there was


def improve(search: Search, shop: Workshop) -> None:
    """Walk again and again until ``search`` is done, and offer it what is better."""
    assert search.best is not None
    entered = search.best.schedule
    walkers = [_Walker(search, shop, room_for(shop.lanes)) for _ in range(SIDE_BY_SIDE)]
    threads = min(SIDE_BY_SIDE, 1 if search.budget.deterministic else search.budget.workers)
    number = 0
    with ThreadPoolExecutor(threads) as pool:
        while not search.done() and (not search.budget.deterministic or number < ROUNDS * WALKS):
            walks = []
            for walker, start in zip(walkers, (search.best.schedule, entered), strict=True):
                order, begin = sequences_of(shop.lanes, start)
                moves = FIRST_MOVES * GROWTH ** min(6, number // WALKS)
                walks.append(pool.submit(walker.walk, order, begin, moves, HOT[number % len(HOT)], number + 1))
                number += 1
            found = min((walk.result() for walk in walks), key=lambda pair: pair[0])
            if found[0] < (search.value or 0):
                search.offer(schedule_of(shop.problem, shop.lanes, found[1], begin, f"annealing, walk {number}"))
            else:
                search.note(f"annealing, walk {number}", found[0])


class _Walker:
    """Someone who walks, in a room of their own."""

    def __init__(self, search: Search, shop: Workshop, room: Room) -> None:
        self.search, self.shop, self.room = search, shop, room
        lane = shop.lanes.lane
        self.span = search.objective == "span"
        self.flags = (self.span, bool(lane["useful"].any()), bool(lane["copies"].any()))
        self.mean = max(1.0, float((lane["duration"] * lane["microbatches"]).sum() / shop.lanes.nodes))
        self.seconds = search.budget.remaining_s
        self.speed = 1e7 / shop.lanes.nodes  # moves per second

    def walk(self, order: Integers, begin: Integers, moves: int, hot: float, seed: int) -> tuple[int, Integers]:
        """The objective reached, and the order."""
        budget = self.search.budget
        walk = walk_for(self.shop.lanes, budget.seed * 1_000_003 + seed)
        walk.order[:] = walk.best[:] = order
        if budget.deterministic:
            moves = max(1, min(moves, PLACES // self.shop.lanes.nodes))
        else:
            seconds = min(budget.remaining_s, max(SLOWEST * budget.remaining_s, SHORTEST * self.seconds))
            moves = max(1, min(moves, int(self.speed * seconds)))
        self._anneal(walk, begin, moves, hot)
        play(self.shop.lanes, self.room, walk.best, begin)
        return int(objective_of(self.shop.lanes, self.room, self.span)), walk.best

    def _anneal(self, walk: Walk, begin: Integers, moves: int, hot: float) -> None:
        temperature, cooling = hot * self.mean, float((COLD / hot) ** (1.0 / moves))
        while moves > 0 and not self.search.budget.halted():
            chunk = max(1, min(moves, int(self.speed * CHUNK_S)))
            before = time.monotonic()
            temperature = climb(self.shop.lanes, self.room, walk, begin, chunk, temperature, cooling, *self.flags)
            if not self.search.budget.deterministic:
                self.speed = chunk / max(1e-6, time.monotonic() - before)
            moves -= chunk
            if np.isfinite(walk.least[0]) and walk.least[0] < self.search.bound.value + 1:
                return
