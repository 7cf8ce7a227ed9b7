"""Explanations are small proofs: what their steps force, no residency of the order avoids."""

from __future__ import annotations

import json
from itertools import combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Role
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Load, Pin, Plan, Recompute, Residence, Run, Store
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.passes.explain import Explanation, explain, explanation_text
from opweave.passes.explain.pressure import forces, least_cover, relaxed_cover
from opweave.passes.explain.relaxations import with_capacity
from opweave.passes.planner import Planner
from opweave.passes.residency.gaps import GapProblem
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.workset import least_capacity, require_fit, streamable_buffers
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.strategies import graphs
from tests.passes.residency.exhaustive import least_additional_bytes
from tests.passes.residency.training import tight, training_graph


def budget(seconds: float = 20.0) -> Budget:
    return Budget.of_seconds(seconds, deterministic=True, workers=1)


def planned(plan: Plan) -> Plan:
    return Planner("order/given").plan(plan, budget())


@pytest.fixture(scope="module")
def spilling() -> Plan:
    return planned(tight(training_graph(20, seed=3), 0.3))


@pytest.fixture(scope="module")
def explained(spilling: Plan) -> Explanation:
    return explain(spilling, budget())


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=7), st.data())
def test_least_cover_is_the_least_and_its_relaxation_is_below(
    items: list[tuple[int, int]], data: st.DataObject
) -> None:
    sizes, costs = np.array(items, np.int64).T
    need = data.draw(st.integers(1, int(sizes.sum())))
    choices = (c for count in range(len(items) + 1) for c in combinations(range(len(items)), count))
    least = min(sum(costs[i] for i in chosen) for chosen in choices if sum(sizes[i] for i in chosen) >= need)
    assert least_cover(sizes, costs, need) == least
    assert relaxed_cover(sizes, costs, need) <= least
    huge = 2**45  # products beyond 64 bits
    assert relaxed_cover(sizes * huge, costs * huge, need * huge) <= least * huge


@settings(max_examples=60, deadline=None)
@given(graphs(max_ops=7), st.sampled_from((0.0, 0.3, 0.7)), st.booleans())
def test_forced_bytes_never_exceed_the_least_of_all_residencies(graph: Graph, share: float, streams: bool) -> None:
    """The least is found by exhaustive search that knows nothing of gaps, let alone of steps."""
    plan = tight(graph, share, streamed=streamable_buffers(graph) if streams else ())
    problem = GapProblem.of(plan)
    assert problem.base_bytes + sum(force.nbytes for force in forces(problem)) <= least_additional_bytes(plan)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_steps_prove_most_of_the_optimum(seed: int, share: float) -> None:
    """Never more than the optimum; on training graphs, where everything spans one turning point, at least 85 %."""
    plan = tight(training_graph(16, seed), share)
    certificate = IlpResidency().apply(plan, budget()).certificate
    assert certificate is not None
    proven = sum(force.nbytes for force in forces(GapProblem.of(plan)))
    assert 0.85 * certificate.bound <= proven <= certificate.bound == certificate.value


def test_no_gap_pays_twice() -> None:
    """Two steps that the same buffer could relieve prove what one of them does; independent ones add up."""
    plan = tight(training_graph(16, seed=1), 0.3)
    problem = GapProblem.of(plan)
    alone = [short_only_at(problem, p) for p in range(problem.room.shape[1])]
    best = max(sum(force.nbytes for force in forces(one)) for one in alone)
    together = sum(force.nbytes for force in forces(problem))
    added = sum(sum(force.nbytes for force in forces(one)) for one in alone)
    assert best <= together < added


def short_only_at(problem: GapProblem, position: int) -> GapProblem:
    """The problem with room for everything except at ``position``."""
    room = problem.room + (1 << 40)
    room[:, position] = problem.room[:, position]
    return GapProblem(problem.lifetimes, problem.intervals, room, problem.base_bytes)


def test_the_figures_of_an_explanation_are_the_verifier_s(spilling: Plan, explained: Explanation) -> None:
    assert explained.additional_bytes == verify(spilling).additional_bytes > 0
    assert explained.verdict == "optimal for its order"
    assert explained.forced_bytes <= explained.order_bound_bytes == explained.additional_bytes
    assert sum(gap.moved_bytes for gap in explained.dropped) + explained.unavoidable_bytes == explained.additional_bytes
    assert {gap.returns for gap in explained.dropped} == {"fetched"}


def test_steps_name_what_is_live_there(spilling: Plan, explained: Explanation) -> None:
    """Everything used before and again later, with what the operator touches: more than the capacity."""
    graph = spilling.graph
    assert explained.steps
    for step in explained.steps:
        op = spilling.order[step.position]
        assert graph.ops[op].name == step.operator
        before = {b for other in spilling.order[: step.position] for b in graph.touches[other]}
        later = {b for other in spilling.order[step.position + 1 :] for b in graph.touches[other]}
        touched = set(graph.touches[op])
        assert {b.buffer for b in step.live if b.state == "operand"} == touched
        assert {b.buffer for b in step.live if b.state != "operand"} == (before & later) - touched
        assert step.needed_bytes == sum(-(-b.nbytes // 16) * 16 for b in step.live)
        assert step.short_bytes == step.needed_bytes - step.capacity_bytes > 0
        kept = sum(-(-b.nbytes // 16) * 16 for b in step.live if b.state != "dropped")
        assert kept <= step.capacity_bytes


def test_what_a_relaxation_saves_is_what_planning_so_saves(spilling: Plan, explained: Explanation) -> None:
    capacities = [r for r in explained.relaxations if r.kind == "capacity"]
    assert len(capacities) == 4
    for relaxation in capacities:
        assert relaxation.capacity_bytes is not None
        larger = msgspec.structs.replace(spilling, machine=spilling.machine.with_scratchpad(relaxation.capacity_bytes))
        certificate = IlpResidency().apply(larger, budget()).certificate
        assert certificate is not None
        assert relaxation.saved_bytes == explained.additional_bytes - certificate.value
        assert relaxation.limit_bytes >= explained.additional_bytes - certificate.value
    by_room = sorted(capacities, key=lambda r: r.capacity_bytes or 0)
    assert [r.saved_bytes for r in by_room] == sorted(r.saved_bytes or 0 for r in by_room)
    assert by_room[-1].saved_bytes == explained.additional_bytes
    saved = [r.saved_bytes for r in explained.relaxations if r.saved_bytes is not None]
    assert saved == sorted(saved, reverse=True)


def test_another_order_is_promised_no_more_than_is_proven(spilling: Plan, explained: Explanation) -> None:
    order = next(r for r in explained.relaxations if r.kind == "order")
    assert order.saved_bytes is None
    assert order.limit_bytes == explained.additional_bytes - explained.graph_bound_bytes
    assert not order.is_exact


def test_a_residency_that_could_be_better_is_told_so() -> None:
    plan = tight(training_graph(20, seed=3), 0.3)
    careless = Planner("order/given", "residency/refetch", "address/best_fit").plan(plan, budget())
    explained = explain(careless, budget())
    assert explained.verdict == "above its bound"
    better = next(r for r in explained.relaxations if r.kind == "residency")
    least = IlpResidency().apply(plan, budget()).certificate
    assert least is not None
    assert better.saved_bytes == better.limit_bytes == verify(careless).additional_bytes - least.value


def test_weights_are_worth_streaming_or_keeping() -> None:
    """Resident weights that crowd out activations; a streamed weight that is read twice."""
    graph = all_graphs()["fan_out"]
    weights = next((r for r in explain(tight(graph, 0.0), budget()).relaxations if r.kind == "weights"), None)
    streamed = IlpResidency().apply(
        msgspec.structs.replace(tight(graph, 0.0), streamed=streamable_buffers(graph)), budget()
    )
    resident = IlpResidency().apply(tight(graph, 0.0), budget())
    assert streamed.certificate is not None
    assert resident.certificate is not None
    saved = resident.certificate.value - streamed.certificate.value
    assert (weights.saved_bytes if weights else 0) == max(0, saved)
    shared = all_graphs()["shared_weight"]
    ample = Plan.of_order(shared, machine(), streamed=streamable_buffers(shared))
    explained = explain(ample, budget())
    assert explained.unavoidable_bytes == explained.additional_bytes == 32 * 32 * 4
    assert [(r.kind, r.saved_bytes) for r in explained.relaxations] == [("weights", 32 * 32 * 4)]


def test_nothing_to_explain() -> None:
    for name in ("chain", "no_operators"):
        explained = explain(Plan.of_order(all_graphs()[name], machine()), budget())
        assert explained.verdict == "nothing to explain"
        assert (explained.steps, explained.dropped, explained.relaxations) == ((), (), ())
        assert "nothing that this machine" in explanation_text(explained)


@pytest.mark.parametrize("name", all_graphs())
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_graph_is_explained(name: str, share: float) -> None:
    plan = planned(tight(all_graphs()[name], share))
    explained = explain(plan, budget())
    assert explained.additional_bytes == verify(plan).additional_bytes >= explained.order_bound_bytes
    assert explained.order_bound_bytes >= explained.forced_bytes
    assert explanation_text(explained)


def test_an_infeasible_model_is_explained_like_the_error_says() -> None:
    graph = all_graphs()["fan_out"]
    plan = Plan.of_order(graph, machine(1024))
    with pytest.raises(Infeasible) as caught:
        require_fit(plan)
    explained = explain(plan, budget())
    assert explained.verdict == "infeasible"
    worst = explained.steps[0]
    assert repr(worst.operator) in caught.value.message
    assert worst.needed_bytes == caught.value.required_bytes
    assert [step.short_bytes for step in explained.steps] == sorted(
        (s.short_bytes for s in explained.steps), reverse=True
    )
    assert all(sum(b.nbytes for b in step.live) > 1024 - 16 for step in explained.steps)
    enough, *others = explained.relaxations
    assert enough.capacity_bytes == least_capacity(plan)
    assert [r.kind for r in others] == ["weights"]
    assert (
        explain(msgspec.structs.replace(plan, machine=machine(enough.capacity_bytes)), budget()).verdict != "infeasible"
    )
    text = explanation_text(explained)
    assert "infeasible" in text
    assert "of the shortage" in text


def test_a_recomputed_tensor_moves_nothing() -> None:
    g = GraphBuilder("again")
    a = g.unary("relu", g.input("x", 4, 16), "a")
    left = g.unary("tanh", a, "left")
    graph = g.build(g.binary("add", left, g.unary("sigmoid", a, "right"), "y"))
    steps = (Load("x"), Run("op0"), Run("op1"), Recompute("op0"), Run("op2"), Run("op3"), Store("y"))
    spans = {"x": [(0, 4)], "a": [(1, 3), (3, 5)], "left": [(2, 6)], "right": [(4, 6)], "y": [(5, 7)]}
    residences = tuple(Residence(b, "sram", *span) for b, all_of in spans.items() for span in all_of)
    plan = Plan(graph, machine(3 * 256), steps, residences)
    assert verify(plan).ok
    explained = explain(plan, budget())
    assert [(gap.buffer, gap.returns, gap.moved_bytes) for gap in explained.dropped] == [("a", "recomputed", 0)]
    assert explained.verdict == "nothing to explain"
    assert "is computed again: dropped after op1, back for op2" in explanation_text(explained)


def test_without_time_the_proof_is_still_one(spilling: Plan, explained: Explanation) -> None:
    hurried = explain(spilling, Budget.of_seconds(0.0))
    assert hurried.steps == explained.steps
    assert hurried.order_bound_bytes <= explained.additional_bytes
    assert {r.kind for r in hurried.relaxations} == {"order", "capacity"}
    assert hurried.relaxations[0].is_exact
    assert len(hurried.untried) == 5
    assert "no time was left to try: the least residency of this order" in explanation_text(hurried)


def test_told_to_stop_it_stops(spilling: Plan) -> None:
    told = budget()
    told.stop.set()
    assert explain(spilling, told).untried == explain(spilling, Budget.of_seconds(0.0)).untried != ()


def test_the_same_plan_is_explained_the_same_way(spilling: Plan, explained: Explanation) -> None:
    again = explain(Plan.from_json(spilling.to_json()), budget())
    assert again == explained
    assert explanation_text(again) == explanation_text(explained)


def test_explanations_are_json_and_hold_no_control_characters(explained: Explanation) -> None:
    facts = json.loads(json.dumps(explained.to_dict()))
    assert facts["forced_bytes"] == explained.forced_bytes
    assert msgspec.json.decode(msgspec.json.encode(explained), type=Explanation) == explained
    hostile = msgspec.structs.replace(explained, graph="\x1b[31mred\n")
    lines = explanation_text(hostile).splitlines()
    assert "\x1b" not in explanation_text(hostile)
    assert len(lines) == len(explanation_text(explained).splitlines()) <= 22


def test_banks_grow_at_the_end() -> None:
    banked = machine(256).with_banks(128, 128)
    assert with_capacity(banked, 320).scratchpad_memory.banks_bytes == (128, 192)
    assert with_capacity(machine(256), 320).scratchpad_memory.capacity_bytes == 320


def test_streamable_are_sources_that_are_read_and_never_written() -> None:
    graph = all_graphs()["in_place"]
    assert streamable_buffers(graph) == ()
    weights = [b for b, base in all_graphs()["chain"].buffers.items() if base.role is Role.WEIGHT]
    assert list(streamable_buffers(all_graphs()["chain"])) == sorted(weights)


def test_what_is_pinned_is_live_and_its_pin_has_a_price() -> None:
    """A tensor that must stay from first to last use crowds out others, which have to move for it."""
    free = tight(training_graph(12, seed=2), 0.5)
    base = IlpResidency().apply(free, budget())
    assert base.certificate is not None
    left = {gap.buffer for gap in explain(base.plan, budget()).dropped}
    pinned = msgspec.structs.replace(free, pins=tuple(Pin(buffer, resident=True) for buffer in sorted(left)[:1]))
    plan = IlpResidency().apply(pinned, budget()).plan
    explained = explain(plan, budget())
    price = next(r for r in explained.relaxations if r.kind == "pins")
    assert price.saved_bytes == explained.additional_bytes - base.certificate.value > 0
    assert explained.forced_bytes <= explained.additional_bytes
    names = {pin.buffer for pin in pinned.pins}
    assert any(b.buffer in names and b.state == "kept" for step in explained.steps for b in step.live)
    assert all(step.needed_bytes == sum(-(-b.nbytes // 16) * 16 for b in step.live) for step in explained.steps)
