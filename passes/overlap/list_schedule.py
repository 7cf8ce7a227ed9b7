"""The incumbent: list schedules by several rules, and the given order; the fastest that keeps the limit on memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ...errors import Infeasible
from ._construct import construct
from .arrays import Integers
from .bounds import bound_of
from .priorities import preferences
from .problem import Problem, Schedule
from .simulate import Indices, Simulator, Waits, given_modes, synchronous_waits

__all__ = ["Answer", "NO_LIMIT", "as_schedule", "best_order", "given", "list_schedule", "merit", "reordered"]

NO_LIMIT = 1 << 62
AHEAD = (1.0, math.inf)  # seconds of collectives queued on a link, by those of the task that is issued next
RULES_OF_MODES = ("nearest",)  # rules that are tried again whenever one mode changes

#: Makespan, peak bytes, order, modes and waits.
Answer = tuple[float, int, Indices, Indices, Waits]


def list_schedule(problem: Problem, modes: Sequence[int] | None = None, *, streams: bool = True) -> Schedule:
    """The best list schedule in ``modes`` (those given when ``None``); never slower than the given order, if that fits.

    Raises:
        Infeasible: no schedule that was tried keeps ``memory_limit_bytes``; says the least peak that was found.
    """
    simulator = Simulator(problem, streams=streams)
    chosen = given_modes(problem) if modes is None else tuple(modes)
    best = best_order(simulator, chosen)
    return as_schedule(simulator, best)


def as_schedule(simulator: Simulator, answer: Answer) -> Schedule:
    """``answer`` with times and the analytic bound; raises Infeasible where it needs more memory than there is."""
    problem = simulator.problem
    _, peak, order, modes, waits = answer
    limit = problem.memory_limit_bytes
    if limit is not None and peak > limit:
        raise Infeasible(
            f"no order that was tried holds at most {limit} bytes at a time; the least is {peak}",
            required_bytes=peak,
            available_bytes=limit,
            hint="allow more memory, split into fewer parts, or turn overlap off",
        )
    schedule = simulator.timed(order, modes, waits)
    bound = min(bound_of(problem), schedule.makespan_s)
    return Schedule(**{**vars(schedule), "bound_s": bound})


def best_order(simulator: Simulator, modes: Indices) -> Answer:
    """The fastest answer in ``modes`` that keeps the limit; where none does, the one with the least peak."""
    limit = simulator.problem.memory_limit_bytes
    return min(_candidates(simulator, modes), key=lambda answer: merit(answer, limit))


def merit(answer: Answer, limit: int | None) -> tuple[float, float, int]:
    """What makes an answer better, lowest first: bytes above the limit, makespan, peak."""
    return (max(0, answer[1] - limit) if limit is not None else 0, answer[0], answer[1])


def given(simulator: Simulator, modes: Indices | None = None, *, synchronous: bool = False) -> Answer:
    """The program's own order; ``synchronous`` if it waits for each collective at once."""
    problem = simulator.problem
    chosen = given_modes(problem) if modes is None else modes
    order = range(len(problem.tasks))
    waits = synchronous_waits(problem, order) if synchronous else ()
    return (*simulator.measure(order, chosen, waits), order, chosen, waits)


def _candidates(simulator: Simulator, modes: Indices) -> Iterator[Answer]:
    problem = simulator.problem
    yield given(simulator, modes)
    if problem.memory_limit_bytes is not None:
        yield given(simulator, modes, synchronous=True)
    yield from _constructed_all(simulator, modes)


def _constructed_all(simulator: Simulator, modes: Indices, rules: Collection[str] | None = None) -> Iterator[Answer]:
    problem = simulator.problem
    chosen = np.asarray(modes, np.int64)
    limit = NO_LIMIT if problem.memory_limit_bytes is None else problem.memory_limit_bytes
    for name, rank in preferences(problem, modes):
        for ahead in AHEAD if rules is None or name in rules else ():
            order, waits, complete = _constructed(simulator, chosen, rank, limit, ahead)
            if complete:
                yield (*simulator.measure(order, chosen, waits), order, modes, waits)


def reordered(simulator: Simulator, answer: Answer, modes: Indices) -> Iterator[Answer]:
    """``answer`` in other ``modes``: in its own order, and in the orders that list scheduling finds then."""
    yield (*simulator.measure(answer[2], modes, answer[4]), answer[2], modes, answer[4])
    yield from _constructed_all(simulator, modes, RULES_OF_MODES)


def _constructed(
    simulator: Simulator, modes: Integers, rank: Integers, limit: int, ahead: float
) -> tuple[Integers, Integers, bool]:
    order, waits, complete = construct(simulator.arrays, modes, rank, limit, ahead, simulator.streams)
    return order, waits, bool(complete)
