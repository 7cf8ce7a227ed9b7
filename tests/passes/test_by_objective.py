"""Objectives in turn of importance: what is planned first, what is refined, and what is claimed of the result."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings

from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan, Recompute
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.passes.by_objective import plan_by
from opweave.passes.objective.measures import measured, objectives
from opweave.passes.planner import Planner
from opweave.passes.residency.workset import least_capacity
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import all_graphs, machine, random_sources
from tests.graphs.recomputed import recomputable
from tests.passes.residency.crowded import crowded_graphs

RECOMPUTE = Planner(residency="residency/recompute")


def ample(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, deterministic=True, workers=1)


def planned(graph: Graph, spec: str, extra: int = 0, planner: Planner | None = None) -> Plan:
    """``graph`` in the least scratchpad and ``extra`` bytes."""
    plan = Plan.of_order(graph, machine())
    sized = msgspec.structs.replace(plan, machine=machine(max(16, least_capacity(plan) + extra)))
    return plan_by(sized, planner or Planner(), objectives(spec), ample())


@pytest.mark.parametrize("spec", ["traffic", "traffic,arena", "peak", "latency", "traffic,latency", "arena,traffic"])
@pytest.mark.parametrize("name", ["residual", "fan_out", "in_place"])
def test_plans_verify_and_execute(name: str, spec: str) -> None:
    graph = all_graphs()[name]
    sources = random_sources(graph)
    for extra in (0, 64):
        plan = planned(graph, spec, extra)
        assert verify(plan).faults == ()
        assert verify(plan).level == "address"
        assert same(run(plan, sources), graph, sources)


@given(crowded_graphs(max_ops=5))
@settings(deadline=None, max_examples=15)
def test_the_first_objective_is_no_larger_than_when_it_comes_second(graph: Graph) -> None:
    """And proven bounds hold for plans made for something else."""
    plans = {spec: planned(graph, spec, 16) for spec in ("traffic,peak", "peak,traffic")}
    traffic, peak = objectives("traffic,peak")
    assert measured(plans["traffic,peak"], [traffic]) <= measured(plans["peak,traffic"], [traffic])
    assert measured(plans["peak,traffic"], [peak]) <= measured(plans["traffic,peak"], [peak])
    values = [measured(plan, [traffic])[0] for plan in plans.values()]
    for plan in plans.values():
        claims = [c for c in plan.certificates if c.objective == "additional_traffic_bytes" and c.scope == "order"]
        assert all(claim.bound <= min(values) for claim in claims)


def test_an_arena_that_fits_spills_nothing_and_is_proven() -> None:
    plan = planned(all_graphs()["fan_out"], "traffic,arena", 1 << 16)
    counted = verify(plan)
    arena = next(record.certificate for record in plan.passes if record.name == "arena")
    traffic = [c for c in plan.certificates if c.objective == "additional_traffic_bytes"]
    assert arena is not None
    assert arena.value == arena.bound == counted.arena_bytes
    assert [(c.value, c.bound, c.scope) for c in traffic] == [(0, 0, "order")]


def test_an_arena_that_does_not_fit_is_said_and_the_joint_plan_taken() -> None:
    plan = planned(recomputable(), "arena,traffic")  # its least peak is above its working sets
    names = [record.name for record in plan.passes]
    assert names[:2] == ["arena", "joint/best_first"]
    assert "spills nothing" in plan.passes[0].note
    assert verify(plan).faults == ()


def test_an_order_that_was_named_is_taken() -> None:
    plan = planned(all_graphs()["fan_out"], "traffic,arena", 1 << 16, Planner(order="order/given"))
    assert plan.passes[0].name == "order/given"


@pytest.mark.parametrize("spec", ["traffic", "traffic,latency", "latency"])
def test_a_plan_that_recomputes_claims_no_bound_proven_without(spec: str) -> None:
    """Without recomputation 512 bytes must move; with it, none."""
    without = planned(recomputable(), "traffic")
    bound = max(c.bound for c in without.certificates if c.objective == "additional_traffic_bytes")
    plan = planned(recomputable(), spec, planner=RECOMPUTE)
    value = verify(plan).additional_bytes
    assert any(isinstance(instruction, Recompute) for instruction in plan.instructions)
    assert value < bound
    claims = [c for c in plan.certificates if c.objective == "additional_traffic_bytes"]
    assert claims
    assert all(c.bound <= c.value == value for c in claims)


def test_bounds_over_every_order_hold_for_other_plans_that_recompute() -> None:
    """In a plan that happens to recompute nothing, the bound says nothing of plans that do either."""
    roomy = planned(recomputable(), "traffic", 16, RECOMPUTE)
    claims = [c for c in roomy.certificates if c.objective == "additional_traffic_bytes" and c.scope == "order"]
    assert claims
    assert all(claim.bound == 0 for claim in claims)


def test_recomputing_is_not_forgotten_where_a_joint_pass_has_placed_everything() -> None:
    planner = Planner("joint/cosma", "residency/recompute")
    plan = planned(recomputable(), "traffic", planner=planner)
    assert any(isinstance(instruction, Recompute) for instruction in plan.instructions)
    assert verify(plan).faults == ()


def test_an_order_of_least_peak_from_a_joint_pass_gets_its_residency() -> None:
    plan = planned(recomputable(), "traffic", planner=Planner("joint/cosma(mode=peak)"))
    assert verify(plan).level == "address"
    assert verify(plan).faults == ()


def test_what_fits_nowhere_is_infeasible_for_every_objective() -> None:
    plan = Plan.of_order(recomputable(), machine(16))
    for spec in ("traffic", "traffic,arena", "latency"):
        with pytest.raises(Infeasible):
            plan_by(plan, Planner(), objectives(spec), ample())
