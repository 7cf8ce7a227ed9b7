"""Beam search over down-sets for the order that spills least, then local search on the best order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
FIRST_WIDTH = 16  # widest beam where compiled search comes next; it finds better orders sooner than wider beams
WINDOWS_A_ROUND = 160  # windows without improvement that one round of the compiled search stands for
MOST_MOVES = 5_000_000  # of the compiled search in deterministic mode
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
    every complete order is judged by eviction with known future, and the best is kept. If it spills, small graphs have
    windows of it ordered afresh the same way until ``patience`` of them in a row brought nothing. Graphs of more than
    64 operators stop at beams of width 16, or at list scheduling if they are too large for bitmasks, and go on with
    annealing over clusters (``search.search_orders``). ``patience=0`` leaves both out.

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
        if len(best.order) < LARGE:
            self._run_beams(best)
        elif not best.is_roomy:
            best.offer(list_schedule(problem))
        if best.spill and self.patience:
            self._improve(best)
        note = f"estimated {best.spill:,} additional bytes, {best.given:,} in the given order"
        return decide(plan, problem, best.order, note=note)

    def _run_beams(self, best: _Incumbent) -> None:
        halted, down_sets = _halted(best.budget), DownSets(best.problem)
        for rule, width in _schedule(best.problem.capacity, self._widest(len(best.order))):
            search_next = best.spill and self.patience and len(best.order) > SMALL
            if best.is_roomy or halted() or (search_next and width > FIRST_WIDTH):
                break
            order = down_sets.order(rule, width, halted)
            if order is not None:
                best.offer(order)

    def _improve(self, best: _Incumbent) -> None:
        problem, budget, operators = best.problem, best.budget, len(best.order)
        if operators <= SMALL:
            patience = min(self.patience, WINDOW_WORK // operators)
            improved = improve(
                problem, best.order, patience=patience, seed=budget.seed, halted=_halted(budget), found=best.tell
            )
            best.offer(improved)
            return
        patience = -(-self.patience // WINDOWS_A_ROUND)
        seeds = (best.order, best.first)
        for found in search_orders(problem, budget, seed_orders=seeds, patience=patience, most_moves=MOST_MOVES):
            best.offer(list(found.order))

    def _widest(self, operators: int) -> int:
        return max(1, min(self.width, MASK_WORK // max(1, operators) ** 2))


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


def _schedule(capacity: int, widest: int) -> Iterator[tuple[Rule, int]]:
    width = 1
    while True:
        for returning in (True, False):
            yield Rule(capacity, returning=returning), width
        if width == widest:
            return
        width = min(4 * width, widest)


def _halted(budget: Budget) -> Callable[[], bool]:
    """Whether to end now: told to stop, or out of time where clocks may decide."""
    if budget.deterministic:
        return budget.stop.is_set
    return lambda: budget.remaining_s <= 0
