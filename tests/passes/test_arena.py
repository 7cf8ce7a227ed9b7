"""Order and addresses together: verified, executable, never below the bound, and other orders where one does not do."""

from __future__ import annotations

from functools import partial
from itertools import islice

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

import opweave.passes.arena as arena_module
from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.passes.address.placement import PlacementError
from opweave.passes.arena import least_arena, orders_alike
from opweave.passes.order._peak_search import aligned_peak, least_peak_order
from opweave.passes.order.problem import OrderProblem
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import all_graphs, machine, random_sources
from tests.graphs.strategies import graphs

AMPLE = partial(Budget.of_seconds, 600.0, deterministic=True)


@pytest.mark.parametrize("name", all_graphs())
def test_arena_is_the_peak_and_executes(name: str) -> None:
    """On every small graph the least peak is reached, in a scratchpad that has no byte more, moving nothing extra."""
    graph = all_graphs()[name]
    least = least_peak_order(OrderProblem.of(Plan.of_order(graph, machine(alignment_bytes=1))), AMPLE())
    placed = least_arena(Plan.of_order(graph, machine(max(least.peak, 1), 1)), AMPLE())
    verification = verify(placed)
    assert verification.faults == ()
    assert verification.additional_bytes == 0
    certificate = placed.certificates[-1]
    assert certificate.value == certificate.bound == verification.arena_bytes == least.peak
    sources = random_sources(graph)
    assert same(run(placed, sources), graph, sources)


@given(graphs(max_ops=10))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bound_holds_and_value_is_recounted(graph: Graph) -> None:
    placed = least_arena(Plan.of_order(graph, machine(alignment_bytes=16)), AMPLE())
    certificate = placed.certificates[-1]
    assert certificate.objective == "arena_bytes"
    assert certificate.bound <= certificate.value == verify(placed).arena_bytes


@given(graphs(min_ops=3, max_ops=9))
@settings(max_examples=40, deadline=None)
def test_orders_alike_are_legal_and_no_worse(graph: Graph) -> None:
    problem = OrderProblem.of(Plan.of_order(graph, machine()))
    first = tuple(range(len(graph.ops)))
    for order in islice(orders_alike(problem, first, AMPLE()), 4):
        position = {op: i for i, op in enumerate(order)}
        assert sorted(order) == list(first)
        assert all(position[p] < position[op] for op in order for p in problem.predecessors[op])
        assert aligned_peak(problem, order) <= aligned_peak(problem, first)


def test_another_order_is_tried_where_one_cannot_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first order fails to be placed, the second ends too high, the third does."""
    placing = arena_module._placed
    orders: list[tuple[int, ...]] = []

    def reluctant(ordered: Plan, order: tuple[int, ...], budget: Budget) -> Plan:
        orders.append(order)
        if len(orders) == 1:
            raise PlacementError("no", conflict=(0,), proven=False, required_bytes=2, available_bytes=1)
        placed = placing(ordered, order, budget)
        if len(orders) == 2:
            record = placed.passes[-1]
            assert record.certificate is not None
            higher = msgspec.structs.replace(record.certificate, value=record.certificate.value + 16)
            return msgspec.structs.replace(placed, passes=(msgspec.structs.replace(record, certificate=higher),))
        return placed

    monkeypatch.setattr(arena_module, "_placed", reluctant)
    placed = least_arena(Plan.of_order(all_graphs()["fan_out"], machine()), AMPLE())
    assert len(orders) == 3
    assert placed.order == orders[-1]
    assert placed.passes[-1].note.startswith("3 orders")


def test_the_last_failure_is_told_when_no_order_can_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(ordered: Plan, order: tuple[int, ...], budget: Budget) -> Plan:
        raise PlacementError("no", conflict=(0,), proven=False, required_bytes=2, available_bytes=1)

    monkeypatch.setattr(arena_module, "_placed", refusing)
    with pytest.raises(PlacementError):
        least_arena(Plan.of_order(all_graphs()["fan_out"], machine()), AMPLE())


def test_a_scratchpad_below_the_peak_is_infeasible() -> None:
    graph = all_graphs()["fan_out"]
    least = least_peak_order(OrderProblem.of(Plan.of_order(graph, machine())), AMPLE()).peak
    with pytest.raises(Infeasible) as caught:
        least_arena(Plan.of_order(graph, machine(least - 16)), AMPLE())
    assert caught.value.required_bytes == least
