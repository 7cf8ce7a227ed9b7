"""Local search from the best schedule so far: its starts, disturbed, are the priorities of the next list schedule.

Only what starts within a window of time is disturbed, a window that moves over the whole step. That is iterative
flattening's idea with a list scheduler in place of a constraint solver; a schedule that takes as long is accepted, so
that the search drifts over plateaus.
"""

from __future__ import annotations

import numpy as np

from ._climb import climb, walk_for
from ._lanes import Floats, Integers, schedule_of, sequences_of
from ._progress import Search
from .list_schedule import Workshop

__all__ = ["improve"]

ROUNDS = 200  # in deterministic mode, where no clock may end it
MOVES = 4_000_000  # places gone over in one walk, all its moves together
HOT, COLD = (0.02, 0.1, 0.4), 0.003  # temperatures, in units of a mean task


def improve(search: Search, shop: Workshop) -> None:
    """Walk from the best schedule again and again until ``search`` is done, and offer it what is better."""
    lanes = shop.lanes
    walk = walk_for(lanes, search.budget.seed)
    mean = float((lanes.lane["duration"] * lanes.lane["microbatches"]).sum() / lanes.nodes)
    moves = max(50, MOVES // lanes.nodes)
    rounds = 0
    while not search.done() and (not search.budget.deterministic or rounds < ROUNDS):
        assert search.best is not None
        order, begin = sequences_of(lanes, search.best.schedule)
        walk.order[:] = order
        found = climb(
            lanes,
            shop.room,
            walk,
            begin,
            moves,
            HOT[rounds % len(HOT)] * mean,
            COLD * mean,
            search.objective == "span",
            bool(lanes.lane["useful"].any()),
            bool(lanes.lane["copies"].any()),
        )
        rounds += 1
        if found <= search.value:
            search.offer(schedule_of(shop.problem, lanes, walk.best, begin, f"annealing, walk {rounds}"))


def _genes(shop: Workshop) -> tuple[Floats, Integers]:
    """What would make the schedule in the room again: starts by node, and which backwards are whole."""
    lanes, room = shop.lanes, shop.room
    finish = room.node["finish"]
    starts = finish.astype(np.float64)
    mode = np.zeros(lanes.nodes, np.int64)
    for lane in lanes.lane:
        nodes = slice(int(lane["first"]), int(lane["first"] + lane["microbatches"]))
        starts[nodes] -= lane["duration"]
        if lane["half"] >= 0 and lane["whole"] >= 0:
            first = int(lanes.lane[lane["half"]]["first"])
            whole = finish[nodes] == finish[first : first + int(lane["microbatches"])]
            mode[nodes] = whole
            starts[nodes] -= np.where(whole, lane["whole"] - lane["duration"], 0)
    return starts, mode


def _disturbed(shop: Workshop, random: np.random.Generator, starts: Floats, value: int) -> Floats:
    length = value * float(random.choice((0.05, 0.1, 0.3, 1.0)))
    begin = random.uniform(-length / 2, value - length / 2)
    inside = (starts >= begin) & (starts <= begin + length) & (random.random(len(starts)) < random.choice((0.1, 0.5)))
    noise = random.normal(0.0, float(random.choice((0.5, 2.0, 6.0))) * shop.period / 3, len(starts))
    return np.where(inside, starts + noise, starts)


def _flipped(shop: Workshop, random: np.random.Generator, mode: Integers) -> Integers:
    if not shop.lanes.lane["useful"].any():
        return mode
    flip = random.random(len(mode)) < random.choice((0.0, 0.01, 0.05))
    return np.where(flip, 1 - mode, mode).astype(np.int64)
