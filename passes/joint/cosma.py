"""COSMA's integer program, repaired: order, residency and addresses in one model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from .._solver.highs import Solution, whole_units
from ..residency.gaps import GapProblem, base_bytes
from ..residency.workset import require_fit
from ._cosma_addresses import Addresses, heights_of
from ._cosma_crossing import crossing_bound
from ._cosma_model import CosmaModel
from ._cosma_peak import least_peak
from ._cosma_problem import CosmaProblem
from ._cosma_solutions import (
    Found,
    decided_of,
    dropped_of,
    heuristic,
    placed_heuristic,
    polished,
    written,
    written_placed,
)
from ._cosma_solve import MAX_STEPS, ended, solved, too_large

__all__ = ["Cosma"]


@dataclass(frozen=True)
class Cosma:
    """Decide order, residency and addresses together, by the integer program of COSMA.

    *Given* a plan, whose order and the cheaper of Belady's and the least-cost rule are where the search starts.
    *Result*, by ``mode``: ``joint`` a plan of any order with loads, stores and residences, and the least additional
    traffic; ``fixed`` (COSMA FS) the same for the plan's own order; ``peak`` (MPMF) the order alone whose peak memory
    is least when nothing is moved twice. With ``addresses``, residences have offsets and the optimum is over plans
    that can be placed; without, bytes are counted and an address pass may follow. ``peak`` never has addresses.

    The formulation is Eq. 1 to 17 of Li, Gupta and Malik, "COSMA" (arXiv 2311.18246), with the gaps closed that an
    independent reproduction found (``docs/formulations/cosma.md``). Where they differ, its definitions are this
    project's:

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
            return least_peak(self.name, plan, budget, cuts=self.cuts)
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
        refusal = too_large(what, of, terms, self.budget)
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

        solution = solved(model, start, budget, listen)
        self.bound = max(self.bound, of.constant_bytes + of.unit * whole_units(solution.bound, columns))
        self.notes.append(f"{columns:,} columns, {ended(solution, self.budget)}")
        return solution

    def _keep(self, found: Found | None) -> None:
        if found is not None and found.value < self.best.value:
            self.best = found
            self._tell(found.value, min(found.value, self.bound))

    def _tell(self, value: int, bound: int) -> None:
        self.budget.listen(Progress(self.options.name, time.monotonic() - self.begin, value, bound))
