"""The joint optimum: the order and residency that move the fewest bytes, with a bound over every order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from ...errors import Infeasible, InternalError, OptionError
from ..order.beam import BeamOrder
from ..order.problem import OrderProblem
from ..residency.gaps import base_bytes
from ..residency.ilp import IlpResidency
from ..residency.workset import aligned_bytes, planned_buffers, require_fit
from .search import BestFirst
from .states import StateSpace, order_of

__all__ = ["BestFirstJoint"]

FIRST_STATES = 4_000  # expanded before other methods look for a better order: enough for most networks, well under 1 s
QUANTUM_STATES = 2_000  # expanded between two reports
PROHIBITIVE = 1 << 60  # bytes, more than any plan moves
ORDER_SHARE = 0.35  # of the time left, for finding a good order when the first states do not settle it


@dataclass(frozen=True)
class BestFirstJoint:
    """Choose order and residency together so that the fewest bytes move, and prove how few that can be.

    *Given* a plan. *Result*: an order with loads, stores and residences, never worse than ``residency/ilp`` on the
    plan's own order, certified over every order and residency.

    Formulation: A* over states (operators done, buffers kept, which of these backing memory holds), see ``states.py``.
    Its cost is the additional traffic so far, so the first state popped in which everything has run is optimal, and
    when time or memory end before, the least cost still open is the bound. A short search settles most networks; where
    it does not, ``order/beam`` supplies an incumbent, below which the search goes on. ``max_states`` limits what is
    held in memory (about 1 KiB each, more in graphs of many thousand operators). ``reserve_bytes`` of the capacity
    are left free, except where an operator needs them, so that addresses find room; nothing is proven then.
    In deterministic mode the search ends by ``max_expanded`` states instead of a clock.
    """

    max_states: int = 1_000_000
    max_expanded: int = 200_000
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
        search = self._searched(_problem(plan), best, budget)
        certificate = _certificate(best, search, self.reserve_bytes)
        return Decision(best.plan, certificate, _note(search, best, budget))

    def _searched(self, problem: OrderProblem, best: _Incumbent, budget: Budget) -> BestFirst:
        memory = best.given.machine.scratchpad_memory
        capacity = aligned_bytes(memory.capacity_bytes, memory.alignment_bytes) - self.reserve_bytes
        largest = max((sum(problem.footprint[b] for b in touched) for touched in problem.touches), default=0)
        space = StateSpace(problem, max(capacity, largest))
        search = BestFirst(space, space.root(), best.ceiling)
        self._run(search, best, budget, FIRST_STATES)
        if not search.is_complete and budget.remaining_s > 0:
            ordered = BeamOrder().apply(best.given, budget if budget.deterministic else budget.share(ORDER_SHARE))
            best.offer(ordered.plan.order, "order/beam")
            search.ceiling = best.ceiling
            self._run(search, best, budget, self.max_expanded if budget.deterministic else None)
        if search.found is not None:
            best.offer(order_of(search.found), self.name)
        return search

    def _run(self, search: BestFirst, best: _Incumbent, budget: Budget, limit: int | None) -> None:
        """Search on in quanta until complete, ``limit`` states were expanded, or time or memory end."""
        halted = _halted(budget)
        while not (search.is_complete or halted() or search.size >= self.max_states):
            if limit is not None and search.expanded >= limit:
                return
            until = search.expanded + QUANTUM_STATES if limit is None else min(limit, search.expanded + QUANTUM_STATES)
            search.run(lambda until=until: halted() or search.expanded >= until)  # type: ignore[misc]
            best.tell(best.base + search.bound)


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
    def value(self) -> int:
        """Its additional traffic, in bytes."""
        return PROHIBITIVE if self.found is None else self.found[1]

    @property
    def ceiling(self) -> int:
        """What a better order would have to stay below, in bytes that depend on the order."""
        return self.value - (0 if self.found is None else self.base)

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


def _problem(plan: Plan) -> OrderProblem:
    """The order problem, in which it costs too much to drop what is pinned as resident."""
    problem = OrderProblem.of(plan)
    staying = {pin.buffer for pin in plan.pins if pin.resident}
    nbytes = (PROHIBITIVE if name in staying else size for name, size in planned_buffers(plan).items())
    return replace(problem, nbytes=tuple(nbytes))


def _certificate(best: _Incumbent, search: BestFirst, reserve_bytes: int) -> Certificate:
    proven = best.base if reserve_bytes else best.base + search.bound
    proved_by: Literal["analytic", "exhaustive"] = "exhaustive" if proven > best.base else "analytic"
    return Certificate("additional_traffic_bytes", best.value, min(proven, best.value), proved_by, "order")


def _note(search: BestFirst, best: _Incumbent, budget: Budget) -> str:
    note = f"order by {best.method}; {search.expanded:,} states"
    if search.is_complete:
        return note
    return f"{note} before the {'time' if budget.remaining_s <= 0 else 'search'} limit"


def _halted(budget: Budget) -> Callable[[], bool]:
    """Whether to end now: told to stop, or out of time where clocks may decide."""
    return budget.stop.is_set if budget.deterministic else lambda: budget.remaining_s <= 0
