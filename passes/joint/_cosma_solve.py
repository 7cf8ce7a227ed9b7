"""Solving COSMA's models within a budget: what is too large, how it is asked, and what ended it."""

from __future__ import annotations

from collections.abc import Mapping

from ...compiler.pipeline import Budget
from ...errors import InternalError
from .._solver.highs import Listener, Solution, solve
from ._cosma_model import CosmaModel
from ._cosma_problem import CosmaProblem

__all__ = ["MAX_STEPS", "ended", "solved", "too_large"]

MAX_STEPS = 5_000  # operators beyond which even the windows of a free order take too long
MAX_TERMS = 4_000_000  # non-zeros beyond which HiGHS does not get past the root in any reasonable time
TERMS_PER_S = 150_000  # built and presolved on one busy core
# In deterministic mode no clock may decide. HiGHS counts no work but nodes, and spends most of it at the root, so it is
# the model that is limited: to what a busy core ends with in seconds.
DETERMINISTIC_NODES = 200
DETERMINISTIC_TERMS = {"model": 200_000, "model with addresses": 30_000}
DETERMINISTIC_FREEDOM = 200


def solved(model: CosmaModel, start: Mapping[str, float], budget: Budget, listen: Listener) -> Solution:
    """The model's solution from ``start``, which satisfies it. Raises InternalError if HiGHS says that nothing does."""
    solution = solve(
        model.program,
        budget,
        start=start,
        absolute_gap=0.99,  # objectives are whole units: less than one apart is no distance
        max_nodes=DETERMINISTIC_NODES if budget.deterministic else None,
        listen=listen,
    )
    if solution.status == "infeasible":
        raise InternalError("COSMA's model has no solution although its start is one", hint="please report this")
    return solution


def too_large(what: str, of: CosmaProblem, terms: int, budget: Budget) -> str:
    """Why a model cannot be built and looked at in the time left; empty if it can."""
    if budget.remaining_s <= 0:
        return "the time limit came first"
    if budget.deterministic:
        if of.freedom <= DETERMINISTIC_FREEDOM and terms <= DETERMINISTIC_TERMS[what]:
            return ""
        return f"the {what} has about {terms:,} terms and {of.freedom} steps of freedom, too many without a clock"
    if terms > min(MAX_TERMS, TERMS_PER_S * budget.remaining_s / 2):
        return f"the {what} has about {terms:,} terms, too many for the time left"
    return ""


def ended(solution: Solution, budget: Budget) -> str:
    """Why the search ended, for the note."""
    if solution.status == "optimal":
        return "solved"
    if budget.deterministic and budget.remaining_s > 0:
        return "the search limit came first"
    return "the time limit came first" + (", so another run may differ" if budget.deterministic else "")
