"""The machine that runs an overlap problem's tasks, compiled by numba: lanes, shared resources, launches, memory.

Time goes from event to event: a task starts, or is done. Between two events every running task goes on at one rate.
The rules are those of `simulate`; tasks are handed over one by one by `issue`, before the time or as time goes on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._compiled import compiled
from .arrays import Arrays, Floats, Integers

__all__ = ["State", "issue", "play", "prepared", "step"]

RIGHT, BEFORE_OPERAND, ABSORBED_WRONGLY, STUCK = range(4)


class State(NamedTuple):
    """What changes while time goes on.

    By task: ``waiting`` counts what it still waits for, it starts at ``ready`` at the earliest, ``owner`` is the
    collective whose mode absorbs it (-1: none), ``place`` the lane it is done on, ``turn`` its place in the order,
    ``users`` count who still frees it, ``stream`` holds by lane the last task there that it waits for because of
    streams (-1: none); ``held`` is what the next task of each lane will get there. By lane: the ``queue`` of issued
    tasks from ``head`` to ``tail``, the ``latest`` task in it that is no collective, the ``running`` task (-1: none),
    what is ``left`` of it, its ``rate``, and when it is ``done``. By resource: what running tasks of ``fixed`` modes
    need, the ``demand`` of the others, and what is ``free`` for these. ``moment`` is the time now; ``counts``: launches
    issued, tasks done, bytes alive, most bytes alive, tasks woken. ``woken`` are the tasks that wait for none any more,
    ``stack`` is room for those that are done at once.
    """

    modes: Integers
    behind_begin: Integers
    behind: Integers
    waiting: Integers
    ready: Floats
    owner: Integers
    place: Integers
    turn: Integers
    users: Integers
    stream: Integers
    held: Integers
    start: Floats
    finish: Floats
    queue: Integers
    head: Integers
    tail: Integers
    latest: Integers
    running: Integers
    left: Floats
    rate: Floats
    done: Floats
    fixed: Floats
    demand: Floats
    free: Floats
    moment: Floats
    counts: Integers
    woken: Integers
    stack: Integers


@compiled
def _owners(arrays: Arrays, modes: Integers) -> Any:
    """The collective that absorbs each task, -1 for none; -2 in the place of one that is absorbed wrongly."""
    owner = np.full(len(modes), -1)
    for i in range(len(modes)):
        mode = arrays.mode_begin[i] + modes[i]
        for k in range(arrays.absorbs_begin[mode], arrays.absorbs_begin[mode + 1]):
            task = arrays.absorbs[k]
            if owner[task] != -1 or arrays.collective[task]:
                owner[task] = -2
            else:
                owner[task] = i
    return owner


@compiled
def _edges(arrays: Arrays, owner: Integers, waits: Integers) -> Any:
    """Pairs (first, then): data, ``waits``, and what the absorbed tasks of a collective need from others."""
    count = len(waits)
    for i in range(len(owner)):
        size = arrays.before_begin[i + 1] - arrays.before_begin[i]
        count += size + (size if owner[i] >= 0 else 0)
    edges = np.empty((count, 2), np.int64)
    edges[: len(waits)] = waits
    k = len(waits)
    for i in range(len(owner)):
        for b in range(arrays.before_begin[i], arrays.before_begin[i + 1]):
            first = arrays.before[b]
            edges[k] = first, i
            k += 1
            if owner[i] >= 0 and first != owner[i] and owner[first] != owner[i]:
                edges[k] = first, owner[i]
                k += 1
    return edges[:k]


@compiled
def prepared(arrays: Arrays, modes: Integers, waits: Integers) -> Any:
    """Time zero, with nothing issued, and the pairs of tasks (first, then) that wait."""
    n, lanes = len(modes), len(arrays.computes)
    owner = _owners(arrays, modes)
    edges = _edges(arrays, owner, waits)
    begin = np.zeros(n + 1, np.int64)
    waiting = np.zeros(n, np.int64)
    for k in range(len(edges)):
        begin[edges[k, 0] + 1] += 1
        waiting[edges[k, 1]] += 1
    for i in range(n):
        begin[i + 1] += begin[i]
    cursor, behind = begin[:-1].copy(), np.empty(len(edges), np.int64)
    for k in range(len(edges)):
        behind[cursor[edges[k, 0]]] = edges[k, 1]
        cursor[edges[k, 0]] += 1
    users = np.zeros(n, np.int64)
    for k in range(len(arrays.frees)):
        users[arrays.frees[k]] += 1
    place = arrays.lane.copy()
    for i in range(n):
        if owner[i] >= 0:
            place[i] = arrays.lane[owner[i]]
    state = State(
        modes,
        begin,
        behind,
        waiting,
        np.zeros(n),
        owner,
        place,
        np.zeros(n, np.int64),
        users,
        np.full((n, lanes), -1),
        np.full((lanes, lanes), -1),
        np.full(n, np.inf),
        np.full(n, np.inf),
        np.empty((lanes, n), np.int64),
        np.zeros(lanes, np.int64),
        np.zeros(lanes, np.int64),
        np.full(lanes, -1),
        np.full(lanes, -1),
        np.zeros(lanes),
        np.zeros(lanes),
        np.zeros(lanes),
        np.zeros(arrays.needs.shape[1]),
        np.zeros(arrays.needs.shape[1]),
        np.zeros(arrays.needs.shape[1]),
        np.zeros(1),
        np.zeros(5, np.int64),
        np.empty(n, np.int64),
        np.empty(n, np.int64),
    )
    for i in range(n):
        if waiting[i] == 0 and owner[i] < 0:
            state.woken[state.counts[4]] = i
            state.counts[4] += 1
    return state, edges


@compiled
def _order_streams(arrays: Arrays, state: State, task: int) -> None:
    """What ``task`` waits for, and makes others wait for, because it is started from the stream that computes."""
    lane = arrays.lane[task]
    if not arrays.collective[task]:
        state.latest[lane] = task
        state.stream[task] = state.held[lane]
        state.held[lane] = -1
        return
    state.stream[task] = state.latest
    for k in range(arrays.before_begin[task], arrays.before_begin[task + 1]):
        first = arrays.before[k] if state.owner[arrays.before[k]] < 0 else state.owner[arrays.before[k]]
        link = arrays.lane[first]
        if arrays.collective[first]:
            for other in range(len(arrays.computes)):
                known = state.held[other, link]
                if arrays.computes[other] and (known < 0 or state.turn[first] > state.turn[known]):
                    state.held[other, link] = first


@compiled
def issue(arrays: Arrays, state: State, task: int, streams: bool) -> None:
    """Hand ``task`` to its lane; what is absorbed has none."""
    if state.owner[task] >= 0:
        return
    lane = arrays.lane[task]
    state.ready[task] = max(state.ready[task], state.counts[0] * arrays.costs[0])
    state.counts[0] += arrays.launches[task]
    state.turn[task] = state.tail.sum()
    if streams:
        _order_streams(arrays, state, task)
    state.queue[lane, state.tail[lane]] = task
    state.tail[lane] += 1


@compiled
def _when(arrays: Arrays, state: State, task: int) -> Any:
    """When an issued task may start as far as its lane is free; infinity while it waits for one that is not done."""
    if state.waiting[task] > 0:
        return np.inf
    moment = state.ready[task]
    for lane in range(len(arrays.computes)):
        other = state.stream[task, lane]
        if other >= 0:
            cost = arrays.costs[1] if lane != arrays.lane[task] else 0.0
            moment = max(moment, state.finish[other] + cost)
    return moment


@compiled
def _begin(arrays: Arrays, state: State, lane: int) -> None:
    """Start the first task of ``lane``'s queue now; what it absorbs gets its bytes now, too."""
    task = state.queue[lane, state.head[lane]]
    state.head[lane] += 1
    mode = arrays.mode_begin[task] + state.modes[task]
    state.running[lane] = task
    state.left[lane] = arrays.seconds[mode]
    state.start[task] = state.moment[0]
    state.counts[2] += arrays.allocates[task]
    for k in range(arrays.absorbs_begin[mode], arrays.absorbs_begin[mode + 1]):
        state.counts[2] += arrays.allocates[arrays.absorbs[k]]
    state.counts[3] = max(state.counts[3], state.counts[2])


@compiled
def _end(arrays: Arrays, state: State, task: int) -> None:
    """``task`` is done now, and so is what its mode absorbs: free bytes, and tell those that wait."""
    state.stack[0] = task
    depth = 1
    while depth > 0:
        depth -= 1
        i = state.stack[depth]
        state.finish[i] = state.moment[0]
        state.counts[1] += 1
        for k in range(arrays.frees_begin[i], arrays.frees_begin[i + 1]):
            freed = arrays.frees[k]
            state.users[freed] -= 1
            if state.users[freed] == 0:
                state.counts[2] -= arrays.allocates[freed]
        for k in range(state.behind_begin[i], state.behind_begin[i + 1]):
            after = state.behind[k]
            cost = arrays.costs[1] if state.place[after] != state.place[i] else 0.0
            state.ready[after] = max(state.ready[after], state.moment[0] + cost)
            state.waiting[after] -= 1
            if state.waiting[after] > 0:
                continue
            if state.owner[after] >= 0:
                state.start[after] = state.moment[0]
                state.stack[depth] = after
                depth += 1
            else:
                state.woken[state.counts[4]] = after
                state.counts[4] += 1


@compiled
def _add_needs(arrays: Arrays, state: State) -> None:
    """What all running tasks of fixed modes need at full speed, and all others."""
    for r in range(arrays.needs.shape[1]):
        state.fixed[r], state.free[r], state.demand[r] = 0.0, 1.0, 0.0
    for lane in range(len(state.running)):
        if state.running[lane] >= 0:
            mode = arrays.mode_begin[state.running[lane]] + state.modes[state.running[lane]]
            for r in range(arrays.needs.shape[1]):
                if arrays.fixed[mode]:
                    state.fixed[r] += arrays.needs[mode, r]
                else:
                    state.demand[r] += arrays.needs[mode, r]


@compiled
def _set_rates(arrays: Arrays, state: State) -> None:
    """What is fixed takes its needs first, in proportion where that is too much; the others share what is left."""
    _add_needs(arrays, state)
    for turn in range(2):
        for lane in range(len(state.running)):
            mode = arrays.mode_begin[state.running[lane]] + state.modes[state.running[lane]]
            if state.running[lane] < 0 or arrays.fixed[mode] != (turn == 0):
                continue
            rate = 1.0
            for r in range(arrays.needs.shape[1]):
                total, room = (state.fixed[r], 1.0) if turn == 0 else (state.demand[r], max(0.0, state.free[r]))
                if arrays.needs[mode, r] > 0 and total > room:
                    rate = min(rate, room / total)
            state.rate[lane] = rate
            if turn == 0:
                for r in range(arrays.needs.shape[1]):
                    state.free[r] -= arrays.needs[mode, r] * rate


@compiled
def _set_done(state: State) -> Any:
    """When each lane's task is done at its rate, in ``done``; the first of these moments."""
    first = np.inf
    for lane in range(len(state.running)):
        state.done[lane] = np.inf
        if state.running[lane] < 0:
            continue
        if state.left[lane] <= 0:
            state.done[lane] = state.moment[0]
        elif state.rate[lane] > 0:
            state.done[lane] = state.moment[0] + state.left[lane] / state.rate[lane]
        first = min(first, state.done[lane])
    return first


@compiled
def step(arrays: Arrays, state: State) -> bool:
    """Start what can start now, and go on to the next event; false if there is none."""
    now = state.moment[0]
    then = np.inf
    for lane in range(len(state.running)):
        if state.running[lane] < 0 and state.head[lane] < state.tail[lane]:
            moment = _when(arrays, state, state.queue[lane, state.head[lane]])
            if moment <= now:
                _begin(arrays, state, lane)
            else:
                then = min(then, moment)
    _set_rates(arrays, state)
    then = min(then, _set_done(state))
    if then == np.inf:
        return False
    state.moment[0] = then
    for lane in range(len(state.running)):
        if state.running[lane] >= 0 and state.done[lane] > then:
            state.left[lane] -= (then - now) * state.rate[lane]
    for lane in range(len(state.running)):
        if state.done[lane] <= then:
            task = state.running[lane]
            state.running[lane] = -1
            _end(arrays, state, task)
    return True


@compiled
def play(arrays: Arrays, order: Integers, modes: Integers, waits: Integers, streams: bool) -> Any:
    """Run all tasks in ``order``: code, makespan, peak bytes, starts, finishes, and the task where it is wrong."""
    state, edges = prepared(arrays, modes, waits)
    for i in range(len(order)):
        if state.owner[i] == -2:
            return ABSORBED_WRONGLY, np.inf, 0, state.start, state.finish, i
    position = np.empty(len(order), np.int64)
    for k in range(len(order)):
        position[order[k]] = k
    for k in range(len(edges)):
        if position[edges[k, 0]] >= position[edges[k, 1]]:
            return BEFORE_OPERAND, np.inf, 0, state.start, state.finish, edges[k, 1]
    for k in range(len(order)):
        issue(arrays, state, order[k], streams)
    while state.counts[1] < len(order):
        if not step(arrays, state):
            return STUCK, np.inf, 0, state.start, state.finish, 0
    return RIGHT, state.moment[0], state.counts[3], state.start, state.finish, 0
