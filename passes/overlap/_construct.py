"""List scheduling, compiled by numba: whenever a lane that computes is free, the best task that can start is issued.

Collectives are issued right before the task that is picked next, so that what was issued before has just ended: with
streams, a collective that is issued behind a task waits for it. Only as much is issued as keeps the link busy while the
picked task runs: what is queued on a link cannot be overtaken any more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._compiled import compiled
from ._machine import State, issue, prepared, step
from .arrays import Arrays, Booleans, Integers

__all__ = ["construct"]


class Draft(NamedTuple):
    """What is decided so far: ``order`` and ``waits``; the ``pool`` of tasks that could be issued; ``blocked`` says of
    each task that it did not fit into memory once. ``last`` is, by lane, the last task that is known to be done.
    ``counts``: entries of ``order``, ``waits`` and ``pool``, tasks of ``woken`` that have been seen, bytes promised.
    """

    order: Integers
    waits: Integers
    pool: Integers
    blocked: Booleans
    last: Integers
    counts: Integers
    rank: Integers


@compiled
def _bytes(arrays: Arrays, state: State, task: int) -> Any:
    """Bytes that come to life with ``task``, and with what its mode absorbs."""
    mode = arrays.mode_begin[task] + state.modes[task]
    total = arrays.allocates[task]
    for k in range(arrays.absorbs_begin[mode], arrays.absorbs_begin[mode + 1]):
        total += arrays.allocates[arrays.absorbs[k]]
    return total


@compiled
def _best(arrays: Arrays, state: State, draft: Draft, lane: int, collective: bool, limit: int) -> int:
    """Place in the pool of the task to issue next on ``lane``, -1 if there is none that fits."""
    alive = state.counts[2] + draft.counts[4]
    best = -1
    for k in range(draft.counts[2]):
        task = draft.pool[k]
        if arrays.lane[task] != lane or arrays.collective[task] != collective:
            continue
        if alive + _bytes(arrays, state, task) > limit:
            draft.blocked[task] = True
        elif best < 0 or draft.rank[task] < draft.rank[draft.pool[best]]:
            best = k
    return best


@compiled
def _take(arrays: Arrays, state: State, draft: Draft, k: int, streams: bool) -> None:
    """Issue the task at place ``k`` of the pool, and what its mode absorbs."""
    task = draft.pool[k]
    draft.counts[2] -= 1
    draft.pool[k] = draft.pool[draft.counts[2]]
    if draft.blocked[task]:  # so that it does not start earlier when the order is played: memory was not free before
        for lane in range(len(draft.last)):
            if draft.last[lane] >= 0 and lane != arrays.lane[task]:
                draft.waits[draft.counts[1]] = draft.last[lane], task
                draft.counts[1] += 1
    draft.order[draft.counts[0]] = task
    draft.counts[0] += 1
    issue(arrays, state, task, streams)
    mode = arrays.mode_begin[task] + state.modes[task]
    for k in range(arrays.absorbs_begin[mode], arrays.absorbs_begin[mode + 1]):
        draft.order[draft.counts[0]] = arrays.absorbs[k]
        draft.counts[0] += 1


@compiled
def _promise(arrays: Arrays, state: State, draft: Draft) -> None:
    """Count the bytes of what is issued and has not started yet."""
    draft.counts[4] = 0
    for lane in range(len(state.head)):
        for k in range(state.head[lane], state.tail[lane]):
            draft.counts[4] += _bytes(arrays, state, state.queue[lane, k])


@compiled
def _communicate(arrays: Arrays, state: State, draft: Draft, horizon: float, limit: int, streams: bool) -> None:
    """Issue collectives while what is queued on their link takes no longer than ``horizon``."""
    for lane in range(len(state.head)):
        backlog = state.left[lane] if state.running[lane] >= 0 else 0.0
        for k in range(state.head[lane], state.tail[lane]):
            task = state.queue[lane, k]
            backlog += arrays.seconds[arrays.mode_begin[task] + state.modes[task]]
        while backlog <= horizon:
            k = _best(arrays, state, draft, lane, True, limit)
            if k < 0:
                break
            task = draft.pool[k]
            backlog += arrays.seconds[arrays.mode_begin[task] + state.modes[task]]
            _take(arrays, state, draft, k, streams)
            _promise(arrays, state, draft)


@compiled
def _compute(arrays: Arrays, state: State, draft: Draft, ahead: float, limit: int, streams: bool) -> None:
    """Issue a task on every free lane that computes, and collectives before it."""
    busy = False
    for lane in range(len(state.head)):
        if not arrays.computes[lane]:
            continue
        if state.running[lane] >= 0 or state.head[lane] < state.tail[lane]:
            busy = True
            continue
        k = _best(arrays, state, draft, lane, False, limit)
        if k < 0:
            continue
        task = draft.pool[k]
        seconds = arrays.seconds[arrays.mode_begin[task] + state.modes[task]]
        _communicate(arrays, state, draft, ahead * seconds, limit, streams)
        k = _best(arrays, state, draft, lane, False, limit)  # what was issued takes memory, too
        if k >= 0:
            _take(arrays, state, draft, k, streams)
            _promise(arrays, state, draft)
            busy = True
    if not (busy and streams):
        _communicate(arrays, state, draft, 0.0, limit, streams)


@compiled
def construct(
    arrays: Arrays, modes: Integers, rank: Integers, limit: int, ahead: float, streams: bool
) -> tuple[Integers, Any, bool]:
    """Order of issue and waits for memory, and whether all tasks fit within ``limit`` bytes; lower ``rank`` first."""
    n = len(modes)
    state, _ = prepared(arrays, modes, np.empty((0, 2), np.int64))
    lanes = len(arrays.computes)
    draft = Draft(
        np.empty(n, np.int64),
        np.empty((n * lanes, 2), np.int64),
        np.empty(n, np.int64),
        np.zeros(n, np.bool_),
        np.full(lanes, -1),
        np.zeros(5, np.int64),
        rank,
    )
    while draft.counts[0] < n:
        while draft.counts[3] < state.counts[4]:
            draft.pool[draft.counts[2]] = state.woken[draft.counts[3]]
            draft.counts[2] += 1
            draft.counts[3] += 1
        _promise(arrays, state, draft)
        _compute(arrays, state, draft, ahead, limit, streams)
        running = state.running.copy()
        begun = state.head.copy()
        if not step(arrays, state):
            break
        for lane in range(lanes):
            task = running[lane] if running[lane] >= 0 else -1
            if task < 0 and state.head[lane] > begun[lane]:
                task = state.queue[lane, begun[lane]]
            if task >= 0 and state.finish[task] < np.inf:
                draft.last[lane] = task
    return draft.order[: draft.counts[0]], draft.waits[: draft.counts[1]], draft.counts[0] == n
