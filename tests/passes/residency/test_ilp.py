"""The gap ILP is exact, honest when interrupted, and never worse than the rules it starts from."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Role
from opweave.compiler.pipeline import Budget, Progress, confirm
from opweave.compiler.plan import Plan
from opweave.errors import OptionError
from opweave.passes.residency.belady import BeladyResidency
from opweave.passes.residency.gaps import Cut, Gap, GapProblem, gaps_of_residences
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.least_cost import LeastCostResidency
from opweave.passes.residency.refetch import RefetchResidency
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import all_graphs, machine
from tests.graphs.strategies import graphs
from tests.passes.residency.crowded import crowded_graphs
from tests.passes.residency.exhaustive import least_additional_bytes
from tests.passes.residency.training import tight, training_graph

METHODS = (RefetchResidency(), BeladyResidency(), LeastCostResidency(), IlpResidency())


def budget(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, workers=1, deterministic=True)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Random graphs on scratchpads from the least that works upward, some of their weights streamed."""
    graph = draw(st.one_of(crowded_graphs(), crowded_graphs(), graphs(max_ops=8)))
    written = {b for buffers in graph.writes for b in buffers}
    roles = (Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE)
    streamable = [b for b, base in graph.buffers.items() if base.role in roles and b not in written]
    streamed = draw(st.lists(st.sampled_from(streamable), unique=True)) if streamable else []
    share = draw(st.sampled_from((0.0, 0.2, 0.4, 0.6, 0.8)))
    return tight(graph, share, alignment=draw(st.sampled_from((1, 1, 8))), streamed=tuple(streamed))


@settings(max_examples=150, deadline=None)
@given(plans())
def test_ilp_finds_what_exhaustive_search_finds(plan: Plan) -> None:
    decision = IlpResidency().apply(plan, budget())
    assert decision.certificate is not None
    assert decision.certificate.value == decision.certificate.bound == least_additional_bytes(plan)
    confirm("residency/ilp", decision.plan, decision.certificate)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_method_verifies_and_none_beats_the_ilp(plan: Plan) -> None:
    values = []
    for method in METHODS:
        decision = method.apply(plan, budget())
        assert decision.certificate is not None
        assert decision.certificate.bound <= least_additional_bytes(plan)
        confirm(method.name, decision.plan, decision.certificate)
        values.append(decision.certificate.value)
    assert values[-1] == min(values)
    assert max(values) == values[0]


@settings(max_examples=60, deadline=None)
@given(crowded_graphs(), st.integers(0, 60))
def test_capacity_may_be_no_multiple_of_the_alignment(graph: Graph, more_bytes: int) -> None:
    """Then both conditions hold, padded bytes within the padded capacity and plain bytes within the plain one."""
    least = least_capacity(Plan.of_order(graph, machine(1, 8)))
    plan = Plan.of_order(graph, machine(least + more_bytes, 8))
    values = []
    for method in METHODS:
        decision = method.apply(plan, budget())
        confirm(method.name, decision.plan, decision.certificate)
        assert decision.certificate is not None
        values.append(decision.certificate.value)
    assert values[-1] == min(values)
    padded = Plan.of_order(graph, machine((least + more_bytes + 7) // 8 * 8, 8))
    assert values[-1] >= least_additional_bytes(padded)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", sorted(all_graphs()))
def test_ilp_is_exact_on_every_small_graph(name: str, share: float) -> None:
    plan = tight(all_graphs()[name], share)
    decision = IlpResidency().apply(plan, budget())
    assert decision.certificate is not None
    assert decision.certificate.value == decision.certificate.bound
    confirm("residency/ilp", decision.plan, decision.certificate)


@pytest.mark.parametrize("share", [0.2, 0.4])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 8, 9])
def test_ilp_equals_exhaustive_search_where_the_solver_has_work(seed: int, share: float) -> None:
    plan = tight(training_graph(6, seed), share, alignment=1)
    decision = IlpResidency().apply(plan, budget())
    assert decision.certificate is not None
    assert decision.certificate.value == decision.certificate.bound == least_additional_bytes(plan)
    assert not decision.note.startswith("0 of")


@pytest.mark.parametrize("seed", range(4))
def test_ilp_is_never_worse_than_the_heuristics_and_proves_it(seed: int) -> None:
    """Training-shaped graphs need the solver: not everything falls to the reductions."""
    plan = tight(training_graph(24, seed), 0.4, alignment=1)
    heuristics = [method.apply(plan, budget()).certificate for method in METHODS[:3]]
    decision = IlpResidency().apply(plan, budget())
    confirm("residency/ilp", decision.plan, decision.certificate)
    assert decision.certificate is not None
    assert decision.certificate.gap == 0
    assert decision.certificate.value <= min(c.value for c in heuristics if c is not None)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_same_input_same_plan(method: IlpResidency) -> None:
    plan = tight(training_graph(16), 0.4)
    assert method.apply(plan, budget()) == method.apply(plan, budget())


def test_without_time_the_best_heuristic_is_returned_with_its_gap() -> None:
    plan = tight(training_graph(24), 0.4, alignment=1)
    decision = IlpResidency().apply(plan, Budget.of_seconds(0.0))
    confirm("residency/ilp", decision.plan, decision.certificate)
    assert decision.certificate is not None
    heuristics = [method.apply(plan, budget()).certificate for method in METHODS[:3]]
    assert decision.certificate.value <= min(c.value for c in heuristics if c is not None)
    assert decision.certificate.gap > 0
    assert "time limit came first" in decision.note


def test_stop_is_honoured_and_progress_told() -> None:
    """Ctrl-C at the first report: the plan so far comes back, valid, though an hour was left."""
    stop, told = threading.Event(), list[Progress]()

    def listen(progress: Progress) -> None:
        told.append(progress)
        stop.set()

    plan = tight(training_graph(150, 7), 0.3, alignment=1)
    begun = Budget.of_seconds(3600.0, listen=listen, stop=stop, workers=1)
    decision = IlpResidency().apply(plan, begun)
    confirm("residency/ilp", decision.plan, decision.certificate)
    assert decision.certificate is not None
    assert told
    assert told[-1].bound is not None
    assert told[-1].incumbent is not None
    assert told[-1].bound <= decision.certificate.value <= told[-1].incumbent


def test_reserve_leaves_room_and_keeps_a_bound_for_the_full_capacity() -> None:
    plan = tight(training_graph(24), 0.4, alignment=1)
    exact = IlpResidency().apply(plan, budget()).certificate
    decision = IlpResidency(reserve_bytes=1500).apply(plan, budget())
    confirm("residency/ilp", decision.plan, decision.certificate)
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    assert capacity - 1500 >= least_capacity(plan)
    smaller = Plan.of_order(plan.graph, plan.machine.with_scratchpad(capacity - 1500))
    reserved = IlpResidency().apply(smaller, budget()).certificate
    assert exact is not None
    assert reserved is not None
    assert decision.certificate is not None
    assert decision.certificate.value == reserved.value
    assert 0 < decision.certificate.bound <= exact.value < decision.certificate.value


def test_negative_reserve_is_refused() -> None:
    with pytest.raises(OptionError, match="reserve_bytes"):
        IlpResidency(reserve_bytes=-1)


@settings(max_examples=40, deadline=None)
@given(plans(), st.data())
def test_cuts_are_satisfied_at_least_cost(plan: Plan, data: st.DataObject) -> None:
    """Against all subsets of gaps, with random cuts, also over gaps with nothing between their two uses."""
    problem = GapProblem.of(plan)
    gaps = [interval.gap for interval in problem.intervals]
    if not gaps or len(gaps) > 9:
        return
    sets = data.draw(st.lists(st.frozensets(st.sampled_from(gaps), min_size=1, max_size=3), max_size=3))
    decision = IlpResidency(cuts=tuple(map(Cut, sets))).apply(plan, budget())
    confirm("residency/ilp", decision.plan, decision.certificate)
    least = min(
        problem.additional_bytes(dropped)
        for count in range(len(gaps) + 1)
        for dropped in itertools.combinations(range(len(gaps)), count)
        if (problem.slack(dropped) >= 0).all() and all(cut & {gaps[i] for i in dropped} for cut in sets)
    )
    assert decision.certificate is not None
    assert decision.certificate.value == decision.certificate.bound == least
    kept = gaps_of_residences(decision.plan, range(len(decision.plan.residences or ()))).gaps
    assert not any(cut <= kept for cut in sets)


def test_cut_of_residences_names_the_gaps_kept_inside_them() -> None:
    plan = Plan.of_order(all_graphs()["residual"], machine())
    resident = IlpResidency().apply(plan, budget()).plan
    residences = resident.residences or ()
    whole = next(i for i, residence in enumerate(residences) if residence.buffer == "x")
    assert gaps_of_residences(resident, [whole]) == Cut(frozenset({Gap("x", 0)}))
    again = IlpResidency(cuts=(Cut(frozenset({Gap("x", 0)})),)).apply(plan, budget())
    assert [r.buffer for r in again.plan.residences or ()].count("x") == 2


@pytest.mark.parametrize(
    ("cut", "message"),
    [(Cut(frozenset({Gap("nowhere", 0)})), "'nowhere'"), (Cut(frozenset()), "names no gap")],
)
def test_cut_of_another_order_is_refused(cut: Cut, message: str) -> None:
    plan = Plan.of_order(all_graphs()["residual"], machine())
    with pytest.raises(OptionError, match=message):
        IlpResidency(cuts=(cut,)).apply(plan, budget())
