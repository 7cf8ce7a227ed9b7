"""Why nothing fits: fewer residences that still cannot be placed together."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...compiler.pipeline import Budget
from .no_overlap import Verdict, fit_by_constraints
from .packing import Packing

__all__ = ["reduced"]

QUESTION_SECONDS = 1.0
DETERMINISTIC_QUESTIONS = 60


def reduced(packing: Packing, items: Sequence[int], budget: Budget, *, seconds: float) -> list[int]:
    """A subset of ``items``, which cannot be placed, that still cannot; irreducible if time suffices.

    Deletion filter (Chinneck & Dravnieks, 1991): leave some out and keep them out when the rest is proven impossible
    without them. Halves first, then ever smaller groups, neighbours in time together, as conflicts are local.
    """
    kept = sorted(items, key=lambda i: (packing.begins[i], packing.ends[i], i))
    deadline = time.monotonic() + seconds
    questions = 0
    group = max(1, len(kept) // 2)
    while True:
        position = 0
        while position < len(kept):
            if budget.stop.is_set() or _spent(budget, questions, deadline):
                return kept
            without = kept[:position] + kept[position + group :]
            questions += 1
            if without and _impossible(packing, without, budget, deadline):
                kept = without
            else:
                position += group
        if group == 1:
            return kept
        group = max(1, min(group // 2, len(kept) // 2))


def _spent(budget: Budget, questions: int, deadline: float) -> bool:
    return questions >= DETERMINISTIC_QUESTIONS if budget.deterministic else time.monotonic() >= deadline


def _impossible(packing: Packing, items: Sequence[int], budget: Budget, deadline: float) -> bool:
    bound, _ = packing.fullest_step(items)
    if bound > packing.capacity:
        return True
    seconds = QUESTION_SECONDS if budget.deterministic else min(QUESTION_SECONDS, deadline - time.monotonic())
    if seconds <= 0:
        return False
    return fit_by_constraints(packing, items, packing.capacity, budget, seconds=seconds).verdict is Verdict.IMPOSSIBLE
