"""Simulated annealing on the orders of ranks, compiled by numba: an action moves, or a backward is split or joined.

Most moves are of actions on the critical path; no other single move makes the step shorter. An order keeps one place
for each task: next to B is a place for nothing, ``NOTHING``, where W is when it is split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._bare import bare
from ._lanes import Floats, Integers, Lanes
from ._play import Room, objective_of, play

__all__ = ["NOTHING", "Walk", "climb", "walk_for"]

NOTHING = -1
ON_PATH = 0.7  # share of moves that begin on the critical path
FLIPS = 0.15  # share of moves that split or join, where B is any use
NEAR = 3.0  # mean distance of moves
SPREAD = 0.05  # weight of the mean end of ranks beside the objective


class Walk(NamedTuple):
    """Where ``climb`` works: the ``order`` now and the ``best``, with a copy to go ``back`` to.

    ``place`` is, by node, where it is done; ``path`` lists the places on the critical path, ``counts`` their number.
    ``microbatch`` is, by place, the number in its route; ``done`` room for counting lanes, ``seed`` the state of the
    random numbers, ``least`` the energy of the best.
    """

    order: Integers
    best: Integers
    back: Integers
    microbatch: Integers
    place: Integers
    path: Integers
    counts: Integers
    done: Integers
    seed: Any
    least: Floats


def walk_for(lanes: Lanes, seed: int) -> Walk:
    """Room for walks over orders of the problem."""
    nodes = lanes.nodes

    def zeros(number: int = nodes) -> Integers:
        return np.zeros(number, np.int64)

    return Walk(
        order=zeros(),
        best=zeros(),
        back=zeros(),
        microbatch=zeros(),
        place=zeros(),
        path=zeros(),
        counts=zeros(1),
        done=zeros(2 * len(lanes.lane)),
        seed=np.array([(seed * 0x9E3779B97F4A7C15 + 0x1234567) % (1 << 64) or 1], np.uint64),
        least=np.full(1, np.inf),
    )


@bare
def _random(state: Any) -> Any:
    """Uniform in [0, 1): xorshift64*, whose state is the only element of ``state``."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return ((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@bare
def _energy(lanes: Lanes, room: Room, span: bool) -> Any:
    """The objective, and a little of how early ranks end."""
    ranks = len(lanes.limit)
    total = 0
    for rank in range(ranks):
        total += room.rank[rank].last
    return objective_of(lanes, room, span) + SPREAD * total / ranks


@bare
def _keeps(lanes: Lanes, walk: Walk, begin: int, end: int) -> Any:
    """Whether the order of one rank keeps what can be seen from there: its limit, and what follows what on it."""
    width = len(lanes.lane)
    walk.done[:] = 0
    held = 0
    for k in range(begin, end):
        symbol = walk.order[k]
        if symbol < 0:
            continue
        number = symbol % width
        lane = lanes.lane[number]
        if lane.whole < 0:
            if walk.done[width + number] <= walk.done[number]:
                return False
        else:
            for edge in range(lane.before, lane.before_end):
                before = lanes.edges[edge].lane
                if lanes.lane[before].rank == lane.rank and walk.done[before] <= walk.done[number]:
                    return False
        walk.done[number] += 1
        if symbol >= width:
            held -= lane.frees - lane.allocates + lanes.lane[lane.half].frees
            continue
        if lane.half >= 0 and lane.whole >= 0:
            walk.done[width + lane.half] += 1  # its W may come
        held += lane.allocates
        if held > lanes.limit[lane.rank]:
            return False
        held -= lane.frees
    return True


@bare
def _copy(source: Integers, target: Integers, begin: int, end: int) -> None:
    for k in range(begin, end):
        target[k] = source[k]


@bare
def _shift(order: Integers, source: int, target: int) -> None:
    symbol = order[source]
    way = 1 if target > source else -1
    for k in range(source, target, way):
        order[k] = order[k + way]
    order[target] = symbol


@bare
def _flip(lanes: Lanes, walk: Walk, place: int, begin: int, end: int) -> Any:
    """Split the B at ``place``, or join the I there with the next W of its stage; says whether there was one."""
    width = len(lanes.lane)
    symbol = walk.order[place]
    if symbol < 0 or lanes.lane[symbol % width].half < 0 or lanes.lane[symbol % width].whole < 0:
        return False
    half = lanes.lane[symbol % width].half
    if symbol >= width:
        for k in range(begin, end):
            if walk.order[k] == NOTHING:
                walk.order[place], walk.order[k] = symbol - width, half
                if k < place:
                    _shift(walk.order, k, place)
                else:
                    _shift(walk.order, k, min(end - 1, place + 1 + int(_random(walk.seed) * 8)))
                return True
        return False
    for k in range(place + 1, end):
        if walk.order[k] == half:
            walk.order[place], walk.order[k] = symbol + width, NOTHING
            return True
    return False


@bare
def _owner(begin: Integers, place: int) -> Any:
    """The rank in whose order ``place`` is."""
    low, high = 0, len(begin) - 2
    while low < high:
        middle = (low + high + 1) // 2
        if begin[middle] <= place:
            low = middle
        else:
            high = middle - 1
    return low


@bare
def _note_path(lanes: Lanes, room: Room, walk: Walk, begin: Integers) -> None:
    """List the places on a path that the last end hangs on; the room is that of the order now."""
    width = len(lanes.lane)
    walk.done[:] = 0
    place, latest = -1, -1
    for rank in range(len(lanes.limit)):
        for k in range(begin[rank], begin[rank + 1]):
            if walk.order[k] >= 0:
                _note_place(lanes, room, walk, k)
        for k in range(begin[rank + 1] - 1, begin[rank] - 1, -1):
            if walk.order[k] >= 0:
                if room.rank[rank].last > latest:
                    latest, place = room.rank[rank].last, k
                break
    count = 0
    while place >= 0:
        walk.path[count] = place
        count += 1
        place = _cause(lanes, room, walk, begin, place, width)
    walk.counts[0] = count


@bare
def _note_place(lanes: Lanes, room: Room, walk: Walk, place: int) -> None:
    width = len(lanes.lane)
    symbol = walk.order[place]
    number = symbol % width
    lane = lanes.lane[number]
    index = walk.done[number]
    walk.done[number] += 1
    if lane.whole < 0:
        index = room.node[lane.first + index].queue
    walk.place[lane.first + index] = place
    walk.microbatch[place] = index
    if symbol >= width:
        walk.place[lanes.lane[lane.half].first + index] = place


@bare
def _cause(lanes: Lanes, room: Room, walk: Walk, begin: Integers, place: int, width: int) -> Any:
    """The place of what the action at ``place`` started right behind; -1 at the start of the step."""
    symbol, index, start = walk.order[place], walk.microbatch[place], room.start[place]
    if start == 0:
        return -1
    for half in range(2):
        number = symbol % width if half == 0 else lanes.lane[symbol % width].half
        if half == 1 and symbol < width:
            break
        for edge in range(lanes.lane[number].before, lanes.lane[number].before_end):
            node = lanes.lane[lanes.edges[edge].lane].first + index
            if walk.place[node] != place and room.node[node].finish + lanes.edges[edge].lag == start:
                return walk.place[node]
    first = begin[_owner(begin, place)]
    place -= 1
    while place >= first and walk.order[place] < 0:
        place -= 1
    return place if place >= first else -1


@bare
def _move(lanes: Lanes, walk: Walk, begin: Integers, useful: bool) -> Any:
    """Change the order at one place; returns the rank, -1 if nothing has changed."""
    if _random(walk.seed) < ON_PATH and walk.counts[0] > 0:
        place = walk.path[int(_random(walk.seed) * walk.counts[0])]
    else:
        place = int(_random(walk.seed) * len(walk.order))
    rank = _owner(begin, place)
    first, end = begin[rank], begin[rank + 1]
    if useful and _random(walk.seed) < FLIPS:
        return rank if _flip(lanes, walk, place, first, end) else -1
    distance = 1 + int(-NEAR * np.log(1.0 - _random(walk.seed)))
    target = place + distance if _random(walk.seed) < 0.5 else place - distance
    target = min(max(target, first), end - 1)
    if walk.order[target] == walk.order[place]:
        return -1
    _shift(walk.order, place, target)
    return rank


@bare
def climb(
    lanes: Lanes,
    room: Room,
    walk: Walk,
    begin: Integers,
    moves: int,
    temperature: float,
    cooling: float,
    span: bool,
    useful: bool,
    copies: bool,
) -> Any:
    """Go on annealing ``walk.order`` by ``moves`` moves, each ``cooling`` times as hot as the one before it.

    The order is one that keeps the limit. The best goes to ``walk.best``, its energy to ``walk.least``, which is
    infinite for a new walk. Returns the temperature.
    """
    play(lanes, room, walk.order, begin)
    energy = _energy(lanes, room, span)
    _note_best(walk, energy)
    _copy(walk.order, walk.back, 0, len(walk.order))
    _note_path(lanes, room, walk, begin)
    for _ in range(moves):
        temperature *= cooling
        rank = _move(lanes, walk, begin, useful)
        if rank < 0:
            continue
        first, end = begin[rank], begin[rank + 1]
        tried = np.inf
        if (copies or _keeps(lanes, walk, first, end)) and play(lanes, room, walk.order, begin) <= 0:
            tried = _energy(lanes, room, span)
        if tried > energy and _random(walk.seed) >= np.exp((energy - tried) / temperature):
            _copy(walk.back, walk.order, first, end)
            continue
        energy = tried
        _copy(walk.order, walk.back, first, end)
        _note_path(lanes, room, walk, begin)
        _note_best(walk, energy)
    return temperature


@bare
def _note_best(walk: Walk, energy: float) -> None:
    if energy < walk.least[0]:
        walk.least[0] = energy
        _copy(walk.order, walk.best, 0, len(walk.order))
