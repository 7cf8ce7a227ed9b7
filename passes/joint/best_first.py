"""The joint optimum: the order and residency that move the fewest bytes, with a bound over every order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from ...errors import Infeasible, InternalError, OptionError
from ...hw_models.model import aligned_bytes
from ..order.greedy import list_schedule
from ..order.problem import OrderProblem
from ..order.search import search_orders
from ..residency.gaps import base_bytes
from ..residency.ilp import IlpResidency
from ..residency.workset import planned_buffers, require_fit
from ._cosma_crossing import crossing_bound
from ._cosma_problem import CosmaProblem
from .milestones import milestones, prefixes
from .search import BestFirst
from .states import StateSpace, order_of
from .windows import stretches, windows_bounds

__all__ = ["BestFirstJoint"]

FIRST_STATES = 4_000  # expanded before looking for a better order: enough for most networks, well under 1 s
FIRST_SHARE = 0.15  # of the time left, for those: where states are slow, a good order is worth more
LONG = 2_000  # operators, above which states of the whole graph lead nowhere
QUANTUM_STATES = 2_000  # expanded between two reports
MAX_CROSSED = 6_000  # operators, the square of which in bytes is held for a moment
CROSSING_SHARE = 0.15  # of the time left, for what no order avoids
ORDER_SHARE = 0.25  # of the time left, for finding a good order when the first states do not settle it
PLAIN_SHARE = 0.3  # of the time left, for searching without milestones
WINDOWS_SHARE = 0.5  # of the time then left, for bounds of windows that add up
WINDOWS = ((48, 500), (48, 3_000), (96, 3_000), (96, 20_000), (192, 20_000), (192, 100_000))  # operators, states
SPACING = 20  # operators between two milestones
FIRST_ROUND = 250  # states expanded for a milestone in the first round, four times as many in each that follows


@dataclass(frozen=True)
class BestFirstJoint:
    """Choose order and residency together so that the fewest bytes move, and prove how few that can be.

    *Given* a plan. *Result*: an order with loads, stores and residences, never worse than ``residency/ilp`` on the
    plan's own order, certified over every order and residency.

    Formulation: A* over states (operators done, buffers kept, which of these backing memory holds), see ``states.py``.
    Its cost is the additional traffic so far, so the first state popped in which everything has run is optimal, and
    when time or memory end before, the least cost still open is a bound. So is what has to move because it crosses
    operators in every order (``_cosma_crossing.py``). Where neither settles it, annealing over orders supplies an
    incumbent below which the search goes on, guided by bounds on what is to go from points along that order
    (``milestones.py``), in rounds of growing effort; long graphs are bounded window by window (``windows.py``) instead.
    ``max_states`` limits the states held in memory, about 2 KiB each, more in graphs of many thousand operators. In
    deterministic mode ``max_expanded`` states, one round of windows and one of milestones end the search, not a clock.
    ``reserve_bytes`` of the capacity are left free, except where an operator needs them, so that addresses find room;
    nothing is proven then.
    """

    max_states: int = 500_000
    max_expanded: int = 20_000
    reserve_bytes: int = field(default=0, metadata={"internal": True})

    def __post_init__(self) -> None:
        for option in ("max_states", "max_expanded"):
            if getattr(self, option) < 1:
                raise OptionError(f"{self.name}: option {option!r} is {getattr(self, option)}; it takes 1 or more")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "joint/best_first"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide order and residency.

        Raises:
            Infeasible: as ``require_fit``; or no order was found in which what is pinned as resident leaves room.
        """
        require_fit(plan)
        best = _Incumbent(self.name, plan, budget, self.reserve_bytes)
        problem = _problem(plan)
        memory = plan.machine.scratchpad_memory
        largest = max((sum(problem.footprint[b] for b in touched) for touched in problem.touches), default=0)
        capacity = max(aligned_bytes(memory.capacity_bytes, memory.alignment_bytes) - self.reserve_bytes, largest)
        hunt = _Hunt(self, problem, capacity, best, budget)
        search = hunt.settled()
        proven = 0 if self.reserve_bytes else search.bound
        certificate = _certificate(best, proven, by_ilp=proven == hunt.crossing)
        return Decision(best.plan, certificate, _note(search, best, budget))


class _Hunt:
    """One run of the pass: the incumbent and the bound close in on each other."""

    def __init__(
        self, options: BestFirstJoint, problem: OrderProblem, capacity: int, best: _Incumbent, budget: Budget
    ) -> None:
        self.options, self.problem, self.best, self.budget = options, problem, best, budget
        self.space = StateSpace(problem, capacity)
        self.search = BestFirst(self.space, self.space.root(), best.ceiling)
        self.crossing = 0  # bytes that no order avoids, by the crossing ILP

    def halted(self) -> bool:
        """Whether to end now: told to stop, or out of time where clocks may decide."""
        return self.budget.stop.is_set() or (not self.budget.deterministic and self.budget.remaining_s <= 0)

    def _is_full(self) -> bool:
        """Whether the search may hold no more states."""
        return self.search.size >= self.options.max_states

    def settled(self) -> BestFirst:
        """The search when complete, or when time, memory or work has run out."""
        if not (self.search.is_complete or self.halted()):
            self.search.bound = self.crossing = min(self._crossing(), self.search.ceiling)
        is_long = len(self.space.problem.touches) > LONG
        work = self.options.max_expanded if self.budget.deterministic else FIRST_STATES
        few = min(FIRST_STATES // (10 if is_long else 1), work)
        self._expand(few, self.budget.share(FIRST_SHARE), limited=True)
        if not (self.search.is_complete or self.halted()):
            self._improve_order()
            if not is_long:
                self._expand(work, self.budget.share(PLAIN_SHARE), limited=self.budget.deterministic)
            self._window_by_window(self.budget.share(1.0 if is_long else WINDOWS_SHARE))
        states = min(FIRST_ROUND, work)
        while not (is_long or self.search.is_complete or self.halted()):
            self._round(states)
            states *= 4
            if self.budget.deterministic:
                break
        if self.search.found is not None:
            self.best.offer(order_of(self.search.found), self.options.name)
        return self.search

    def _crossing(self) -> int:
        """Bytes that depend on the order, and that none avoids; 0 where a square of the operators is too much."""
        given = self.best.given
        if len(given.graph.ops) > MAX_CROSSED:
            return 0
        problem = CosmaProblem.of(given, self.best.base, fixed=False)
        return crossing_bound(given.graph, problem, 0, self.budget.share(CROSSING_SHARE))

    def _improve_order(self) -> None:
        orders = search_orders(
            self.problem,
            self.budget.share(ORDER_SHARE),
            seed_orders=[self.best.given.order, list_schedule(self.problem)],
            target=self.search.bound,
        )
        for found in orders:
            if found.spill < self.best.ceiling:
                self.best.offer(found.order, "annealing")
        self.search.ceiling = self.best.ceiling

    def _window_by_window(self, budget: Budget) -> None:
        """Raise the bound by what stretches of the best order must move each, in rounds of growing effort."""
        halted = self.halted if budget.deterministic else lambda: budget.remaining_s <= 0
        known: dict[int, list[int]] = {}  # of the same windows in an earlier round, by their size
        for size, states in WINDOWS[:1] if budget.deterministic else WINDOWS:
            if size >= len(self.best.order) // 2 or self.search.is_complete or halted():
                return
            windows = stretches(prefixes(self.problem, self.best.order, size), self.space.full)
            before = known.get(size) or [0] * len(windows)
            known[size] = windows_bounds(self.problem, self.space.capacity, windows, states, halted, before)
            self.search.bound = max(self.search.bound, min(sum(known[size]), self.search.ceiling))
            self.best.tell(self.best.base + self.search.bound)

    def _round(self, states: int) -> None:
        """Search anew, guided by milestones along the best order that took ``states`` each."""
        cuts = prefixes(self.problem, self.best.order, SPACING)
        known = milestones(self.space, cuts, self.search.milestones, states, self.halted, self._offer_tail)
        bound, expanded = self.search.bound, self.search.expanded
        self.search = BestFirst(self.space, self.space.root(), self.best.ceiling, known, bound, expanded=expanded)
        self._expand(expanded + 4 * states, self.budget, limited=True)

    def _offer_tail(self, done: int, tail: list[int]) -> None:
        order = [op for op in self.best.order if done >> op & 1] + tail
        if self.problem.spill_bytes(order) < self.best.ceiling:
            self.best.offer(order, "milestones")

    def _expand(self, limit: int, budget: Budget, *, limited: bool) -> None:
        """Search on until complete, time or memory end, or ``limit`` states are expanded if work is ``limited``."""
        search, halted = self.search, self.halted if budget.deterministic else lambda: budget.remaining_s <= 0
        while not (search.is_complete or self._is_full() or halted()):
            if limited and search.expanded >= limit:
                return
            until = min(limit, search.expanded + QUANTUM_STATES) if limited else search.expanded + QUANTUM_STATES
            search.run(lambda until=until: self._is_full() or search.expanded >= until or halted())  # type: ignore[misc]
            self.best.tell(self.best.base + search.bound)


class _Incumbent:
    """The best order so far, with its optimal residency; before the first one, why the given order has none."""

    def __init__(self, name: str, plan: Plan, budget: Budget, reserve_bytes: int) -> None:
        self.name, self.given, self.budget = name, plan, budget
        self.residency = IlpResidency(reserve_bytes=reserve_bytes)
        self.begin = time.monotonic()
        self.base = base_bytes(plan)
        self.method = "the given order"
        self.found: tuple[Plan, int] | None = None
        self.failure: Infeasible | None = None
        self.offer(plan.order, self.method)

    @property
    def plan(self) -> Plan:
        """The best plan. Raises Infeasible when there is none."""
        if self.found is None:
            raise self.failure or InternalError("neither a plan nor a reason")
        return self.found[0]

    @property
    def order(self) -> Sequence[int]:
        """The best order; before there is one, the order given."""
        return self.given.order if self.found is None else self.found[0].order

    @property
    def value(self) -> int:
        """Its additional traffic, in bytes."""
        return self.base + _more_than_any_moves(self.given) if self.found is None else self.found[1]

    @property
    def ceiling(self) -> int:
        """What a better order would have to stay below, in bytes that depend on the order."""
        return self.value - self.base

    def offer(self, order: Sequence[int], method: str) -> None:
        """Keep ``order`` if its residency moves fewer bytes; what is pinned may leave it none at all."""
        try:
            decision = self.residency.apply(self.given.with_order(order), self.budget)
        except Infeasible as failure:
            self.failure = self.failure or failure
            return
        assert decision.certificate is not None
        if decision.certificate.value < self.value:
            self.found, self.method = (decision.plan, decision.certificate.value), method
            self.tell(self.base)

    def tell(self, bound: int) -> None:
        """Let the listener know, once there is something to tell."""
        if self.found is not None:
            elapsed = time.monotonic() - self.begin
            self.budget.listen(Progress(self.name, elapsed, self.value, min(bound, self.value)))


def _more_than_any_moves(plan: Plan) -> int:
    """Bytes above what the orders of ``plan`` and their residencies move and what depends on them.

    As small as that is easy to say, so that sums of it, for all that is pinned, are far from the end of 64 bits.
    """
    sized = planned_buffers(plan)
    return 1 + 2 * sum(sized.get(buffer, 0) for touched in plan.graph.touches for buffer in touched)


def _problem(plan: Plan) -> OrderProblem:
    """The order problem, in which it costs too much to drop what is pinned as resident."""
    problem, prohibitive = OrderProblem.of(plan), _more_than_any_moves(plan)
    staying = {pin.buffer for pin in plan.pins if pin.resident}
    nbytes = (prohibitive if name in staying else size for name, size in planned_buffers(plan).items())
    return replace(problem, nbytes=tuple(nbytes))


def _certificate(best: _Incumbent, proven: int, *, by_ilp: bool) -> Certificate:
    """``proven`` are bytes that depend on the order and that none avoids."""
    proved_by: Literal["analytic", "exhaustive", "ilp"] = "ilp" if by_ilp else "exhaustive"
    bound = min(best.base + proven, best.value)
    return Certificate("additional_traffic_bytes", best.value, bound, proved_by if proven else "analytic", "order")


def _note(search: BestFirst, best: _Incumbent, budget: Budget) -> str:
    note = f"order by {best.method}; {search.expanded:,} states"
    if search.is_complete:
        return note
    return f"{note} before the {'time' if budget.remaining_s <= 0 else 'search'} limit"
