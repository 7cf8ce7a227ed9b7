"""Exact placement: first fit where it suffices, CP-SAT where it does not, an explanation where nothing can."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Plan
from ...errors import OptionError
from .conflict import reduced
from .gaps import PRIORITIES, best_of, stacked
from .no_overlap import Answer, Verdict
from .packing import Packing
from .placement import check_fullest_step, no_placement, placed
from .repair import fit_by_repair

__all__ = ["ExactPlacement"]

FIRST_QUESTION_SECONDS = 0.5  # of the first round of minimising


@dataclass(frozen=True)
class ExactPlacement:
    """Place all residences within the capacity, or prove that some of them cannot lie together.

    *Given* a plan with residences. *Result*: their offsets; with ``minimize``, in the least arena that could be
    found and proven within the budget. Steps that no residence crosses split the problem. A part that first fit or
    best fit solves is done; every other is asked of CP-SAT and of a search for canonical placements in turn, then of
    CP-SAT around what ends too high, in windows of steps that grow to the whole part (``repair.fit_by_repair``,
    ``no_overlap.fit_by_constraints``, ``restarts.fit_by_search``).
    Minimising asks for capacities by bisection between the bytes of the fullest step and the best arena so far, in
    rounds of ever longer questions: what is easy to answer is answered first, wherever it lies.

    ``effort`` is the limit of a question in CP-SAT's deterministic seconds, used in deterministic mode only.
    """

    minimize: bool = False
    effort: float = 20.0

    def __post_init__(self) -> None:
        if self.effort <= 0:
            raise OptionError(f"address/exact: option 'effort' is {self.effort}; it takes more than 0 seconds")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "address/exact"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Place all residences.

        Raises:
            PlacementError: some cannot be placed together (``proven``), or no placement was found in time.
        """
        packing = Packing.of(plan, self.name)
        search = _Search(self, packing, budget, check_fullest_step(packing))
        search.start()
        for items in search.too_high(packing.capacity):
            search.fit(items)
        if self.minimize:
            search.minimize()
        return placed(plan, packing, search.offsets, bound=search.bound, by_search=search.by_search)


@dataclass
class _Part:
    """A component whose arena is minimised: no arena below ``first`` bytes is possible, as a search may have proven."""

    items: list[int]
    grain: int
    first: int
    by_search: bool = False

    @classmethod
    def of(cls, packing: Packing, items: list[int]) -> _Part:
        grain = packing.grain(items)
        least = max(packing.fullest_step(items)[0], packing.least_end(items))
        return cls(items, grain, -(-least // grain) * grain)

    def least_above(self, floor: int) -> int:
        """The least arena in question, when one that ends at ``floor`` is as good as any lower one."""
        return max(self.first, floor // self.grain * self.grain)


@dataclass
class _Search:
    """Offsets so far, in units by item, and the proven lower ``bound`` on the arena, in bytes."""

    options: ExactPlacement
    packing: Packing
    budget: Budget
    bound: int
    by_search: bool = False
    offsets: list[int] = field(default_factory=list)
    components: list[list[int]] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Place everything by the better of first fit and best fit, or side by side, whatever the arena."""
        self.offsets = [0] * len(self.packing.items)
        self.components = self.packing.components()
        for items in self.components:
            found = best_of(self.packing, items, PRIORITIES)
            if self.options.minimize or self.packing.arena_bytes(items, found) > self.packing.capacity:
                others = best_of(self.packing, items, PRIORITIES, tightest=True), stacked(self.packing, items)
                found = min(found, *others, key=lambda offsets: self.packing.arena_bytes(items, offsets))
            self._keep(items, found)
        self._tell()

    def too_high(self, capacity: int) -> list[list[int]]:
        """Components that end above ``capacity`` bytes."""
        return [items for items in self.components if self._arena(items) > capacity]

    def fit(self, items: list[int]) -> None:
        """Place a component within the machine's capacity. Raises PlacementError."""
        answer, window = self._ask(items, self.packing.capacity, self._seconds(1.0))
        if answer.verdict is Verdict.PLACED:
            self._keep(items, answer.offsets)
            self._tell()
            return
        arena = self._arena(self.packing.items)
        if answer.verdict is Verdict.UNKNOWN:
            raise no_placement(self.packing, window, proven=False, required_bytes=arena)
        conflict = reduced(self.packing, window, self.budget, seconds=self._seconds(0.3))
        raise no_placement(self.packing, conflict, proven=True, required_bytes=arena)

    def _ask(self, items: list[int], capacity: int, limit: float) -> tuple[Answer, list[int]]:
        """Whether ``items`` fit ``capacity``, in ``limit`` seconds or a little more."""
        offsets = [self.offsets[i] for i in items]
        return fit_by_repair(
            self.packing,
            items,
            offsets,
            capacity,
            self.budget,
            seconds=lambda complete: (0.9 if complete else 0.12) * min(limit, self._seconds(1.0)),
        )

    def minimize(self) -> None:
        """Lower the arena, in rounds over the components from the highest down, until it meets the bound or time ends.

        A component needs to end no lower than the bound of all, and in one round no lower than those before it did.
        """
        parts = [_Part.of(self.packing, items) for items in self.components]
        for limit in self._limits():
            floor = self.bound
            for part in sorted(parts, key=lambda part: self._arena(part.items), reverse=True):
                self._lower(part, floor, limit)
                floor = max(floor, self._arena(part.items))
                if part.first > self.bound:
                    self.bound, self.by_search = part.first, part.by_search
            if self._arena(self.packing.items) <= self.bound or self.budget.halted():
                break
        self._tell()

    def _lower(self, part: _Part, floor: int, limit: float) -> None:
        """One round for a component: search capacities between ``floor`` and its arena, ``limit`` for each question.

        The first question is the least capacity, which often holds. Questions that time left open count as too small
        for where to look next in their round, never for what is proven.
        """
        if self._arena(part.items) <= floor:
            return
        asked = middle = part.least_above(floor)
        near = (self._arena(part.items) - asked) // 8  # closer to the arena only if longer questions gain nothing
        while asked < self._arena(part.items) - near and not self.budget.halted():
            answer, _ = self._ask(part.items, middle, limit)
            if answer.verdict is Verdict.PLACED:
                self._keep(part.items, answer.offsets)
                self._tell()
            else:
                asked = middle + part.grain
                if answer.verdict is Verdict.IMPOSSIBLE:
                    part.first, part.by_search = asked, True
            middle = (asked + self._arena(part.items)) // 2 // part.grain * part.grain

    def _limits(self) -> Iterator[float]:
        """Seconds for each question of a round, round by round."""
        if self.budget.deterministic:
            yield from (self.options.effort / divisor for divisor in (16, 4, 1))
            return
        limit = FIRST_QUESTION_SECONDS
        while True:
            yield limit
            limit *= 4

    def _seconds(self, share: float) -> float:
        return share * (self.options.effort if self.budget.deterministic else self.budget.remaining_s)

    def _arena(self, items: Sequence[int]) -> int:
        return self.packing.arena_bytes(items, (self.offsets[i] for i in items))

    def _keep(self, items: Sequence[int], offsets: Sequence[int]) -> None:
        for item, offset in zip(items, offsets, strict=True):
            self.offsets[item] = offset

    def _tell(self) -> None:
        arena = self._arena(self.packing.items)
        self.budget.listen(Progress(self.options.name, time.monotonic() - self.begin, arena, self.bound))
