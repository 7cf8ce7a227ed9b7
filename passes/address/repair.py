"""From a placement that ends too high to one that fits: the surroundings of what is too high are placed afresh."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Protocol

from ...compiler.pipeline import Budget
from .no_overlap import POLL_S, Answer, Verdict, fit_by_constraints
from .packing import Packing

__all__ = ["Ask", "fit_by_repair", "race"]

SMALLEST_WINDOW = 8  # distinct first steps
FIRST_SECONDS = 0.5  # what importing the search for canonical placements takes anyway


class Ask(Protocol):
    """A way to place items within a capacity."""

    def __call__(
        self, packing: Packing, items: Sequence[int], capacity: int, budget: Budget, *, seconds: float
    ) -> Answer:
        """Place ``items`` within ``capacity`` bytes, or say that it is impossible."""


def fit_by_repair(
    packing: Packing,
    items: Sequence[int],
    offsets: Sequence[int],
    capacity: int,
    budget: Budget,
    *,
    seconds: Callable[[bool], float],
) -> tuple[Answer, list[int]]:
    """Place a component ``items``, now at ``offsets`` (units), within ``capacity`` bytes.

    The whole is asked of CP-SAT and of the search for canonical placements: what takes one of them long is often quick
    for the other. With two workers both run at once, and the first to know is heard; with one, or where time must not
    decide, they take turns. Then, around the first item that ends too high, a window of steps is
    cleared and its items are placed anew between those that stay; while that fails, the window grows, in the end to
    the whole component, which makes the method complete. Items of one window that cannot be placed even by themselves
    prove that nothing can.

    Returns:
        The answer for all of ``items``, and the items of the last window: a conflict if the verdict is IMPOSSIBLE.
        ``seconds`` limits each question, given whether it is about the whole component.
    """
    place = dict(zip(items, offsets, strict=True))
    first_steps = sorted({packing.begins[i] for i in items})
    window = SMALLEST_WINDOW
    if len(first_steps) > 4 * window:
        whole = _ask_both(packing, items, capacity, budget, seconds=seconds)
        if whole.verdict is not Verdict.UNKNOWN:
            return whole, list(items)
    while high := [i for i in items if not packing.lies_within(i, place[i], capacity)]:
        cleared = _cleared(packing, items, first_steps, high[0], window)
        complete = len(cleared) == len(items)
        alone = fit_by_constraints(packing, cleared, capacity, budget, seconds=seconds(complete))
        if alone.verdict is Verdict.IMPOSSIBLE or (complete and alone.verdict is Verdict.UNKNOWN):
            return Answer(alone.verdict), cleared
        if complete:
            return alone, cleared
        if alone.verdict is Verdict.UNKNOWN:  # too hard by itself: the difficulty is not where the window ends
            window = 2 * len(first_steps)
            continue
        fixed = _neighbours(packing, cleared, place, capacity)
        between = alone
        if fixed:
            between = fit_by_constraints(packing, cleared, capacity, budget, seconds=seconds(False), fixed=fixed)
        if between.verdict is Verdict.PLACED:
            place.update(zip(cleared, between.offsets, strict=True))
            window = SMALLEST_WINDOW
        else:
            window *= 2
    return Answer(Verdict.PLACED, tuple(place[i] for i in items)), []


def _ask_both(
    packing: Packing, items: Sequence[int], capacity: int, budget: Budget, *, seconds: Callable[[bool], float]
) -> Answer:
    """The answer of CP-SAT or the search for canonical placements; what takes CP-SAT a moment needs no numba.

    With two workers both run at once, except that CP-SAT also has all of them for a while: on some problems its
    workers are worth more together.
    """
    brief, long = seconds(False), seconds(True) / 2
    answer = fit_by_constraints(packing, items, capacity, budget, seconds=min(FIRST_SECONDS, brief / 4))
    if answer.verdict is not Verdict.UNKNOWN:
        return answer
    from .restarts import fit_by_search  # only hard placements pay for importing numba

    search: Ask = fit_by_search
    if budget.workers > 1 and not budget.deterministic:
        search = partial(race, (fit_by_constraints, fit_by_search))
    for ask, limit in ((search, brief / 2), (fit_by_constraints, brief), (search, long)):
        answer = ask(packing, items, capacity, budget, seconds=limit)
        if answer.verdict is not Verdict.UNKNOWN:
            return answer
    return answer


def race(
    asked: Sequence[Ask], packing: Packing, items: Sequence[int], capacity: int, budget: Budget, *, seconds: float
) -> Answer:
    """The first verdict of those ``asked``, each on a worker of its own; the others are stopped."""
    alone = replace(budget, workers=1, stop=threading.Event())
    with ThreadPoolExecutor(len(asked)) as threads:
        running = {threads.submit(ask, packing, items, capacity, alone, seconds=seconds) for ask in asked}
        decided = Answer(Verdict.UNKNOWN)
        try:
            while running and decided.verdict is Verdict.UNKNOWN and not budget.stop.is_set():
                done, running = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                decided = next((a for a in (f.result() for f in done) if a.verdict is not Verdict.UNKNOWN), decided)
        finally:
            alone.stop.set()
        return decided


def _cleared(packing: Packing, items: Sequence[int], first_steps: Sequence[int], centre: int, window: int) -> list[int]:
    """Items resident during some of the ``window`` distinct first steps around those of ``centre``."""
    inside = [k for k, step in enumerate(first_steps) if packing.begins[centre] <= step < packing.ends[centre]]
    low = max(0, inside[0] - window // 2)
    high = min(len(first_steps) - 1, inside[-1] + window // 2)
    begin, end = first_steps[low], first_steps[high] + 1
    return [i for i in items if packing.begins[i] < end and packing.ends[i] > begin]


def _neighbours(packing: Packing, cleared: Sequence[int], place: dict[int, int], capacity: int) -> dict[int, int]:
    """Offsets of the items that stay, lie within ``capacity`` and share a step with a cleared one."""
    inside = set(cleared)
    begin, end = min(packing.begins[i] for i in cleared), max(packing.ends[i] for i in cleared)
    return {
        i: offset
        for i, offset in place.items()
        if i not in inside
        and packing.begins[i] < end
        and packing.ends[i] > begin
        and packing.lies_within(i, offset, capacity)
    }
