"""Objectives by name, and plans refined by them: right, never worse, the same every time, and within their bounds."""

from __future__ import annotations

from itertools import combinations, permutations

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.passes.address.exact import ExactPlacement
from opweave.passes.address.placement import PlacementError
from opweave.passes.objective.measures import Objective, floors, measured, objectives
from opweave.passes.objective.refine import refine
from opweave.passes.planner import Planner, place
from opweave.passes.registry import make
from opweave.passes.residency.emit import emit
from opweave.passes.residency.gaps import GapProblem
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import all_graphs, machine
from tests.graphs.replay import computes_the_right_outputs
from tests.passes.residency.crowded import crowded_graphs

SPECS = ["traffic", "peak", "arena", "latency", "traffic,latency", "peak,traffic", "traffic,peak", "latency,arena"]


def budget(*, deterministic: bool = True) -> Budget:
    return Budget.of_seconds(60, deterministic=deterministic, workers=1)


def replan(plan: Plan, limit: Budget) -> Plan:
    return place(plan, make("residency/ilp"), make("address/exact"), limit)


def placed(graph: Graph, extra_bytes: int) -> Plan:
    """The graph's own order, planned for the least scratchpad and ``extra_bytes``."""
    capacity = max(16, least_capacity(Plan.of_order(graph, machine()))) + extra_bytes
    planner = Planner("order/given", "residency/least_cost", "address/exact")
    return planner.plan(Plan.of_order(graph, machine(capacity)), budget())


def timeless(plan: Plan) -> bytes:
    records = tuple(msgspec.structs.replace(record, seconds=0.0) for record in plan.passes)
    return msgspec.structs.replace(plan, passes=records).to_json()


def test_objectives_are_read_in_their_order() -> None:
    assert objectives("peak, traffic") == (Objective.PEAK, Objective.TRAFFIC)
    assert objectives("latency") == (Objective.LATENCY,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trafic", "'trafic' is unknown; known are traffic, peak, arena, latency\nhint: did you mean 'traffic'"),
        ("peak,,traffic", "'' is unknown"),
        ("", "'' is unknown"),
        ("peak,peak", "names 'peak' twice"),
    ],
)
def test_objectives_that_cannot_be_read(spec: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        objectives(spec)
    assert message in str(error.value)


def test_measures_are_the_recount() -> None:
    plan = placed(all_graphs()["fan_out"], 0)
    counted = verify(plan)
    finish = max(i.finish_s or 0.0 for i in simulate(plan).instructions)
    traffic, peak, arena, latency = measured(plan, tuple(Objective))
    assert (traffic, peak, arena) == (counted.additional_bytes, counted.peak_bytes, counted.arena_bytes)
    assert latency - 1 < finish * 1e9 <= latency


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["shared_weight", "in_place", "no_operators"])
def test_refined_plans_verify_and_repeat(spec: str, name: str) -> None:
    """With their records: what earlier passes claimed is restated or withdrawn."""
    plan, wanted = placed(all_graphs()[name], 64), objectives(spec)
    refined = refine(plan, wanted, replan, budget())
    assert verify(simulate(refined)).faults == ()
    assert measured(refined, wanted) <= measured(plan, wanted)
    assert refined.machine == plan.machine
    assert timeless(refined) == timeless(refine(plan, wanted, replan, budget()))


@settings(deadline=None, max_examples=12)
@given(crowded_graphs(), st.integers(0, 100), st.sampled_from(SPECS))
def test_random_plans_stay_right_and_never_get_worse(graph: Graph, extra_bytes: int, spec: str) -> None:
    plan, wanted = placed(graph, extra_bytes), objectives(spec)
    refined = refine(plan, wanted, replan, budget())
    assert verify(simulate(refined)).faults == ()
    assert computes_the_right_outputs(simulate(refined))
    least = floors(plan, wanted)
    values = measured(refined, wanted)
    assert values <= measured(plan, wanted)
    assert all(low <= value for low, value in zip(least, values, strict=True))


@pytest.mark.parametrize("spec", ["peak,traffic", "arena,traffic"])
def test_bounds_proven_for_smaller_scratchpads_are_not_claimed_for_the_real_one(spec: str) -> None:
    """In the whole scratchpad no byte has to move, whatever the order: no bound may be above that."""
    refined = refine(placed(all_graphs()["fan_out"], 4096), objectives(spec), replan, budget())
    assert verify(refined).additional_bytes > 0
    bounds = [c.bound for c in refined.certificates if c.objective == "additional_traffic_bytes"]
    assert max(bounds, default=0) == 0


def test_the_peak_alone_falls_to_the_largest_working_set() -> None:
    """Peak before traffic: everything is dropped that the one operator does not need."""
    plan = placed(all_graphs()["fan_out"], 4096)
    refined = refine(plan, objectives("peak,traffic"), replan, budget())
    assert verify(refined).peak_bytes == least_capacity(plan) < verify(plan).peak_bytes
    assert verify(refined).additional_bytes > verify(plan).additional_bytes == 0


def test_traffic_first_lowers_the_peak_only_for_free() -> None:
    plan = placed(all_graphs()["fan_out"], 4096)
    refined = refine(plan, objectives("traffic,peak"), replan, budget())
    assert verify(refined).additional_bytes == 0
    assert verify(refined).peak_bytes < verify(plan).peak_bytes


def test_latency_comes_with_a_certificate() -> None:
    plan = placed(all_graphs()["residual"], 4096)
    refined = refine(plan, objectives("latency"), replan, budget())
    certificate = refined.passes[-1].certificate
    assert refined.passes[-1].name == "objective/refine"
    assert certificate is not None
    assert (certificate.objective, certificate.scope) == ("latency_ns", "order")
    assert certificate.bound <= certificate.value == measured(refined, objectives("latency"))[0]
    assert certificate.value < measured(plan, objectives("latency"))[0]


@settings(deadline=None, max_examples=10)
@given(crowded_graphs(max_ops=5), st.integers(0, 60))
def test_the_optimum_over_all_orders_and_residencies_is_not_contradicted(graph: Graph, extra_bytes: int) -> None:
    """Bound <= least traffic, then peak, of every order and residency <= what is found; for most graphs equal."""
    plan, wanted = placed(graph, extra_bytes), objectives("traffic,peak")
    assume(len(GapProblem.of(plan).intervals) <= 7)
    refined = measured(refine(plan, wanted, replan, budget()), wanted)
    best = min(measured(candidate, wanted) for candidate in all_plans(plan))
    assert floors(plan, wanted)[0] <= best[0]
    assert best <= refined
    if len(graph.ops) <= 4:
        assert best[0] == refined[0]


def all_plans(plan: Plan) -> list[Plan]:
    """Every order with every residency that can be placed."""
    found = []
    for order in permutations(range(len(plan.graph.ops))):
        place_of = {op: position for position, op in enumerate(order)}
        if any(place_of[b] > place_of[op] for op, before in enumerate(plan.graph.predecessors) for b in before):
            continue
        ordered = plan.with_order(order)
        problem = GapProblem.of(ordered)
        gaps = range(len(problem.intervals))
        for dropped in (c for size in range(len(gaps) + 1) for c in combinations(gaps, size)):
            if (problem.slack(dropped) >= 0).all():
                try:
                    found.append(ExactPlacement().apply(emit(ordered, problem, dropped), budget()).plan)
                except PlacementError:
                    continue
    return found


def test_a_plan_without_addresses_is_refused() -> None:
    with pytest.raises(OptionError, match="takes a placed plan"):
        refine(Plan.of_order(all_graphs()["chain"], machine()), objectives("peak"), replan, budget())


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_short_of_time(seconds: float) -> None:
    plan = placed(all_graphs()["fan_out"], 64)
    refined = refine(plan, objectives("latency,peak"), replan, Budget.of_seconds(seconds, workers=1))
    assert verify(refined).faults == ()
    assert measured(refined, objectives("latency,peak")) <= measured(plan, objectives("latency,peak"))


def test_told_to_stop() -> None:
    plan = placed(all_graphs()["fan_out"], 64)
    stopped = budget()
    stopped.stop.set()
    refined = refine(plan, objectives("peak"), replan, stopped)
    assert refined.residences == plan.residences
    assert refined.instructions == plan.instructions
    assert refined.passes[-1].note == "nothing smaller found in peak"
