"""Local search on an order and its modes, compiled by numba: one task moves, or one collective changes its mode."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._compiled import compiled
from ._machine import RIGHT, play, prepared
from .arrays import Arrays, Integers

__all__ = ["climb"]

MODE_MOVES = 0.2  # share of moves that change a mode, where any collective has more than one
NEAR = 12  # places that most moves stay within
FAR = 0.2  # share of moves that may go anywhere


@compiled
def _random(state: NDArray[np.uint64]) -> Any:
    """Uniform in [0, 1): xorshift64*, whose state is the only element of ``state``."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return ((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@compiled
def _shift(order: Integers, position: Integers, source: int, target: int) -> None:
    """Move the task at place ``source`` to ``target``; those between move by one."""
    task = order[source]
    way = 1 if target > source else -1
    for k in range(source, target, way):
        order[k] = order[k + way]
        position[order[k]] = k
    order[target] = task
    position[task] = target


@compiled
def _range(edges: Integers, begin: Integers, index: Integers, position: Integers, task: int) -> Any:
    """First and last place in the order that ``task`` may have, everything else staying as it is."""
    low, high = 0, len(position) - 1
    for k in range(begin[task], begin[task + 1]):
        first, then = edges[index[k], 0], edges[index[k], 1]
        if then == task:
            low = max(low, position[first] + 1)
        else:
            high = min(high, position[then] - 1)
    return low, high


@compiled
def _incident(edges: Integers, count: int) -> Any:
    """By task, the edges that it begins or ends: where they begin in a list, and the list."""
    begin = np.zeros(count + 1, np.int64)
    for k in range(len(edges)):
        begin[edges[k, 0] + 1] += 1
        begin[edges[k, 1] + 1] += 1
    for i in range(count):
        begin[i + 1] += begin[i]
    cursor, index = begin[:-1].copy(), np.empty(2 * len(edges), np.int64)
    for k in range(len(edges)):
        for end in range(2):
            index[cursor[edges[k, end]]] = k
            cursor[edges[k, end]] += 1
    return begin, index


@compiled
def climb(
    arrays: Arrays, order: Integers, modes: Integers, waits: Integers, streams: bool, limit: int, tries: int, seed: int
) -> Any:
    """The best order and modes after ``tries`` moves, none of which made it slower or broke ``limit``; its seconds."""
    order, modes, n = order.copy(), modes.copy(), len(order)
    position = np.empty(n, np.int64)
    for k in range(n):
        position[order[k]] = k
    choosing = np.array([i for i in range(n) if arrays.mode_begin[i + 1] - arrays.mode_begin[i] > 1], np.int64)
    _, edges = prepared(arrays, modes, waits)
    begin, index = _incident(edges, n)
    best = play(arrays, order, modes, waits, streams)[1]
    state = np.array([seed * 2 + 1], np.uint64)
    for _ in range(tries):
        if len(choosing) > 0 and _random(state) < MODE_MOVES:
            task = choosing[int(_random(state) * len(choosing))]
            old = modes[task]
            modes[task] = int(_random(state) * (arrays.mode_begin[task + 1] - arrays.mode_begin[task]))
            if modes[task] == old:
                continue
            code, seconds, peak, _, _, _ = play(arrays, order, modes, waits, streams)
            if code == RIGHT and seconds <= best and peak <= limit:
                best = seconds
                _, edges = prepared(arrays, modes, waits)
                begin, index = _incident(edges, n)
            else:
                modes[task] = old
            continue
        source = int(_random(state) * n)
        low, high = _range(edges, begin, index, position, order[source])
        if _random(state) >= FAR:
            low, high = max(low, source - NEAR), min(high, source + NEAR)
        target = low + int(_random(state) * (high - low + 1))
        if target == source or high < low:
            continue
        _shift(order, position, source, target)
        code, seconds, peak, _, _, _ = play(arrays, order, modes, waits, streams)
        if code == RIGHT and seconds <= best and peak <= limit:
            best = seconds
        else:
            _shift(order, position, target, source)
    return order, modes, best
