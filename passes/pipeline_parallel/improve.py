"""Local search from the best schedule so far: its starts, disturbed, are the priorities of the next list schedule.

Only what starts within a window of time is disturbed, a window that moves over the whole step. That is iterative
flattening's idea with a list scheduler in place of a constraint solver; a schedule that takes as long is accepted, so
that the search drifts over plateaus.
"""

from __future__ import annotations

import numpy as np

from ._lanes import Floats, Integers, schedule_of, sequences_of
from ._play import objective_of, play
from ._progress import Search
from .list_schedule import Rule, Workshop, filled, list_scheduled

__all__ = ["improve"]

ROUNDS = 400  # in deterministic mode, where no clock may end it


def improve(search: Search, shop: Workshop) -> None:
    """Disturb and schedule again until ``search`` is done, and offer it what is better."""
    if search.best is None:
        return
    span = search.objective == "span"
    random = np.random.default_rng(search.budget.seed)
    lanes, room = shop.lanes, shop.room
    play(lanes, room, *sequences_of(lanes, search.best.schedule))
    value = int(objective_of(lanes, room, span))
    starts, mode = _genes(shop)
    rules = filled(shop, Rule("steady"))
    patience = int(lanes.lane["duration"].max())
    rounds = 0
    while not search.done() and (not search.budget.deterministic or rounds < ROUNDS):
        rounds += 1
        wait = int(random.choice((0.0, 0.5, 1.0)) * patience)
        tried_mode = _flipped(shop, random, mode)
        symbols, begin = list_scheduled(
            shop,
            rules._replace(
                priority=_disturbed(shop, random, starts, value),
                patience=np.where(lanes.lane["copies"] > 0, 0, wait),
                mode=tried_mode,
            ),
        )
        found = int(objective_of(lanes, room, span))
        if found <= value:
            starts, mode = _genes(shop)
            if found < value:
                value = found
                search.offer(schedule_of(shop.problem, lanes, symbols, begin, f"local search, round {rounds}"))


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
