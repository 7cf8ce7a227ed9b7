"""What an order costs, compiled by numba: eviction with known future, walked only where a change of order matters.

A walk runs the operators of an order one by one, keeps what fits, and evicts by a rule where it does not; its cost in
bytes is a residency's, so an upper bound on the least additional traffic of the order. A ``Track`` remembers one
order, the state of the scratchpad at every ``STRIDE`` steps, and a hash of that state at each: after a change within
a window, a walk begins a little before it and ends as soon as the state is the remembered one again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._compiled import compiled
from .track import STRIDE, Arrays, Track

__all__ = ["FURTHEST", "IMPOSSIBLE", "LEAST_COST", "place", "walk"]

FURTHEST, LEAST_COST = 0, 1  # which buffer leaves: the one used last, or the cheapest for the room it makes
MANY_USERS = 64  # a buffer with more is taken to be needed soon, as looking for its next use would take too long
IMPOSSIBLE = 1 << 60  # cost of a walk that meets more resident buffers than a track has room to remember


@compiled
def place(arrays: Arrays, track: Track, begin: int, end: int) -> None:
    """Redo indices, steps and operators of the blocks at ``begin`` to ``end`` (exclusive) of the sequence."""
    step = track.start[begin]
    for i in range(begin, end):
        block = track.sequence[i]
        track.rank[block] = i
        track.start[i] = step
        for k in range(arrays.block_begin[block], arrays.block_begin[block + 1]):
            op = arrays.block[k]
            track.order[step] = op
            track.step[op] = step
            step += 1
    track.start[end] = step


@compiled
def _next_use(arrays: Arrays, track: Track, buffer: int, step: int) -> Any:
    """First step behind ``step`` that uses ``buffer``; a large number if none does."""
    begin, end = arrays.use_begin[buffer], arrays.use_begin[buffer + 1]
    if end - begin > MANY_USERS:
        return step + 1
    found = len(track.order)
    for k in range(begin, end):
        at = track.step[arrays.use[k]]
        if step < at < found:
            found = at
    return found


@compiled
def _is_over(arrays: Arrays, track: Track, buffer: int, step: int) -> Any:
    """Whether nothing behind ``step`` uses ``buffer``."""
    for k in range(arrays.use_begin[buffer + 1] - 1, arrays.use_begin[buffer] - 1, -1):
        if track.step[arrays.use[k]] > step:
            return False
    return True


@compiled
def _price(arrays: Arrays, track: Track, buffer: int) -> Any:
    """Bytes that evicting ``buffer`` moves, now or when it is loaded again."""
    return arrays.nbytes[buffer] * (1 if track.backed[buffer] else 2)


@compiled
def _candidates(arrays: Arrays, track: Track, step: int, resident: int) -> Any:
    """Fill ``victims`` and ``due`` with what the operator at ``step`` does not touch; how many they are."""
    op = track.order[step]
    count = 0
    for k in range(resident):
        buffer = track.resident[k]
        touched = False
        for t in range(arrays.touch_begin[op], arrays.touch_begin[op + 1]):
            touched |= arrays.touch[t] == buffer
        if not touched:
            track.victims[count] = buffer
            track.due[count] = _next_use(arrays, track, buffer, step)
            count += 1
    return count


@compiled
def _choose(arrays: Arrays, track: Track, step: int, resident: int, deficit: int, rule: int) -> Any:
    """Put buffers that free ``deficit`` bytes in front of ``victims``; how many they are."""
    candidates = _candidates(arrays, track, step, resident)
    single = -1
    for k in range(candidates):
        if arrays.footprint[track.victims[k]] >= deficit and (
            single < 0 or _price_key(arrays, track, k) < _price_key(arrays, track, single)
        ):
            single = k
    alone = track.victims[single]
    chosen, freed = 0, 0
    while freed < deficit:
        best = chosen
        for k in range(chosen + 1, candidates):
            if _leaves_first(arrays, track, k, best, rule):
                best = k
        track.victims[chosen], track.victims[best] = track.victims[best], track.victims[chosen]
        track.due[chosen], track.due[best] = track.due[best], track.due[chosen]
        freed += arrays.footprint[track.victims[chosen]]
        chosen += 1
    chosen = _pruned(arrays, track, chosen, freed - deficit)
    if rule == LEAST_COST and single >= 0:
        price = 0
        for k in range(chosen):
            price += _price(arrays, track, track.victims[k])
        if _price(arrays, track, alone) <= price:
            track.victims[0] = alone
            return 1
    return chosen


@compiled
def _price_key(arrays: Arrays, track: Track, k: int) -> Any:
    return _price(arrays, track, track.victims[k]), -track.due[k], track.victims[k]


@compiled
def _pruned(arrays: Arrays, track: Track, chosen: int, spare: int) -> Any:
    """Take back victims that later ones made superfluous, the later ones first; how many are left."""
    kept = chosen
    for k in range(chosen - 2, -1, -1):
        buffer = track.victims[k]
        if arrays.footprint[buffer] <= spare:
            spare -= arrays.footprint[buffer]
            kept -= 1
            for other in range(k, kept):
                track.victims[other] = track.victims[other + 1]
    return kept


@compiled
def _leaves_first(arrays: Arrays, track: Track, k: int, other: int, rule: int) -> Any:
    """Whether candidate ``k`` leaves before candidate ``other``."""
    a, b = track.victims[k], track.victims[other]
    if rule == LEAST_COST:
        cost_a = _price(arrays, track, a) / arrays.footprint[a]
        cost_b = _price(arrays, track, b) / arrays.footprint[b]
        if cost_a != cost_b:
            return cost_a < cost_b
    if track.due[k] != track.due[other]:
        return track.due[k] > track.due[other]
    if arrays.footprint[a] != arrays.footprint[b]:
        return arrays.footprint[a] > arrays.footprint[b]
    return a < b


@compiled
def _restore(arrays: Arrays, track: Track, snapshot: int, count: int) -> Any:
    """Make resident what a remembered state holds, ``count`` buffers, and nothing else; their bytes, and the hash."""
    for k in range(track.now[0]):
        track.slot[track.resident[k]] = -1
    used, state = 0, np.uint64(0)
    for k in range(count):
        entry = track.kept[snapshot, k]
        buffer = entry >> 1
        track.resident[k] = buffer
        track.slot[buffer] = k
        track.backed[buffer] = entry & 1
        used += arrays.footprint[buffer]
        state ^= arrays.key[entry]
    track.now[0] = count
    return used, state


@compiled
def _remember(track: Track, step: int, state: int, count: int) -> None:
    track.state[step] = state
    if step % STRIDE == 0:
        track.residents[step // STRIDE] = count
        for k in range(count):
            buffer = track.resident[k]
            track.kept[step // STRIDE, k] = 2 * buffer + track.backed[buffer]


@compiled
def _evict(arrays: Arrays, track: Track, step: int, count: int, deficit: int, rule: int) -> Any:
    """Free ``deficit`` bytes; number of victims, their bytes of room, bytes moved, change of the hash, and a step at
    which one of them is used again.
    """
    victims = _choose(arrays, track, step, count, deficit, rule)
    room, moved, again, change = 0, 0, -1, np.uint64(0)
    for k in range(victims):
        buffer = track.victims[k]
        room += arrays.footprint[buffer]
        moved += _price(arrays, track, buffer)
        again = _next_use(arrays, track, buffer, step)
        change ^= arrays.key[2 * buffer + track.backed[buffer]]
        count -= 1
        last = track.resident[count]
        track.resident[track.slot[buffer]] = last
        track.slot[last] = track.slot[buffer]
        track.slot[buffer] = -1
    return victims, room, moved, change, again


@compiled
def walk(  # noqa: C901 - the loop over steps is one function: handing two dozen arrays on costs more than a step does
    arrays: Arrays, track: Track, first: int, changed: int, rule: int, record: bool
) -> Any:
    """Bytes that the track's order moves, where steps ``first`` to ``changed`` (exclusive) differ from the record.

    Decisions before ``first`` stay as they are. With ``record``, what is met becomes the record; from 0 to the number
    of operators, nothing of an old one is relied on. ``IMPOSSIBLE`` where the track is too small.
    """
    snapshot = first // STRIDE
    count = track.residents[snapshot] if first else 0
    used, state = _restore(arrays, track, snapshot, count)
    total = track.total[0]
    for step in range(snapshot * STRIDE, len(track.order)):
        if step >= changed and state == track.state[step]:
            break
        op = track.order[step]
        begin, end = arrays.touch_begin[op], arrays.touch_begin[op + 1]
        need, moved, fresh = used, 0, 0
        for t in range(begin, end):
            if track.slot[arrays.touch[t]] < 0:
                need += arrays.footprint[arrays.touch[t]]
                fresh += 1
        if count + fresh > len(track.resident):
            total = IMPOSSIBLE
            break
        if record:
            _remember(track, step, state, count)
            track.again[step] = -1
        if need > arrays.capacity:
            victims, room, moved, change, again = _evict(arrays, track, step, count, need - arrays.capacity, rule)
            count, need, state = count - victims, need - room, state ^ change
            if record:
                track.again[step] = again
        total += moved - track.moved[step]
        if record:
            track.moved[step] = moved
        used = need
        for t in range(begin, end):
            buffer = arrays.touch[t]
            if track.slot[buffer] < 0:
                track.resident[count] = buffer
                track.slot[buffer] = count
                track.backed[buffer] = True  # a source, or loaded again; what the operator makes it writes
                count += 1
            else:
                state ^= arrays.key[2 * buffer + track.backed[buffer]]
            if arrays.writes[t]:
                track.backed[buffer] = arrays.final_writer[buffer] == op
            if _is_over(arrays, track, buffer, step):
                used -= arrays.footprint[buffer]
                count -= 1
                track.resident[track.slot[buffer]] = track.resident[count]
                track.slot[track.resident[count]] = track.slot[buffer]
                track.slot[buffer] = -1
            else:
                state ^= arrays.key[2 * buffer + track.backed[buffer]]
    track.now[0] = count
    if record:
        track.total[0] = total
    return total
