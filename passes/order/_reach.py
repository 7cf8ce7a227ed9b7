"""Which down-sets can be reached within a capacity: the inner loop of ``order/least_peak``.

A *down-set* is a set of operators that may have run. The search expands one reached down-set after another; what makes
it small is that it never branches where one continuation is as good as any other (``settle``). Functions here are
plain Python over arrays; ``compiled`` gives the same loop as machine code, for graphs that take more than a moment.
Why the reductions lose nothing is written in docs/formulations/peak.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, cast

from ._peak_arrays import BITS, COUNT, EVERY, EXPANDED, LAST, LOGGED, NEVER, STACKED, Graph, Reached, Scratch

__all__ = ["CAPACITY_TOO_SMALL", "FOUND", "FULL", "UNFINISHED", "WIDE", "compiled", "explore", "is_compiled"]

FOUND, CAPACITY_TOO_SMALL, UNFINISHED = range(3)
KNOWN, FULL, WIDE = -1, -2, -3  # instead of a down-set's number


def run(g: Graph, w: Scratch, op: int, live: int) -> tuple[int, int]:
    """Run ``op``; returns the bytes live meanwhile and afterwards."""
    for k in range(g.touch_start[op], g.touch_start[op + 1]):
        b = g.touched[k]
        if w.left[b] == g.users[b]:
            live += g.size[b]
    during = live
    for k in range(g.overwrite_start[op], g.overwrite_start[op + 1]):
        b = g.overwritten[k]
        if w.left[b] == (g.users[b] if g.backward else 1):
            during -= g.size[b]
            break
    for k in range(g.touch_start[op], g.touch_start[op + 1]):
        b = g.touched[k]
        w.left[b] -= 1
        if w.left[b] == 0:
            live -= g.size[b]
    for k in range(g.after_start[op], g.after_start[op + 1]):
        w.waiting[g.after[k]] -= 1
    w.waiting[op] -= 1
    return during, live


def undo(g: Graph, w: Scratch, op: int) -> None:
    """Take back that ``op`` ran, the last one that did."""
    for k in range(g.touch_start[op], g.touch_start[op + 1]):
        w.left[g.touched[k]] += 1
    for k in range(g.after_start[op], g.after_start[op + 1]):
        w.waiting[g.after[k]] += 1
    w.waiting[op] += 1


def chain(g: Graph, w: Scratch, op: int, live: int, capacity: int, traced: int) -> tuple[int, int]:
    """Run ``op`` and each sole operator that becomes ready by the one before it, until no more is live than before.

    Returns the live bytes and the length of the trace; both as they were, and nothing run, where that does not come to
    be within ``capacity``.
    """
    base, begin = live, traced
    while True:
        during, live = run(g, w, op, live)
        w.trace[traced] = op
        traced += 1
        if during > capacity:
            break
        if live <= base:
            return live, traced
        opened, following = 0, -1
        for k in range(g.after_start[op], g.after_start[op + 1]):
            if w.waiting[g.after[k]] == 0:
                opened += 1
                following = g.after[k]
        if opened != 1:
            break
        op = following
    for k in range(traced - 1, begin - 1, -1):
        undo(g, w, w.trace[k])
    return base, begin


def settle(g: Graph, w: Scratch, live: int, ready: int, capacity: int, traced: int) -> tuple[int, int]:
    """Run chains as long as there are any of the first ``ready`` operators of ``fresh``; returns as ``chain``."""
    position = 0
    while position < ready:
        begin = traced
        live, traced = chain(g, w, w.fresh[position], live, capacity, begin)
        if traced == begin:
            position += 1
            continue
        ready -= 1
        w.fresh[position] = w.fresh[ready]
        for k in range(begin, traced):
            ready = open_after(g, w, w.trace[k], ready)
        position = 0
    return live, traced


def open_after(g: Graph, w: Scratch, op: int, ready: int) -> int:
    """Append to ``fresh`` the operators that are ready after ``op`` ran and not in it yet; returns how many it has."""
    for k in range(g.after_start[op], g.after_start[op + 1]):
        other = g.after[k]
        known = w.waiting[other] != 0
        for position in range(ready):
            known = known or w.fresh[position] == other
        if not known:
            w.fresh[ready] = other
            ready += 1
    return ready


def move(g: Graph, r: Reached, w: Scratch, state: int) -> None:
    """Make ``w`` describe down-set ``state``: what it and the present one differ in is run or taken back."""
    window, base, changed = r.bits.shape[1], r.base[state], 0
    for index in range(min(base, w.counts[1]), max(base, w.counts[1]) + window):
        wanted = EVERY if index < base else (r.bits[state, index - base] if index < base + window else 0)
        op, word = index * BITS, w.here[index] ^ wanted
        w.here[index] = wanted
        while word != 0:
            if word & 1:
                sign = 1 if wanted & 1 else -1
                for k in range(g.touch_start[op], g.touch_start[op + 1]):
                    w.left[g.touched[k]] -= sign
                for k in range(g.after_start[op], g.after_start[op + 1]):
                    w.waiting[g.after[k]] -= sign
                w.waiting[op] -= sign
                w.trace[changed] = op
                changed += 1
            op, word, wanted = op + 1, word >> 1, wanted >> 1
    w.counts[1] = base
    for position in range(changed):
        op = w.trace[position]
        list_if_ready(w, op)
        for k in range(g.after_start[op], g.after_start[op + 1]):
            list_if_ready(w, g.after[k])


def list_if_ready(w: Scratch, op: int) -> None:
    """Put ``op`` into the list of those that are ready, or take it out."""
    is_ready, place, count = w.waiting[op] == 0, w.place[op], w.counts[0]
    if is_ready and place < 0:
        w.ready[count] = op
        w.place[op] = count
        w.counts[0] = count + 1
    elif not is_ready and place >= 0:
        last = w.ready[count - 1]
        w.ready[place] = last
        w.place[last] = place
        w.place[op] = -1
        w.counts[0] = count - 1


def record(g: Graph, r: Reached, w: Scratch, parent: int, live: int, traced: int) -> int:
    """Number of the down-set that ``parent``, where ``w`` is, and the trace make; or KNOWN, FULL, or WIDE."""
    window, words, base, highest = r.bits.shape[1], len(w.here), r.base[parent], 0
    hashed = r.hashed[parent]
    for k in range(traced):
        op = w.trace[k]
        w.here[op // BITS] ^= 1 << (op % BITS)
        hashed ^= g.key[op]
        highest = max(highest, op // BITS)
    while base < words - window and w.here[base] == EVERY:
        base += 1
    number = WIDE
    if highest < base + window:
        number = enter(r, w, base, hashed, live, parent, traced)
    for k in range(traced):
        w.here[w.trace[k] // BITS] ^= 1 << (w.trace[k] % BITS)
    return number


def enter(r: Reached, w: Scratch, base: int, hashed: int, live: int, parent: int, traced: int) -> int:
    """Number of the down-set in ``here`` if it is new, and there is room; its window starts at ``base``."""
    window = r.bits.shape[1]
    mask = len(r.table) - 1
    slot = hashed & mask
    while r.table[slot] != 0:
        known = r.table[slot] - 1
        same = r.hashed[known] == hashed and r.base[known] == base
        for index in range(window):
            same = same and r.bits[known, index] == w.here[base + index]
        if same:
            return KNOWN
        slot = (slot + 1) & mask
    number, logged = r.counters[COUNT], r.counters[LOGGED]
    if number == len(r.live) or logged + traced > len(r.log):
        return FULL
    r.table[slot] = number + 1
    r.bits[number] = w.here[base : base + window]
    r.base[number] = base
    r.hashed[number], r.live[number], r.blocked[number], r.parent[number] = hashed, live, NEVER, parent
    r.log_start[number], r.log_stop[number] = logged, logged + traced
    r.log[logged : logged + traced] = w.trace[:traced]
    r.counters[COUNT] += 1
    r.counters[LOGGED] += traced
    return int(number)


def expand(g: Graph, r: Reached, w: Scratch, state: int, capacity: int) -> int:
    """Record what follows ``state`` within ``capacity`` in ``children``; returns how many, or FULL or WIDE."""
    move(g, r, w, state)
    ready = w.counts[0]
    w.fresh[:ready] = w.ready[:ready]
    r.blocked[state] = NEVER
    children = 0
    live, traced = settle(g, w, r.live[state], ready, capacity, 0)
    if traced:  # possible since the capacity rose; nothing else needs to be tried then
        number = record(g, r, w, state, live, traced)
        if number >= 0:
            w.children[0] = number
            children = 1
        for k in range(traced - 1, -1, -1):
            undo(g, w, w.trace[k])
        return number if number < KNOWN else children
    for position in range(ready):
        op = w.ready[position]
        during, live = run(g, w, op, r.live[state])
        if during > capacity:
            r.blocked[state] = min(r.blocked[state], during)
            undo(g, w, op)
            continue
        w.trace[0] = op
        w.fresh[:position] = w.ready[:position]
        w.fresh[position : ready - 1] = w.ready[position + 1 : ready]
        live, traced = settle(g, w, live, open_after(g, w, op, ready - 1), capacity, 1)
        number = record(g, r, w, state, live, traced)
        for k in range(traced - 1, -1, -1):
            undo(g, w, w.trace[k])
        if number < KNOWN:
            return number
        if number >= 0:
            w.children[children] = number
            children += 1
    return children


def explore(g: Graph, r: Reached, w: Scratch, capacity: int, expansions: int) -> int:
    """Expand down-sets from the stack, the one with the least live bytes first among brothers.

    Returns ``FOUND`` once all operators have run, the last down-set's number in ``counters[LAST]``;
    ``CAPACITY_TOO_SMALL`` when the stack is empty; ``UNFINISHED`` after so many ``expansions``; ``FULL`` without
    room for more down-sets; ``WIDE`` when one does not fit into a window.
    """
    operators = len(g.before)
    while r.counters[STACKED] > 0:
        if expansions == 0:
            return UNFINISHED
        expansions -= 1
        r.counters[EXPANDED] += 1
        r.counters[STACKED] -= 1
        children = expand(g, r, w, r.stack[r.counters[STACKED]], capacity)
        if children < 0:
            return children
        for k in range(children):  # insertion sort: most live bytes first, so that the least lie on top of the stack
            child, position = w.children[k], k
            while position > 0 and r.live[w.children[position - 1]] < r.live[child]:
                w.children[position] = w.children[position - 1]
                position -= 1
            w.children[position] = child
        for k in range(children):
            r.stack[r.counters[STACKED]] = w.children[k]
            r.counters[STACKED] += 1
            if r.live[w.children[k]] == 0 and ran(r, w.children[k]) == operators:
                r.counters[LAST] = w.children[k]
                return FOUND
    return CAPACITY_TOO_SMALL


def ran(r: Reached, state: int) -> int:
    """How many operators ``state`` has."""
    total = 0
    while state > 0:
        total += r.log_stop[state] - r.log_start[state]
        state = r.parent[state]
    return total


@cache
def compiled() -> Callable[..., int]:
    """``explore`` as machine code, kept on disk where there is a place for it, free of Python's lock."""
    from .._compiled import compiled as machine_code  # numba: only where it is needed

    functions: dict[str, Any] = dict(globals())
    for function in (run, undo, chain, open_after, settle, list_if_ready, move, enter, record, expand, ran, explore):
        # The same code, calling what has been compiled before it. Calls copy every array's description: what is called
        # most often is made part of its caller.
        code: Any = FunctionType(function.__code__, functions, function.__name__)
        inline = "always" if function in (run, undo) else "never"
        functions[function.__name__] = machine_code(code, inline=inline)
    return cast(Callable[..., int], functions["explore"])


def is_compiled() -> bool:
    """Whether ``compiled`` has been called, so that calling it again costs nothing."""
    return compiled.cache_info().currsize > 0
