"""The curve of traffic against capacity: it falls, its bounds hold, and it never promises what compiling would not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings

from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.passes.fit import FitPoint, traffic_by_capacity
from opweave.passes.planner import Planner
from opweave.passes.residency.workset import least_capacity, streamable_buffers
from tests.graphs.build import all_graphs, machine
from tests.graphs.recomputed import recomputable
from tests.passes.residency.crowded import crowded_graphs

JOINT = Planner()


def ample(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, deterministic=True, workers=1)


def planned(plan: Plan, capacity: int, planner: Planner = JOINT) -> Plan:
    return planner.plan(msgspec.structs.replace(plan, machine=plan.machine.with_scratchpad(capacity)), ample())


def check(plan: Plan, curve: Sequence[FitPoint]) -> None:
    """Capacities rise from the least that works, traffic and bounds over every order fall, no bound is above."""
    assert curve[0].capacity_bytes == max(1, least_capacity(plan))
    for here, there in pairwise(curve):
        assert here.capacity_bytes < there.capacity_bytes
        assert here.additional_bytes >= there.additional_bytes
        assert there.scope != "order" or here.bound_bytes >= there.bound_bytes
    assert all(0 <= point.bound_bytes <= point.additional_bytes for point in curve)


@given(crowded_graphs(max_ops=6))
@settings(deadline=None, max_examples=25)
def test_the_curve_never_rises_and_its_bounds_hold(graph: Graph) -> None:
    """Every bound over every order is one for whatever the planner finds at that capacity, and at any smaller one."""
    plan = Plan.of_order(graph, machine())
    curve = traffic_by_capacity(plan, JOINT, ample(), 4)
    check(plan, curve)
    for point in curve:
        value = verify(planned(plan, point.capacity_bytes)).additional_bytes
        assert point.scope != "order" or point.bound_bytes <= value
        assert point.additional_bytes <= value or point.gap == 0


@given(crowded_graphs(max_ops=6))
@settings(deadline=None, max_examples=25)
def test_compiling_for_more_capacity_is_never_worse_where_it_is_proven_optimal(graph: Graph) -> None:
    plan = Plan.of_order(graph, machine())
    least = least_capacity(plan)
    reached: int | None = None
    for capacity in (least, least + 16, least + 48, 2 * least):
        found = planned(plan, capacity)
        value = verify(found).additional_bytes
        proven = max((c.bound for c in found.certificates if c.objective == "additional_traffic_bytes"), default=0)
        if reached is not None and proven == value:
            assert value <= reached
        reached = value


@pytest.mark.parametrize(
    "planner",
    [
        Planner("order/given"),
        Planner("order/beam", "residency/belady", "address/first_fit"),
        Planner(residency="residency/recompute"),
    ],
    ids=["given", "heuristics", "recompute"],
)
@pytest.mark.parametrize(
    "name", ["chain", pytest.param("fan_out", marks=pytest.mark.slow), "residual", "shared_weight"]
)
def test_any_passes_make_a_curve(planner: Planner, name: str) -> None:
    graph = all_graphs()[name]
    for streamed in ((), streamable_buffers(graph)):
        plan = Plan.of_order(graph, machine(), streamed=streamed)
        check(plan, traffic_by_capacity(plan, planner, ample(), 5))


def test_ample_room_moves_only_what_nothing_avoids() -> None:
    plan = Plan.of_order(all_graphs()["fan_out"], machine())
    curve = traffic_by_capacity(plan, JOINT, ample(), 4)
    assert (curve[-1].additional_bytes, curve[-1].bound_bytes, curve[-1].scope) == (0, 0, "order")


def test_recomputing_goes_below_what_is_proven_without_and_claims_no_such_bound() -> None:
    """The joint bound counts loads and stores alone; a plan that recomputes may be cheaper, at every capacity."""
    plan = Plan.of_order(recomputable(), machine())
    without = traffic_by_capacity(plan, JOINT, ample(), 4)
    again = traffic_by_capacity(plan, Planner(residency="residency/recompute"), ample(), 4)
    for point, recomputed in zip(without, again, strict=True):
        assert recomputed.bound_bytes <= recomputed.additional_bytes <= point.additional_bytes
    assert again[0].additional_bytes < without[0].bound_bytes == without[0].additional_bytes


def test_a_stop_leaves_one_point_at_least() -> None:
    budget = ample()
    budget.stop.set()
    curve = traffic_by_capacity(Plan.of_order(all_graphs()["fan_out"], machine()), JOINT, budget, 4)
    assert len(curve) == 1
