"""COSMA's integer program, repaired: order, residency and addresses in one model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from ...errors import InternalError
from .._solver.highs import Listener, Solution, solve
from ..order.problem import OrderProblem
from ..residency.gaps import GapProblem, base_bytes
from ..residency.workset import require_fit
from ._cosma_addresses import Addresses, heights_of
from ._cosma_crossing import crossing_bound, crossing_peak
from ._cosma_model import CosmaModel
from ._cosma_problem import CosmaProblem, whole_units
from ._cosma_solutions import (
    Found,
    decided_of,
    dropped_of,
    first_fetches,
    heuristic,
    placed_heuristic,
    polished,
    written,
    written_placed,
)

__all__ = ["Cosma"]

MAX_STEPS = 5_000  # operators beyond which even the windows of a free order take too long
MAX_TERMS = 4_000_000  # non-zeros beyond which HiGHS does not get past the root in any reasonable time
TERMS_PER_S = 150_000  # built and presolved on one busy core
# In deterministic mode no clock may decide. HiGHS counts no work but nodes, and spends most of it at the root, so it is
# the model that is limited: to what a busy core ends with in seconds.
DETERMINISTIC_NODES = 200
DETERMINISTIC_TERMS = {"model": 200_000, "model with addresses": 30_000}
DETERMINISTIC_FREEDOM = 200


@dataclass(frozen=True)
class Cosma:
    """Decide order, residency and addresses together, by the integer program of COSMA.

    *Given* a plan, whose order and the cheaper of Belady's and the least-cost rule are where the search starts.
    *Result*, by ``mode``: ``joint`` a plan of any order with loads, stores and residences, and the least additional
    traffic; ``fixed`` (COSMA FS) the same for the plan's own order; ``peak`` (MPMF) the order alone whose peak memory
    is least when nothing is moved twice. With ``addresses``, residences have offsets and the optimum is over plans
    that can be placed; without, bytes are counted and an address pass may follow. ``peak`` never has addresses.

    The formulation is Eq. 1 to 17 of Li, Gupta and Malik, "COSMA" (arXiv 2311.18246), with the gaps closed that an
    independent reproduction found (``docs/formulations.md``). Its definitions are this project's where they differ:

    * The paper counts a store and a fetch for whatever is not preserved. Here a source lies in backing memory
      beforehand, so it is fetched without a store, and its first fetch is compulsory, not additional; an output must
      be stored once it is final, so that store is not additional either, and its later fetches need no other.
    * A version is what one write leaves. An update in place needs the version before it and takes its room; the
      backing copy of the old version is stale, so the new one has a store of its own to pay.
    * Weights join as sources where they are not streamed; streamed ones take no part.
    * Stores end before the next operator's fetches begin, so what is spilled takes no room at the step of its spill,
      and may be fetched to another place right after it.

    Eq. 9 to 11 are added only when the optimum without them cannot be placed: as a relaxation its bound is valid for
    both. They know neither banks nor pinned offsets; placing does, so those cost the proof at most. With ``cuts``, what
    no order avoids (``_cosma_crossing``) is asked first and added to the joint model as a floor; the published model
    has no such thing, and often a root bound of 0. A model too large for the time left is not built: the start is
    returned, and the note says so. In deterministic mode models are limited by their size, and the search by nodes.
    """

    mode: Literal["joint", "fixed", "peak"] = "joint"
    addresses: bool = True
    cuts: bool = True

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "joint/cosma"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide.

        Raises:
            Infeasible: an operator's working set alone exceeds the scratchpad, or what is pinned as resident does not
                fit beside it in the plan's order (neither in mode ``peak``).
        """
        if self.mode == "peak":
            return _least_peak(self, plan, budget)
        require_fit(plan)
        search = _Search(self, plan, budget)
        search.run()
        return search.decision()


@dataclass
class _Search:
    """The best plan found and the best bound proven, in bytes, while models of growing detail are solved."""

    options: Cosma
    plan: Plan
    budget: Budget
    notes: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)
    best: Found = field(init=False)
    bound: int = field(init=False)

    def __post_init__(self) -> None:
        self.floor = self.bound = base_bytes(self.plan)
        if self.options.addresses:
            self.best = placed_heuristic(self.plan, self.budget.share(0.4))
        else:
            self.best = written(self.plan, *heuristic(self.plan))
        self._tell(self.best.value, self.bound)

    def run(self) -> None:
        """Solve without addresses, place what came out, and only if that fails solve with them."""
        if self._is_done():
            return
        fixed = self.options.mode == "fixed"
        if not fixed and len(self.plan.graph.ops) > MAX_STEPS:
            self.notes.append(f"a model of {len(self.plan.graph.ops)} steps is too large; this is the start")
            return
        of = CosmaProblem.of(self.plan, self.floor, fixed=fixed)
        if self.options.cuts and not fixed and self.budget.remaining_s > 0:
            proven = crossing_bound(self.plan.graph, of, self.floor, self.budget.share(0.3))
            self.bound = max(self.bound, proven)
            self._place_again()
        if self._is_done():
            self.notes.append("no order moves less")
            return
        if not self._fits("model", of, of.terms()):
            return
        self._solve_relaxed(of)
        if not self.options.addresses or self._is_done():
            return
        if self._fits("model with addresses", of, of.terms() + of.address_terms()):
            self._solve_placed(of)

    def _place_again(self) -> None:
        """Where the start is proven but for its addresses, they are worth more time than a model."""
        gaps, dropped = heuristic(self.plan)
        if gaps.additional_bytes(dropped) <= self.bound < self.best.value:
            self._keep(written_placed(self.plan, gaps, dropped, self.budget.share(0.5)))

    def decision(self) -> Decision:
        """The best plan with its certificate."""
        bound = min(self.bound, self.best.value)
        certificate = Certificate(
            "additional_traffic_bytes",
            self.best.value,
            bound,
            "ilp" if bound > self.floor else "analytic",
            "residency" if self.options.mode == "fixed" else "order",
        )
        return Decision(self.best.plan, certificate, "; ".join(self.notes))

    def _is_done(self) -> bool:
        return self.best.value <= self.bound

    def _fits(self, what: str, of: CosmaProblem, terms: int) -> bool:
        refusal = _too_large(what, of, terms, self.budget)
        if refusal:
            self.notes.append(refusal)
        return not refusal

    def _solve_relaxed(self, of: CosmaProblem) -> None:
        model = CosmaModel(of, least_bytes=self.bound)
        gaps = GapProblem.of(self.best.plan)
        start = model.start(decided_of(of, self.best.plan.order, gaps, self.best.dropped))
        share = 0.5 if self.options.addresses else 1.0
        solution = self._solve(model, start, self.budget.share(share), model.columns)
        decided = model.decided(solution.values) if solution.values else None
        if decided is None:
            return
        ordered = self.plan.with_order(decided[0])
        gaps = GapProblem.of(ordered)
        dropped = polished(gaps, dropped_of(of, gaps, decided))
        if not self.options.addresses:
            self._keep(written(ordered, gaps, dropped))
            return
        if gaps.additional_bytes(dropped) < self.best.value:
            self._keep(written_placed(ordered, gaps, dropped, self.budget.share(0.3)))
        if ordered.order != self.plan.order and not self._is_done():
            self._keep(placed_heuristic(ordered, self.budget.share(0.3)))

    def _solve_placed(self, of: CosmaProblem) -> None:
        model = CosmaModel(of, least_bytes=self.bound)
        addresses = Addresses(model, self.plan)
        gaps = GapProblem.of(self.best.plan)
        start = model.start(decided_of(of, self.best.plan.order, gaps, self.best.dropped))
        start.update(addresses.start(heights_of(self.best.plan), start))
        solution = self._solve(model, start, self.budget, model.columns + addresses.columns)
        decided = model.decided(solution.values) if solution.values else None
        if decided is None:
            return
        ordered = self.plan.with_order(decided[0])
        gaps = GapProblem.of(ordered)
        dropped = dropped_of(of, gaps, decided)
        if gaps.additional_bytes(dropped) < self.best.value and (gaps.slack(dropped) >= 0).all():
            heights = addresses.heights(solution.values)
            self._keep(written_placed(ordered, gaps, dropped, self.budget, heights))

    def _solve(self, model: CosmaModel, start: dict[str, float], budget: Budget, columns: int) -> Solution:
        of = model.of

        def listen(objective: float | None, bound: float | None) -> None:
            value = self.best.value
            if objective is not None:
                value = min(value, of.constant_bytes + of.unit * round(objective))
            proven = (
                self.bound
                if bound is None
                else max(self.bound, of.constant_bytes + of.unit * whole_units(bound, columns))
            )
            self._tell(value, min(value, proven))

        solution = _solved(model, start, budget, listen)
        self.bound = max(self.bound, of.constant_bytes + of.unit * whole_units(solution.bound, columns))
        ended = "solved" if solution.status == "optimal" else _limit(self.budget)
        self.notes.append(f"{columns:,} columns, {ended}")
        return solution

    def _keep(self, found: Found | None) -> None:
        if found is not None and found.value < self.best.value:
            self.best = found
            self._tell(found.value, min(found.value, self.bound))

    def _tell(self, value: int, bound: int) -> None:
        self.budget.listen(Progress(self.options.name, time.monotonic() - self.begin, value, bound))


def _least_peak(options: Cosma, plan: Plan, budget: Budget) -> Decision:
    """Eq. 13 to 15: the order of least peak when every buffer stays from its first to its last use."""
    begin = time.monotonic()
    problem = OrderProblem.of(plan)
    order, value, analytic = plan.order, problem.peak_bytes(plan.order), problem.largest_working_set()
    bound, note = analytic, ""
    if value > analytic and len(plan.graph.ops) > MAX_STEPS:
        note = f"a model of {len(plan.graph.ops)} steps is too large; this is the given order"
    elif value > analytic and budget.remaining_s > 0:
        of = CosmaProblem.of(plan, 0, fixed=False)
        if options.cuts:
            bound = analytic = max(analytic, crossing_peak(plan.graph, of))
        if value > bound:
            order, proven, note = _search_peak(options.name, of, problem, plan.order, budget)
            value, bound = problem.peak_bytes(order), max(bound, proven)
    elif value > analytic:
        note = "the time limit came first"
    budget.listen(Progress(options.name, time.monotonic() - begin, value, bound))
    certificate = Certificate("peak_bytes", value, bound, "ilp" if bound > analytic else "analytic", "order")
    return Decision(plan.with_order(order), certificate, note)


def _search_peak(
    name: str, of: CosmaProblem, problem: OrderProblem, start: tuple[int, ...], budget: Budget
) -> tuple[tuple[int, ...], int, str]:
    """An order no worse than ``start``, what no order's peak is below, and a remark."""
    if refusal := _too_large("model", of, of.terms(), budget):
        return start, 0, refusal
    begin = time.monotonic()
    value = problem.peak_bytes(start)
    model = CosmaModel(of, peak=True)

    def listen(objective: float | None, bound: float | None) -> None:
        found = value if objective is None else min(value, of.unit * round(objective))
        proven = 0 if bound is None else min(found, of.unit * whole_units(bound, model.columns))
        budget.listen(Progress(name, time.monotonic() - begin, found, proven))

    solution = _solved(model, model.start((start, first_fetches(of, start))), budget, listen)
    decided = model.decided(solution.values) if solution.values else None
    candidates = [start] if decided is None else [decided[0], start]
    best = min(candidates, key=problem.peak_bytes)
    proven = min(problem.peak_bytes(best), of.unit * whole_units(solution.bound, model.columns))
    ended = "solved" if solution.status == "optimal" else _limit(budget)
    return best, proven, f"{model.columns:,} columns, {ended}"


def _solved(model: CosmaModel, start: dict[str, float], budget: Budget, listen: Listener) -> Solution:
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


def _too_large(what: str, of: CosmaProblem, terms: int, budget: Budget) -> str:
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


def _limit(budget: Budget) -> str:
    if budget.deterministic and budget.remaining_s > 0:
        return "the search limit came first"
    return "the time limit came first" + (", so another run may differ" if budget.deterministic else "")
