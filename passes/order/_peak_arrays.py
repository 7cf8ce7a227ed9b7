"""The arrays that the search for the order of least peak works on, in a form that can be compiled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .problem import OrderProblem

__all__ = [
    "BITS",
    "COUNT",
    "EVERY",
    "EXPANDED",
    "LAST",
    "LOGGED",
    "NEVER",
    "STACKED",
    "Graph",
    "Overwrites",
    "Reached",
    "Scratch",
    "graph_of",
    "reached_of",
    "scratch_of",
]

BITS = 63  # operators in one word: shifts stay positive
EVERY = (1 << BITS) - 1  # a word with all of its operators
NEVER = 1 << 62
COUNT, LOGGED, STACKED, LAST, EXPANDED = range(5)  # of Reached.counters
STATE_BYTES = 150  # what a down-set takes beside its bits, about
LOG_LENGTH = 8  # operators that lead from one down-set to the next, on average at most

Integers = NDArray[np.int64]
#: For each operator, the buffers whose place its result may take if it is the last to use them; of equal size.
Overwrites = Sequence[Sequence[int]]


class Graph(NamedTuple):
    """What is searched, by operator or by buffer; ``start`` arrays delimit the ranges of the array named after them.

    ``after`` are an operator's successors and ``before`` counts its predecessors. ``overwritten`` are buffers whose
    place an operator's result may take when the operator is the last to use them. ``backward`` is 1 where arrows and
    time are turned around: an operator is then the last to use what it is the first to touch. Operators are numbered
    from the end that is searched from, so that those of a down-set mostly have the least numbers.
    """

    touch_start: Integers
    touched: Integers
    before: Integers
    after_start: Integers
    after: Integers
    overwrite_start: Integers
    overwritten: Integers
    size: Integers
    users: Integers
    key: Integers
    backward: int


class Reached(NamedTuple):
    """The down-sets reached, by number; number 0 is the empty one.

    ``bits`` are their operators in a window of words that begins at word ``base``: those before it have all run, those
    behind it none. ``hashed`` is the exclusive or of all their keys; ``live`` bytes are live after them; ``blocked`` is
    the least capacity at which one more continuation opens. ``parent`` is the down-set each was reached from, by
    running ``log[log_start:log_stop]``. ``table`` finds numbers by hash and holds them plus 1; ``stack`` are those
    still to be expanded. ``counters`` are indexed by ``COUNT`` to ``EXPANDED``.
    """

    bits: Integers
    base: Integers
    hashed: Integers
    live: Integers
    blocked: Integers
    parent: Integers
    log_start: Integers
    log_stop: Integers
    log: Integers
    table: Integers
    stack: Integers
    counters: Integers


class Scratch(NamedTuple):
    """Where the search stands, and room to work in.

    ``here`` are all bits of the down-set that the rest describes, and its window begins at word ``counts[1]``: users
    ``left`` by buffer; predecessors ``waiting`` by operator, -1 once it ran; the operators that are ``ready``, their
    ``place`` in that list or -1, and their number in ``counts[0]``. The others are lists to fill.
    """

    here: Integers
    left: Integers
    waiting: Integers
    ready: Integers
    place: Integers
    counts: Integers
    fresh: Integers
    trace: Integers
    children: Integers


def graph_of(problem: OrderProblem, overwrites: Overwrites, *, backward: bool) -> Graph:
    """What is searched from one end of ``problem``; bytes are its footprints."""
    turn = -1 if backward else 1
    after = problem.predecessors if backward else problem.successors
    before = problem.successors if backward else problem.predecessors
    count = len(before)
    after_by_number = [[count - 1 - op if backward else op for op in others] for others in after]
    keys = np.random.default_rng(0).integers(0, NEVER, count)  # to hash with, nothing depends on them
    return Graph(
        *_rows(problem.touches[::turn]),
        np.array([len(others) for others in before[::turn]], np.int64),
        *_rows(after_by_number[::turn]),
        *_rows(overwrites[::turn]),
        np.array(problem.footprint, np.int64),
        np.array([len(users) for users in problem.users], np.int64),
        keys,
        int(backward),
    )


def scratch_of(graph: Graph) -> Scratch:
    """Room to work in, before any operator has run."""
    count, words = len(graph.before), -(-len(graph.before) // BITS)
    first = np.nonzero(graph.before == 0)[0]
    ready = np.zeros(count, np.int64)
    ready[: len(first)] = first
    place = np.full(count, -1, np.int64)
    place[first] = np.arange(len(first))
    return Scratch(
        here=np.zeros(words, np.int64),
        left=graph.users.copy(),
        waiting=graph.before.copy(),
        ready=ready,
        place=place,
        counts=np.array([len(first), 0], np.int64),
        fresh=np.zeros(count, np.int64),
        trace=np.zeros(count, np.int64),
        children=np.zeros(count, np.int64),
    )


def _rows(lists: Sequence[Sequence[int]]) -> tuple[Integers, Integers]:
    """Where each list starts, and all of them one after the other."""
    starts = np.array([0, *accumulate(map(len, lists))], np.int64)
    return starts, np.array([item for items in lists for item in items], np.int64)


def reached_of(graph: Graph, nbytes: int, window: int) -> Reached:
    """Room for down-sets in about so many bytes, taken as they are used; the empty one is on the stack.

    ``window`` is the number of words kept of each, at most what all operators take.
    """
    count = len(graph.before)
    states = min(nbytes // (8 * window + STATE_BYTES), 1 << min(count, 40))
    reached = Reached(
        bits=np.zeros((states, window), np.int64),
        base=np.zeros(states, np.int64),
        hashed=np.zeros(states, np.int64),
        live=np.zeros(states, np.int64),
        blocked=np.zeros(states, np.int64),
        parent=np.zeros(states, np.int64),
        log_start=np.zeros(states, np.int64),
        log_stop=np.zeros(states, np.int64),
        log=np.zeros(count + LOG_LENGTH * states, np.int64),
        table=np.zeros(2 << states.bit_length(), np.int64),
        stack=np.zeros(states, np.int64),
        counters=np.zeros(5, np.int64),
    )
    reached.blocked[0] = NEVER
    reached.table[0] = 1
    reached.counters[COUNT] = reached.counters[STACKED] = 1
    return reached
