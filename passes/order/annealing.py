"""Simulated annealing on an order of blocks, compiled by numba.

A move changes a short stretch of the sequence: two neighbouring parts of it change places where no dependency
forbids that, or its last block moves to its front with all it depends on, or its first to its end likewise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._compiled import compiled
from .track import Arrays, Integers, Track
from .walk import place, walk

__all__ = ["anneal"]

EXCHANGES = 0.25  # share of moves that exchange two stretches; others move a block with what it hangs on
LONGEST_PULL = 64  # blocks that the latter move by, at most
LONGEST = 24  # blocks of the stretch that is picked; the one it changes places with may be longer
AIMED = 0.7  # share of moves that begin where something is evicted or used again
FURTHEST_MOVE = 512  # blocks that a stretch may move by
REFRESH = 256  # accepted moves after which every eviction is decided anew
LOOK_BACK = 40  # steps before a move from which evictions are decided anew, at most


@compiled
def _random(seed: NDArray[np.uint64]) -> Any:
    """Uniform in [0, 1): xorshift64*, whose state is ``seed``."""
    x = seed[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    seed[0] = x
    return ((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@compiled
def _rotate(track: Track, begin: int, middle: int, end: int, before: Integers) -> None:
    """Exchange the stretches ``begin`` to ``middle`` and ``middle`` to ``end``, which was ``before``."""
    for k in range(end - begin):
        track.sequence[begin + k] = before[(k + middle - begin) % (end - begin)]


@compiled
def _pull(arrays: Arrays, track: Track, begin: int, end: int, before: Integers, chosen: NDArray[np.bool_]) -> None:
    """Move the last block of ``begin`` to ``end``, and what it depends on there, to the front of that stretch."""
    front = 0
    for i in range(end - 1, begin - 1, -1):
        block = before[i - begin]
        chosen[block] = i == end - 1
        for k in range(arrays.after_begin[block], arrays.after_begin[block + 1]):
            after = arrays.after[k]
            if i < track.rank[after] < end and chosen[after]:
                chosen[block] = True
        front += chosen[block]
    _part(track, begin, end, before, chosen, front)


@compiled
def _push(arrays: Arrays, track: Track, begin: int, end: int, before: Integers, chosen: NDArray[np.bool_]) -> None:
    """Move the first block of ``begin`` to ``end``, and what depends on it there, to the end of that stretch."""
    front = 0
    for i in range(begin, end):
        block = before[i - begin]
        chosen[block] = i != begin
        for k in range(arrays.before_begin[block], arrays.before_begin[block + 1]):
            earlier = arrays.before[k]
            if begin <= track.rank[earlier] < i and not chosen[earlier]:
                chosen[block] = False
        front += chosen[block]
    _part(track, begin, end, before, chosen, front)


@compiled
def _part(track: Track, begin: int, end: int, before: Integers, chosen: NDArray[np.bool_], front: int) -> None:
    """The ``front`` blocks that are ``chosen`` first, then the others, both in the order they had."""
    first, second = begin, begin + front
    for k in range(end - begin):
        if chosen[before[k]]:
            track.sequence[first] = before[k]
            first += 1
        else:
            track.sequence[second] = before[k]
            second += 1


@compiled
def _earliest(arrays: Arrays, track: Track, begin: int, end: int) -> Any:
    """Lowest index to which the blocks at ``begin`` to ``end`` could move together."""
    lowest = 0
    for i in range(begin, end):
        block = track.sequence[i]
        for k in range(arrays.before_begin[block], arrays.before_begin[block + 1]):
            at = track.rank[arrays.before[k]]
            if at < begin and at >= lowest:
                lowest = at + 1
    return lowest


@compiled
def _latest(arrays: Arrays, track: Track, begin: int, end: int) -> Any:
    """Highest index at which the stretch ``begin`` to ``end`` could end."""
    highest = len(track.sequence)
    for i in range(begin, end):
        block = track.sequence[i]
        for k in range(arrays.after_begin[block], arrays.after_begin[block + 1]):
            at = track.rank[arrays.after[k]]
            if at >= end and at < highest:
                highest = at
    return highest


@compiled
def _evictions(track: Track, events: Integers) -> Any:
    """Fill ``events`` with the steps before which something is evicted; how many they are."""
    count = 0
    for step in range(len(track.order)):
        if track.moved[step]:
            events[count] = step
            count += 1
    return count


@compiled
def _aim(arrays: Arrays, track: Track, events: Integers, count: int, seed: NDArray[np.uint64]) -> Any:
    """Index of a block at which a move may begin."""
    if not count or _random(seed) > AIMED:
        return int(_random(seed) * len(track.sequence))
    step = events[int(_random(seed) * count)]
    side = _random(seed)
    if track.again[step] < 0:
        side = 1.0  # nothing is evicted there since the list was made
    if side < 0.6:
        step += int((track.again[step] - step) * _random(seed))
    elif side < 0.8:
        step = track.again[step]
    else:
        step = max(0, step - int(_random(seed) * LOOK_BACK))
    return track.rank[arrays.block_of[track.order[step]]]


@compiled
def _exchange(arrays: Arrays, track: Track, begin: int, seed: NDArray[np.uint64]) -> Any:
    """Bounds of two neighbouring stretches that may change places, one of them beginning at ``begin``.

    First index, index of the second stretch, index behind it; the first two are equal where nothing can move.
    """
    longest = min(LONGEST, len(track.sequence) - begin)
    end = begin + min(longest, int(math.exp(_random(seed) * math.log(longest + 1.0))))
    if _random(seed) < 0.5:
        span = min(FURTHEST_MOVE, begin - _earliest(arrays, track, begin, end))
        return begin - min(span, 1 + int(span * _random(seed) ** 2)), begin, end
    span = min(FURTHEST_MOVE, _latest(arrays, track, begin, end) - end)
    return begin, (end if span else begin), end + min(span, 1 + int(span * _random(seed) ** 2))


@compiled
def _change(
    arrays: Arrays, track: Track, at: int, seed: NDArray[np.uint64], before: Integers, chosen: NDArray[np.bool_]
) -> Any:
    """Rearrange blocks near index ``at``; bounds of the stretch, which ends in ``before`` as it was."""
    blocks = len(track.sequence)
    kind = _random(seed)
    reach = 1 + int(math.exp(_random(seed) * math.log(float(LONGEST_PULL))))
    if kind < EXCHANGES:
        first, middle, last = _exchange(arrays, track, at, seed)
        if first == middle:
            last = first
    elif kind < (1.0 + EXCHANGES) / 2.0:
        first, last = max(0, at - reach), at + 1
    else:
        first, last = at, min(blocks, at + 1 + reach)
    for k in range(first, last):
        before[k - first] = track.sequence[k]
    if kind < EXCHANGES:
        _rotate(track, first, middle, last, before)
    elif kind < (1.0 + EXCHANGES) / 2.0:
        _pull(arrays, track, first, last, before, chosen)
    else:
        _push(arrays, track, first, last, before, chosen)
    return first, last


@compiled
def anneal(
    arrays: Arrays,
    track: Track,
    seed: NDArray[np.uint64],
    moves: int,
    hot: float,
    cold: float,
    rule: int,
    best: Integers,
    control: Integers,
) -> None:
    """Try ``moves`` moves while the temperature, in bytes, falls from ``hot`` to ``cold``.

    The track must have been recorded, and ends recorded. ``control[0]`` is the least cost met, ``best`` its sequence;
    both are replaced by what is better. Before an order counts as better its evictions are decided anew from the first
    step on, so that the cost is that of the sequence alone; long orders are not looked at that closely every time. The
    search ends early at a cost of ``control[1]`` or less.
    """
    operators = len(track.order)
    patience = 1 + operators // 1024
    before = np.empty(len(track.sequence), np.int64)
    chosen = np.zeros(len(track.sequence), np.bool_)
    events = np.empty(operators, np.int64)
    count = _evictions(track, events)
    accepted = listed = decided = 0
    for move in range(moves):
        if control[0] <= control[1]:
            return
        at = _aim(arrays, track, events, count, seed)
        first, last = _change(arrays, track, at, seed, before, chosen)
        if first == last:
            continue
        limit = track.total[0] - hot * (cold / hot) ** (move / moves) * math.log(1.0 - _random(seed))
        place(arrays, track, first, last)
        begin, end = max(0, track.start[first] - int(LOOK_BACK * _random(seed))), track.start[last]
        for record in range(2):  # one place that calls ``walk``: every place makes compiling it longer
            cost = walk(arrays, track, begin, end, rule, record > 0)
            if cost > limit and not record:
                track.sequence[first:last] = before[: last - first]
                place(arrays, track, first, last)
                end = 0  # nothing was decided anew
                break
            accepted += 1 - record
            if accepted >= decided + (patience if cost < control[0] else REFRESH * patience):
                begin, end, decided = 0, operators, accepted
        if end == operators and begin == 0 and track.total[0] < control[0]:
            control[0] = track.total[0]
            best[:] = track.sequence
        if accepted >= listed + patience:
            count, listed = _evictions(track, events), accepted
