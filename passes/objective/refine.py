"""From a placed plan to a better one, by several objectives in order of importance."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import msgspec

from ...compiler.pipeline import Budget, Progress, confirm, run_pass
from ...compiler.plan import PassRecord, Plan
from ...errors import Infeasible, OptionError
from ...hw_models.model import aligned_bytes
from ..address.exact import ExactPlacement
from ..latency.bound import latency_certificate
from ..latency.issue import issue
from ..latency.memory import Bytes
from ..latency.prefetch import Prefetch
from ..latency.transfers import TransferProblem, rebuilt, step_seconds
from ..order.problem import OrderProblem
from ..residency.ilp import IlpResidency
from ..residency.least_cost import LeastCostResidency
from ..residency.workset import least_capacity
from .claims import for_another_order, for_the_full_capacity, restated
from .measures import Objective, floors, measured
from .neighbours import neighbour

__all__ = ["Replan", "refine"]

#: Decides residency and addresses of an ordered plan; raises Infeasible.
Replan = Callable[[Plan, Budget], Plan]

NAME = "objective/refine"
PROBES = 8  # capacities tried
ROUNDS = 5  # times in a row that looking for another order may bring nothing
SCREENED = 100_000  # operators x orders estimated in one round, within the limits that follow
FEWEST, MOST = 20, 400
SLOWER = 50  # an estimate of latency takes that many times as long as one of bytes


def refine(plan: Plan, objectives: Sequence[Objective], replan: Replan, budget: Budget) -> Plan:
    """Search near a placed ``plan`` for one that is lexicographically smaller in ``objectives``.

    Three neighbourhoods in turn: other steps for loads and stores (``latency/prefetch``, for ``latency``), smaller
    scratchpads by bisection (for ``peak`` and ``arena``: what fits one fits the real one), and other orders, drawn at
    random near the best one, screened by estimates and planned by ``replan``. A plan is accepted only when its
    objectives, recounted by verifier and simulator, are smaller, so an objective never grows but for a gain in an
    earlier one. Ends when the budget does, when every objective has reached its lower bound, or when nothing more was
    found; in deterministic mode no clock decides. The plan returned carries a record of what was gained.

    Raises:
        OptionError: the plan has no addresses yet.
    """
    if any(r.offset is None for r in plan.residences or ()) or plan.residences is None:
        raise OptionError("refining by objectives takes a placed plan", hint="decide residency and addresses before it")
    search = _Search(plan, tuple(objectives), replan, budget)
    search.prefetch()
    search.squeeze()
    search.reorder()
    return search.result()


class _Search:
    """The best plan so far, and its ``values`` by objective."""

    def __init__(self, plan: Plan, objectives: tuple[Objective, ...], replan: Replan, budget: Budget) -> None:
        self.begin = time.monotonic()
        self.given = self.best = plan
        self.objectives = objectives
        self.replan = replan
        self.budget = budget
        self.first = self.values = measured(plan, objectives)
        self.floors = floors(plan, objectives)
        self.longest_s = 0.0  # that planning an order took: with less time left another would come too late
        self.capacity_bytes: int | None = None  # that the best plan was made for, when it is not the machine's

    def halted(self) -> bool:
        """Whether to end: nothing is left to gain, told to stop, or out of time where clocks may decide."""
        if self.budget.stop.is_set() or all(v <= f for v, f in zip(self.values, self.floors, strict=True)):
            return True
        return not self.budget.deterministic and self.budget.remaining_s <= self.longest_s

    def prefetch(self) -> None:
        """Move the transfers of the plan given."""
        if Objective.LATENCY in self.objectives and not self.halted():
            self.offer(run_pass(Prefetch(), self.best, self.budget.share(0.4)))

    def squeeze(self) -> None:
        """Plan the best order for smaller scratchpads: the least that works first, then between it and the peak."""
        machine = self.best.machine
        banked = bool(machine.scratchpad_memory.banks_bytes)  # banks have the sizes they have
        if banked or not {Objective.PEAK, Objective.ARENA} & set(self.objectives):
            return
        squeezed = Objective.PEAK if Objective.PEAK in self.objectives else Objective.ARENA
        alignment = machine.scratchpad_memory.alignment_bytes
        low = max(1, least_capacity(self.best) - 1)
        for probe in range(PROBES):
            high = (measured(self.best, (squeezed,))[0] - 1) // alignment * alignment
            middle = low + 1 if probe == 0 else aligned_bytes((low + high) // 2, alignment)
            if self.halted() or not low < middle <= min(high, machine.scratchpad_memory.capacity_bytes):
                return
            if self.offer(self._planned(self.best.order, self.budget.share(1 / (PROBES - probe + 2)), middle)):
                self.capacity_bytes = middle
            else:
                low = middle

    def reorder(self) -> None:
        """Plan other orders that look better, until ``ROUNDS`` of them in a row were not."""
        if len(self.best.graph.ops) < 2:
            return
        draw = random.Random(self.budget.seed)  # seeded: a search needs variety, not secrecy
        fruitless = 0
        while fruitless < ROUNDS and not self.halted():
            order = self._screened(draw)
            better = order is not None and self.offer(self._planned(order, self.budget.share(0.3), self.capacity_bytes))
            fruitless = 0 if better else fruitless + 1

    def offer(self, plan: Plan | None) -> bool:
        """Keep ``plan`` if its objectives are smaller."""
        values = self.values if plan is None else measured(plan, self.objectives)
        if plan is None or values >= self.values:
            return False
        self.best, self.values = plan, values
        self.budget.listen(Progress(NAME, time.monotonic() - self.begin, values[0], self.floors[0]))
        return True

    def _planned(self, order: Sequence[int], budget: Budget, capacity_bytes: int | None) -> Plan | None:
        """The best plan of ``order``, for a scratchpad of ``capacity_bytes`` if given; ``None`` when nothing fits."""
        begin = time.monotonic()
        base = self.given if tuple(order) == self.given.order else for_another_order(self.given)
        ordered = base.with_order(order)
        try:
            if capacity_bytes is None:
                found = self.replan(ordered, budget)
            elif Objective.ARENA in self.objectives:
                small = self.given.machine.with_scratchpad(capacity_bytes)
                found = self.replan(msgspec.structs.replace(ordered, machine=small), budget)
                found = for_the_full_capacity(msgspec.structs.replace(found, machine=self.given.machine), base)
            else:  # few bytes at a time, wherever they lie
                reserve = self.given.machine.scratchpad_memory.capacity_bytes - capacity_bytes
                resident = run_pass(IlpResidency(reserve_bytes=reserve), ordered, budget.share(0.6))
                found = run_pass(ExactPlacement(), resident, budget)
        except Infeasible:
            return None
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - begin)
        if Objective.LATENCY not in self.objectives:
            return found
        return min(found, run_pass(Prefetch(), found, budget), key=lambda p: measured(p, self.objectives))

    def _screened(self, draw: random.Random) -> list[int] | None:
        """An order whose estimate is smaller than that of the best plan's order, by descent over neighbours."""
        machine = self.given.machine
        if self.capacity_bytes is not None:
            machine = machine.with_scratchpad(self.capacity_bytes)
        problem = OrderProblem.of(msgspec.structs.replace(self.best, machine=machine))
        order = list(self.best.order)
        estimate = start = self._estimate(problem, order)
        cost = len(order) * (SLOWER if Objective.LATENCY in self.objectives else 1)
        for _ in range(max(FEWEST, min(MOST, SCREENED // cost))):
            if self.halted():
                break
            other = neighbour(self.best.graph, order, draw)
            if other == order:
                continue
            found = self._estimate(problem, other, estimate)
            if found <= estimate:
                order, estimate = other, found
        return order if estimate < start else None

    def _estimate(
        self, problem: OrderProblem, order: Sequence[int], limit: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """The objectives of ``order``, estimated without placing anything; no more of them once above ``limit``."""
        values: list[int] = []
        for objective in self.objectives:
            if limit is not None and tuple(values) > limit[: len(values)]:
                break
            match objective:
                case Objective.TRAFFIC:
                    values.append(problem.spill_bytes(order))
                case Objective.PEAK | Objective.ARENA:
                    values.append(min(problem.capacity, problem.peak_bytes(order)))
                case Objective.LATENCY:
                    values.append(self._estimated_latency(order))
        return tuple(values)

    def _estimated_latency(self, order: Sequence[int]) -> int:
        ordered = for_another_order(self.given).with_order(order)
        resident = LeastCostResidency().apply(ordered, self.budget).plan
        seconds = step_seconds(resident)
        problem = TransferProblem.of(resident, seconds, NAME)
        sequence = issue(problem, seconds, Bytes(problem, 0), lambda: False)
        return measured(rebuilt(problem, sequence or []), (Objective.LATENCY,))[0]

    def result(self) -> Plan:
        """The best plan, with its claims restated and a record of what was gained."""
        gains = (
            f"{objective} {before:,} to {after:,} {objective.unit}"
            for objective, before, after in zip(self.objectives, self.first, self.values, strict=True)
            if before != after
        )
        note = ", ".join(gains) or f"nothing smaller found in {', '.join(self.objectives)}"
        plan = restated(self.best)
        certificate = latency_certificate(plan, "order") if Objective.LATENCY in self.objectives else None
        confirm(NAME, plan, certificate)
        return plan.with_record(PassRecord(NAME, time.monotonic() - self.begin, certificate, note))
