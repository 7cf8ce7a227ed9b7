"""Address passes place without collisions; the exact one finds what brute force finds, and explains what it cannot."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget, Pass, Progress, run_pass
from opweave.compiler.plan import Certificate, Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible, OptionError
from opweave.passes.address.best_fit import BestFit
from opweave.passes.address.exact import ExactPlacement
from opweave.passes.address.first_fit import FirstFit
from opweave.passes.address.packing import Packing
from opweave.passes.address.placement import PlacementError
from opweave.passes.order.problem import OrderProblem
from opweave.passes.residency.belady import BeladyResidency
from tests.graphs.build import all_graphs, machine
from tests.graphs.strategies import graphs

from .packings import Box, arena, boxes, faults, least_arena, plan_of

ROOM = 1 << 20
ALL: tuple[Pass, ...] = (
    FirstFit(),
    FirstFit(order="begin"),
    BestFit(),
    BestFit(order="size"),
    ExactPlacement(),
    ExactPlacement(minimize=True),
)

# No step holds more than 4 bytes, and yet 4 do not suffice. b0 and b1 halve the memory, so b1 is a half; b2 and b3
# share the other one, so b4, beside both, begins in b1's; b5 and b6 halve it again, so b3 and b4 share a half.
SWAP: list[Box] = [(0, 2, 2), (1, 3, 2), (2, 4, 1), (2, 5, 1), (3, 5, 1), (4, 6, 2), (5, 7, 2)]


def exact(items: Sequence[Box], capacity: int, alignment: int = 1) -> Plan:
    """The deterministic exact placement. Raises PlacementError."""
    budget = Budget.of_seconds(60, deterministic=True)
    return ExactPlacement().apply(plan_of(items, capacity, alignment), budget).plan


@given(boxes(max_size=12), st.sampled_from([1, 4, 16]), st.sampled_from(ALL))
@settings(max_examples=120, deadline=None)
def test_nothing_collides(items: list[Box], alignment: int, method: Pass) -> None:
    """With room for everything, every method places all residences apart, aligned, and states its arena."""
    decision = method.apply(plan_of(items, ROOM, alignment), Budget.of_seconds(5, deterministic=True))
    assert faults(decision.plan) == []
    assert decision.certificate is not None
    assert decision.certificate.value == arena(decision.plan)
    assert decision.certificate.bound <= decision.certificate.value


@given(boxes(), st.sampled_from([1, 4, 16]))
@settings(max_examples=60, deadline=None)
def test_minimal_arena_is_brute_force(items: list[Box], alignment: int) -> None:
    """Minimising meets the best of all stackings, and proves it."""
    budget = Budget.of_seconds(60, deterministic=True)
    decision = ExactPlacement(minimize=True).apply(plan_of(items, ROOM, alignment), budget)
    least = least_arena(items, alignment)
    assert decision.certificate is not None
    assert (decision.certificate.value, decision.certificate.bound) == (least, least)


@given(boxes(), st.sampled_from([1, 4]), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_feasible_exactly_from_the_least_arena_on(items: list[Box], alignment: int, short: int) -> None:
    """At the least arena everything is placed; below it the conflict is proven, and is one."""
    least = least_arena(items, alignment)
    assert faults(exact(items, least, alignment)) == []
    if least <= short:
        return
    with pytest.raises(PlacementError) as caught:
        exact(items, least - short, alignment)
    error = caught.value
    assert error.proven
    assert least_arena([items[i] for i in error.conflict], alignment) > least - short
    for left_out in error.conflict:  # irreducible: without any one of them the rest fits
        rest = [items[i] for i in error.conflict if i != left_out]
        assert not rest or least_arena(rest, alignment) <= least - short


@given(graphs(max_ops=8))
@settings(max_examples=30, deadline=None)
def test_real_residencies_verify(graph: Graph) -> None:
    """Residencies of random graphs on twice the least scratchpad are placed, at worst in more room than there is."""
    least = OrderProblem.of(Plan.of_order(graph, machine(1))).capacity
    plan = run_pass(BeladyResidency(), Plan.of_order(graph, machine(2 * least)), Budget.of_seconds(5))
    roomy = msgspec.structs.replace(plan, machine=machine(4 * least))
    assert verify(run_pass(ExactPlacement(minimize=True), roomy, Budget.of_seconds(5, workers=1))).faults == ()


def test_fullest_step_explains() -> None:
    """More bytes at one step than there are: the fewest of them, how many are missing, and when."""
    items: list[Box] = [(0, 4, 60), (1, 5, 50), (2, 3, 5), (6, 7, 90)]
    with pytest.raises(PlacementError) as caught:
        FirstFit().apply(plan_of(items, 100), Budget.of_seconds(1))
    error = caught.value
    assert isinstance(error, Infeasible)
    assert (error.conflict, error.proven) == ((0, 1), True)
    assert (error.required_bytes, error.available_bytes) == (115, 100)
    for part in ("'b0' (60 bytes, steps 0 to 3)", "'b1' (50 bytes, steps 1 to 4)", "100 bytes", "15 too many"):
        assert part in error.message
    assert "b3" not in error.message


def test_buffer_larger_than_memory() -> None:
    """A single residence can be the whole conflict."""
    with pytest.raises(PlacementError) as caught:
        exact([(0, 1, 10), (2, 3, 30)], 20)
    assert caught.value.conflict == (1,)


def test_last_region_needs_no_padding() -> None:
    """24 bytes hold one region of 16 and one of 8 on an alignment of 16, in that order only."""
    plan = exact([(0, 2, 8), (0, 2, 16)], 24, alignment=16)
    assert [r.offset for r in plan.residences or ()] == [16, 0]


def test_fragmentation_is_proven() -> None:
    """No step holds more than the capacity, and yet the residences cannot all keep their places."""
    capacity = 4
    plan = plan_of(SWAP, capacity)
    bound, _ = Packing.of(plan, "test").fullest_step()
    least = least_arena(SWAP)
    assert bound <= capacity < least
    with pytest.raises(PlacementError) as caught:
        exact(SWAP, capacity)
    assert caught.value.proven
    assert caught.value.required_bytes >= least


def test_components_are_packed_apart() -> None:
    """Residences that no step connects do not hinder one another."""
    plan = plan_of([(0, 2, 3), (1, 3, 4), (3, 5, 6), (4, 6, 1)], 7)
    packing = Packing.of(plan, "test")
    assert packing.components() == [[0, 1], [2, 3]]
    assert arena(exact([(0, 2, 3), (1, 3, 4), (3, 5, 6), (4, 6, 1)], 7)) == 7


def test_best_fit_takes_the_smaller_gap() -> None:
    """Of a gap of 5 below and one of 2 above it, a residence of 2 bytes goes into the latter."""
    items: list[Box] = [(0, 2, 9), (0, 1, 5), (0, 2, 3), (0, 1, 2), (0, 2, 1), (1, 2, 2)]
    first = FirstFit(order="begin").apply(plan_of(items, ROOM), Budget.of_seconds(1)).plan
    best = BestFit(order="begin").apply(plan_of(items, ROOM), Budget.of_seconds(1)).plan
    assert faults(first) == faults(best) == []
    assert (first.residences or ())[5].offset == 9
    assert (best.residences or ())[5].offset == 17


def test_earlier_times_are_dropped() -> None:
    """Placing a timed plan again takes its times away, as they hung on the old offsets."""
    graph = all_graphs()["diamond"]
    resident = run_pass(BeladyResidency(), Plan.of_order(graph, machine()), Budget.of_seconds(5))
    placed = run_pass(FirstFit(), resident, Budget.of_seconds(1))
    assert all(i.start_s is None and i.engine == "" for i in placed.instructions)
    assert [type(i) for i in placed.instructions] == [type(i) for i in resident.instructions]


def test_certificate_confirmed() -> None:
    """The pipeline recounts the arena."""
    graph = all_graphs()["residual"]
    resident = run_pass(BeladyResidency(), Plan.of_order(graph, machine()), Budget.of_seconds(5))
    placed = run_pass(ExactPlacement(minimize=True), resident, Budget.of_seconds(5, deterministic=True))
    certificate = placed.certificates[-1]
    assert isinstance(certificate, Certificate)
    assert (certificate.objective, certificate.scope) == ("arena_bytes", "address")
    assert certificate.gap == 0


def test_stopped_before_it_began() -> None:
    """Ctrl-C leaves first fit's placement where that fits, and an unproven error where it does not."""
    stop = threading.Event()
    stop.set()
    budget = Budget.of_seconds(60, stop=stop)
    assert faults(ExactPlacement(minimize=True).apply(plan_of(SWAP, 10), budget).plan) == []
    with pytest.raises(PlacementError):
        ExactPlacement().apply(plan_of(SWAP, 4), budget)


def test_progress_narrows() -> None:
    """The listener hears arenas that only fall, with the bound beside them."""
    heard: list[Progress] = []
    budget = Budget.of_seconds(20, deterministic=True, listen=heard.append)
    ExactPlacement(minimize=True).apply(plan_of(SWAP, ROOM), budget)
    arenas = [progress.incumbent or 0 for progress in heard]
    assert arenas == sorted(arenas, reverse=True)
    assert heard[-1].gap == 0


def test_needs_residences() -> None:
    graph = all_graphs()["chain"]
    with pytest.raises(OptionError, match="address/first_fit"):
        FirstFit().apply(Plan.of_order(graph, machine()), Budget.of_seconds(1))


def test_effort_out_of_range() -> None:
    with pytest.raises(OptionError, match="effort"):
        ExactPlacement(effort=0)
