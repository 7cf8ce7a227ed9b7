"""Residency and addresses together: what comes back from addresses, and that the result is the joint optimum."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget, Decision
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.passes.address.exact import ExactPlacement
from opweave.passes.address.placement import PlacementError
from opweave.passes.planner import Planner, place
from opweave.passes.registry import make
from opweave.passes.residency.emit import emit
from opweave.passes.residency.gaps import GapProblem
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import machine
from tests.passes.residency.crowded import crowded_graphs


def tight(graph: Graph, extra: int) -> Plan:
    """The graph's own order in a scratchpad of the least size and ``extra`` bytes."""
    plan = Plan.of_order(graph, machine())
    capacity = max(16, least_capacity(plan) + extra)
    return Plan.of_order(graph, machine().with_scratchpad(capacity))


def best_placeable(plan: Plan) -> int:
    """Least additional traffic of any residency of the order that has a placement, by trying all, cheapest first."""
    problem = GapProblem.of(plan)
    gaps = range(len(problem.intervals))
    choices = (chosen for size in range(len(gaps) + 1) for chosen in combinations(gaps, size))
    for dropped in sorted(choices, key=problem.additional_bytes):
        if (problem.slack(dropped) >= 0).all() and _placeable(emit(plan, problem, dropped)):
            return problem.additional_bytes(dropped)
    raise AssertionError("dropping everything is always placeable")


def _placeable(plan: Plan) -> bool:
    try:
        ExactPlacement().apply(plan, Budget.of_seconds(30, deterministic=True))
    except PlacementError as error:
        if not error.proven:
            raise
        return False
    return True


@settings(deadline=None, max_examples=60)
@given(crowded_graphs(max_ops=5))
def test_residency_and_addresses_are_optimal_together(graph: Graph) -> None:
    """Cuts from addresses lead the ILP to the cheapest residency that can be placed, and never past it."""
    plan = tight(graph, 32)
    if len(GapProblem.of(plan).intervals) > 10:
        return
    placed = place(plan, IlpResidency(), ExactPlacement(), Budget.of_seconds(60, deterministic=True))
    result = verify(placed)
    assert result.faults == ()
    assert result.additional_bytes == best_placeable(plan)
    certificate = next(c for c in placed.certificates if c.objective == "additional_traffic_bytes")
    assert certificate.bound == certificate.value == result.additional_bytes


def fragmenting() -> Plan:
    """A graph whose cheapest residency fits 192 bytes at every step, and yet has no placement there."""
    sizes = {"x": 1, "a": 3, "b": 4, "c": 5, "d": 6, "e": 3, "f": 7, "g": 3, "y": 1}
    reads = {"a": ["x"], "b": ["a"], "c": ["b"], "d": ["x"], "e": ["a"], "f": ["e", "x"], "g": ["d"], "y": ["e"]}
    roles = {"x": Role.INPUT, "y": Role.OUTPUT}
    tensors = tuple(Tensor(n, (16 * size,), "int8", roles.get(n, Role.ACTIVATION)) for n, size in sizes.items())
    ops = tuple(Op(f"op_{made}", tuple(read), (made,)) for made, read in reads.items())
    return Plan.of_order(Graph("fragmenting", tensors, ops, ("y",)), machine().with_scratchpad(192))


def test_a_residency_without_placement_comes_back_as_a_cut() -> None:
    """Counting bytes alone is too cheap; the conflict makes the ILP find the cheapest residency that has a place."""
    plan = fragmenting()
    alone = IlpResidency().apply(plan, Budget.of_seconds(30)).certificate
    placed = place(plan, IlpResidency(), ExactPlacement(), Budget.of_seconds(60))
    together = next(c for c in placed.certificates if c.objective == "additional_traffic_bytes")
    assert "cuts" in " ".join(record.note for record in placed.passes)
    assert alone is not None
    assert alone.value < together.value == together.bound == best_placeable(plan)
    assert verify(placed).faults == ()


@dataclass(frozen=True)
class Refusing:
    """Places nothing larger than ``limit`` of all residences together, and proves nothing."""

    limit: int

    @property
    def name(self) -> str:
        return "address/refusing"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        longest = max((r.end - r.begin for r in plan.residences or ()), default=0)
        if longest > self.limit:
            raise PlacementError("no", conflict=(), proven=False, required_bytes=1, available_bytes=0)
        return ExactPlacement().apply(plan, budget)


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("residency", ["residency/ilp", "residency/belady", "residency/least_cost"])
def test_addresses_that_give_up_still_end_in_a_plan(residency: str, limit: int) -> None:
    """When the method places only the shortest residences, or none, those are what the plan has, with an honest gap."""
    plan = tight(fragmenting().graph, 64)
    placed = place(plan, make(residency), Refusing(limit), Budget.of_seconds(20))
    result = verify(placed)
    assert result.faults == ()
    assert result.level == "address"
    certificate = next(c for c in placed.certificates if c.objective == "additional_traffic_bytes")
    assert certificate.value == result.additional_bytes > certificate.bound


def test_a_stop_in_a_scratchpad_between_two_multiples_of_the_alignment_still_gives_a_plan() -> None:
    """One byte on top of two: 8 bytes hold them only with the most padded on top, and no time to search for that."""
    tensors = (Tensor("x", (1,), "int8", Role.INPUT), Tensor("y", (2,), "int8"), Tensor("x1", (1,), "int8", buffer="x"))
    ops = (Op("f", ("x",), ("y",)), Op("g", ("x",), ("x1",)))
    plan = Plan.of_order(Graph("odd", tensors, ops, ("x1",)), machine(8, 7))
    budget = Budget.of_seconds(20)
    budget.stop.set()
    assert least_capacity(plan) == 8
    assert verify(Planner().plan(plan, budget)).faults == ()


@dataclass(frozen=True)
class GivingUp:
    """Proves that the residency without cuts has no placement, and gives up on the first one with a cut."""

    @property
    def name(self) -> str:
        return "address/giving_up"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        if plan.passes[-1].note.endswith("1 placement cuts"):
            raise PlacementError("no", conflict=(), proven=False, required_bytes=1, available_bytes=0)
        return ExactPlacement().apply(plan, budget)


def test_what_cuts_have_proven_stays_proven_when_addresses_give_up() -> None:
    """The residencies tried then, with little held back, must not be those that the cuts have excluded."""
    plan = fragmenting()
    placed = place(plan, IlpResidency(), GivingUp(), Budget.of_seconds(20))
    certificate = next(c for c in placed.certificates if c.objective == "additional_traffic_bytes")
    assert verify(placed).faults == ()
    assert certificate.value >= best_placeable(plan) >= certificate.bound > 0


def test_the_planner_names_what_it_lacks() -> None:
    plan = fragmenting()
    small = Plan.of_order(plan.graph, machine().with_scratchpad(16))
    with pytest.raises(Infeasible, match="op_f") as error:
        Planner().plan(small, Budget.of_seconds(5))
    assert error.value.required_bytes == 16 * 11
