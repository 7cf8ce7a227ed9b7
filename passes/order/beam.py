"""Beam search over down-sets for the order that spills least, then local search on the best order."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Plan
from ...errors import OptionError
from .down_sets import DownSets, Rule
from .greedy import list_schedule
from .problem import OrderProblem, decide
from .search import search_orders
from .windows import improve

__all__ = ["BeamOrder"]

SMALL = 64  # operators up to which plain windows are quicker than loading compiled code
LARGE = 4_000  # operators from which on no beams are run: their bitmasks would take gigabytes
WINDOWS_A_ROUND = 160  # windows without improvement that one round of the compiled search stands for
MOST_MOVES = 2_000_000  # of the compiled search in deterministic mode
MASK_WORK = 1_000_000_000  # operators^2 x width of the widest beam: its bitmasks grow with the operators
WINDOW_WORK = 2_000_000  # operators x windows in a row without improvement


@dataclass(frozen=True)
class BeamOrder:
    """Search for the order whose best residency moves the fewest additional bytes.

    *Given* a plan. *Result*: an order that, by the spill estimate of ``OrderProblem.spill_bytes``, is never worse
    than the plan's own and, at equal spill, has the least peak of those tried.

    Formulation: with ``M`` the scratchpad's bytes and ``live(D)`` the bytes live after the down-set ``D`` of operators
    ran, an order is a path of down-sets from none to all. Its proxy cost is the sum of rises of
    ``max(0, live - M)`` (see ``down_sets.Rule``). Beams of width 1, 4, 16 ... up to ``width`` are run under two rules;
    every complete order is judged by eviction with known future, and the best is kept. If it spills, windows of it are
    ordered afresh the same way until ``patience`` of them in a row brought nothing. Graphs of more than 64 operators
    begin with beams of width 1, or list scheduling if they are too large for bitmasks, and go on with annealing over
    clusters (``search.search_orders``); wider beams follow only to lower the peak of an order that does not spill.
    ``patience=0`` leaves windows and annealing out.

    The result depends on a clock only if the budget ends first, never in deterministic mode.
    """

    width: int = 256
    patience: int = 1000

    def __post_init__(self) -> None:
        if self.width < 1:
            raise OptionError(f"order/beam: option 'width' is {self.width}; it takes 1 or more")
        if self.patience < 0:
            raise OptionError(f"order/beam: option 'patience' is {self.patience}; it takes 0 or more")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/beam"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Search within ``budget``; returns the best order found when it ends or is told to stop."""
        problem = OrderProblem.of(plan)
        best = _Incumbent(self.name, problem, budget, list(plan.order))
        widest = min(MASK_WORK // max(1, len(best.order)) ** 2, self.width)
        self._run_beams(best, 1, widest if len(best.order) <= SMALL else 1)
        if best.spill and self.patience:
            self._improve(best)
        if len(best.order) > SMALL and not (best.spill and self.patience):
            self._run_beams(best, 4, widest)
        note = f"estimated {best.spill:,} additional bytes, {best.given:,} in the given order"
        return decide(plan, problem, best.order, note=note)

    def _run_beams(self, best: _Incumbent, narrowest: int, widest: int) -> None:
        """Offer what beams of ``narrowest`` to ``widest`` states find, list scheduling where beams cost too much."""
        halted = best.budget.halted
        if best.is_roomy or halted():
            return
        if len(best.order) > LARGE:
            best.offer(list_schedule(best.problem))
            return
        down_sets = DownSets(best.problem)
        width = narrowest
        while width <= widest:
            for returning in (True, False):
                if best.is_roomy or halted():
                    return
                order = down_sets.order(Rule(best.problem.capacity, returning=returning), width, halted)
                if order is not None:
                    best.offer(order)
            width = min(4 * width, widest) if width < widest else widest + 1

    def _improve(self, best: _Incumbent) -> None:
        problem, budget, operators = best.problem, best.budget, len(best.order)
        if operators <= SMALL:
            patience = min(self.patience, WINDOW_WORK // operators)
            improved = improve(
                problem, best.order, patience=patience, seed=budget.seed, halted=budget.halted, found=best.tell
            )
            best.offer(improved)
            return
        patience = -(-self.patience // WINDOWS_A_ROUND)
        seeds = (best.order, best.first)
        for found in search_orders(problem, budget, seed_orders=seeds, patience=patience, most_moves=MOST_MOVES):
            best.offer(list(found.order))


@dataclass
class _Incumbent:
    """The best order so far by estimated spill, then peak, both in bytes."""

    name: str
    problem: OrderProblem
    budget: Budget
    order: list[int]
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.first = self.order
        self.spill, self.peak = self._cost(self.order)
        self.given = self.spill
        self.tell(self.spill)

    def _cost(self, order: list[int]) -> tuple[int, int]:
        return self.problem.spill_bytes(order), self.problem.peak_bytes(order)

    @property
    def is_roomy(self) -> bool:
        """Nothing spills and an eighth of the capacity is left for fragmentation, or nothing better exists."""
        floor = self.problem.largest_working_set()
        return not self.spill and (self.peak <= max(floor, self.problem.capacity * 7 // 8))

    def offer(self, order: list[int]) -> None:
        """Keep ``order`` if it is better."""
        cost = self._cost(order)
        if cost < (self.spill, self.peak):
            self.order = order
            self.spill, self.peak = cost
            self.tell(self.spill)

    def tell(self, spill: int) -> None:
        """Let the listener know of ``spill`` bytes."""
        self.budget.listen(Progress(self.name, time.monotonic() - self.begin, spill))
