"""COSMA's model, repaired, is exact in every mode, honest when interrupted, and never worse than its start."""

from __future__ import annotations

import random
import threading

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget, Decision, Progress, confirm
from opweave.compiler.plan import Certificate, Pin, Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.passes.joint._cosma_addresses import restacked
from opweave.passes.joint._cosma_crossing import crossing_bound, crossing_peak
from opweave.passes.joint._cosma_model import CosmaModel
from opweave.passes.joint._cosma_problem import CosmaProblem
from opweave.passes.joint._cosma_solutions import decided_of, dropped_of
from opweave.passes.joint.cosma import Cosma
from opweave.passes.order.problem import OrderProblem
from opweave.passes.residency.gaps import GapProblem
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.least_cost import LeastCostResidency
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import all_graphs, machine
from tests.passes.joint.exhaustive import least_peak, least_placeable_traffic, least_traffic, topological_orders
from tests.passes.joint.tight_plans import tight_plans
from tests.passes.residency.crowded import crowded_graphs
from tests.passes.residency.exhaustive import least_additional_bytes
from tests.passes.residency.training import tight, training_graph


def budget(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, workers=1, deterministic=True)


def certified(decision: Decision) -> Certificate:
    """The certificate, once the verifier has recounted it."""
    confirm("joint/cosma", decision.plan, decision.certificate)
    assert decision.certificate is not None
    return decision.certificate


def check_every_mode(plan: Plan) -> None:
    """All modes, with and without cuts, find and prove what exhaustive search finds."""
    for method, least in (
        (Cosma(addresses=False), least_traffic),
        (Cosma(addresses=False, cuts=False), least_traffic),
        (Cosma("fixed", addresses=False), least_additional_bytes),
        (Cosma("peak"), least_peak),
        (Cosma("peak", cuts=False), least_peak),
    ):
        certificate = certified(method.apply(plan, budget()))
        assert certificate.value == certificate.bound == least(plan), method


@settings(max_examples=40, deadline=None)
@given(tight_plans())
def test_every_mode_finds_what_exhaustive_search_finds(plan: Plan) -> None:
    check_every_mode(plan)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(tight_plans(max_ops=7))
def test_every_mode_finds_what_exhaustive_search_finds_thousands_of_times(plan: Plan) -> None:
    check_every_mode(plan)


@settings(max_examples=30, deadline=None)
@given(tight_plans(max_ops=5), st.booleans())
def test_with_addresses_the_optimum_is_over_what_can_be_placed(plan: Plan, fixed: bool) -> None:
    decision = Cosma("fixed" if fixed else "joint").apply(plan, budget())
    certificate = certified(decision)
    assert all(residence.offset is not None for residence in decision.plan.residences or ())
    assert certificate.value == certificate.bound == least_placeable_traffic(plan, all_orders=not fixed)


@settings(max_examples=40, deadline=None)
@given(crowded_graphs(max_ops=5), st.integers(0, 40), st.data())
def test_what_is_pinned_as_resident_never_leaves(graph: Graph, more_bytes: int, data: st.DataObject) -> None:
    """The optimum is over orders and residencies that keep it; none better exists."""
    touched = sorted({b for buffers in graph.touches for b in buffers})
    pins = [Pin(name, resident=True) for name in data.draw(st.sets(st.sampled_from(touched), max_size=2))]
    least = least_capacity(Plan.of_order(graph, machine(1, 1)))
    plan = Plan.of_order(graph, machine(least + more_bytes, 1), pins=pins)
    try:
        decision = Cosma(addresses=False).apply(plan, budget())
    except Infeasible:
        assume(False)
    certificate = certified(decision)
    assert certificate.value == certificate.bound == least_placeable_traffic(plan, placed=False)


def test_pinned_offsets_and_banks_are_honoured() -> None:
    graph = all_graphs()["diamond"]
    pinned = Plan.of_order(graph, machine(4096), pins=[Pin("a", offset=1024)])
    decision = Cosma().apply(pinned, budget())
    assert certified(decision).value == 0
    assert {r.offset for r in decision.plan.residences or () if r.buffer == "a"} == {1024}
    banked = Plan.of_order(graph, machine(1536).with_banks(1024, 512))
    assert certified(Cosma().apply(banked, budget())).gap == 0


def fragmented(operators: int, seed: int, more_bytes: int) -> Plan:
    """A chain with far reads whose best residency, in bytes, has no placement."""
    draw = random.Random(seed)
    tensors = [Tensor("s", (draw.randint(1, 9),), "int8", Role.INPUT)]
    ops: list[Op] = []
    for i in range(operators):
        inputs = [draw.choice(tensors[-3:]).name]
        if draw.random() < 0.6:
            inputs.append(draw.choice(tensors).name)
        tensors.append(Tensor(f"t{i}", (draw.randint(1, 9),), "int8"))
        ops.append(Op(f"op{i}", tuple(dict.fromkeys(inputs)), (f"t{i}",)))
    graph = Graph("fragmented", tuple(tensors), tuple(ops), (tensors[-1].name,))
    least = least_capacity(Plan.of_order(graph, machine(1, 1)))
    return Plan.of_order(graph, machine(least + more_bytes, 1))


@pytest.mark.parametrize(
    ("operators", "seed", "more_bytes"), [(10, 52, 1), (10, 54, 0), (10, 54, 3), (12, 54, 0), (12, 54, 3)]
)
def test_fragmentation_is_paid_for_and_no_more(operators: int, seed: int, more_bytes: int) -> None:
    """Where the optimum in bytes cannot be placed, Eq. 9 to 11 find the one that can."""
    plan = fragmented(operators, seed, more_bytes)
    bytes_only = certified(Cosma("fixed", addresses=False).apply(plan, budget()))
    decision = Cosma("fixed").apply(plan, budget())
    certificate = certified(decision)
    assert verify(decision.plan).level == "address"
    assert certificate.value == certificate.bound == least_placeable_traffic(plan, all_orders=False)
    assert certificate.value > bytes_only.value


@pytest.mark.parametrize("name", sorted(all_graphs()))
def test_fixed_mode_agrees_with_the_gap_ilp(name: str) -> None:
    for share in (0.0, 0.5):
        plan = tight(all_graphs()[name], share)
        certificate = certified(Cosma("fixed", addresses=False).apply(plan, budget()))
        gaps = IlpResidency().apply(plan, budget()).certificate
        assert gaps is not None
        assert (certificate.value, certificate.bound) == (gaps.value, gaps.bound)
        assert certificate.scope == "residency"


def test_fixed_mode_agrees_with_the_gap_ilp_where_the_solver_has_work() -> None:
    plan = tight(training_graph(12, 3), 0.4, alignment=1)
    certificate = certified(Cosma("fixed", addresses=False).apply(plan, budget()))
    gaps = IlpResidency().apply(plan, budget()).certificate
    assert gaps is not None
    assert certificate.value == certificate.bound == gaps.value > 0
    assert certificate.proved_by == "ilp"


@settings(max_examples=40, deadline=None)
@given(tight_plans())
def test_what_no_order_avoids_is_a_bound(plan: Plan) -> None:
    base = GapProblem.of(plan).base_bytes
    of = CosmaProblem.of(plan, base, fixed=False)
    assert base <= crossing_bound(plan.graph, of, base, budget()) <= least_traffic(plan)
    assert crossing_peak(plan.graph, of) <= least_peak(plan)


def test_what_no_order_avoids_settles_a_chain_without_steps() -> None:
    """A training step leaves no choice of order, so what crosses its operators is the whole gap ILP."""
    plan = tight(training_graph(12, 3), 0.4, alignment=1)
    base = GapProblem.of(plan).base_bytes
    bound = crossing_bound(plan.graph, CosmaProblem.of(plan, base, fixed=False), base, budget())
    decision = Cosma(addresses=False).apply(plan, budget())
    assert 0 < bound == certified(decision).value


def test_rows_left_out_leave_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewer terms there may be, the less is proven, and never too much."""
    plan = tight(training_graph(12, 3), 0.4, alignment=1)
    base = GapProblem.of(plan).base_bytes
    of = CosmaProblem.of(plan, base, fixed=False)
    bounds = []
    for terms in (0, 10, 30, 10_000):
        monkeypatch.setattr("opweave.passes.joint._cosma_crossing.DETERMINISTIC_TERMS", terms)
        bounds.append(crossing_bound(plan.graph, of, base, budget()))
    assert bounds[0] == base
    assert bounds == sorted(bounds)
    assert bounds[1] < bounds[-1] == certified(Cosma("fixed", addresses=False).apply(plan, budget())).value


@settings(max_examples=60, deadline=None)
@given(tight_plans(), st.data())
def test_any_residency_is_a_solution_of_the_model_at_its_cost(plan: Plan, data: st.DataObject) -> None:
    """Warm starts satisfy every row, cost what they move, and come back as the same order and gaps."""
    orders = [order for order, _ in zip(topological_orders(plan), range(20), strict=False)]
    ordered = plan.with_order(data.draw(st.sampled_from(orders)))
    gaps = GapProblem.of(ordered)
    every = range(len(gaps.intervals))
    dropped = frozenset(data.draw(st.sets(st.sampled_from(every)))) if every else frozenset()
    if (gaps.slack(dropped) < 0).any():
        return
    of = CosmaProblem.of(ordered, gaps.base_bytes, fixed=False)
    model = CosmaModel(of)
    decided = decided_of(of, ordered.order, gaps, dropped)
    values = model.start(decided)
    for variable in model.program.variables():
        variable.varValue = values[variable.name]
    broken = [row.name for row in model.program.constraints() if not row.valid()]
    moved = sum(values[x.name] * c for x, c in model.program.objective.items())
    assert broken == []
    assert of.constant_bytes + of.unit * moved == gaps.additional_bytes(dropped)
    assert model.decided(values) == decided
    assert dropped_of(of, gaps, decided) == dropped


def test_offsets_come_from_integers_not_from_the_solver() -> None:
    """Whatever heights a solver reports, restacked residences never overlap."""
    plan = tight(training_graph(6, 1), 0.6, alignment=1)
    resident = LeastCostResidency().apply(plan, budget()).plan
    draw = random.Random(0)
    names = {residence.buffer for residence in resident.residences or ()}
    heights = {(name, step): draw.randint(0, 20) for name in names for step in range(len(plan.graph.ops))}
    stacked = restacked(resident, heights)
    ample = msgspec.structs.replace(stacked, machine=machine(1 << 30, 1))
    assert verify(ample).faults == ()
    assert verify(ample).level == "address"


def test_mode_peak_ignores_the_capacity_and_returns_an_order() -> None:
    plan = Plan.of_order(all_graphs()["diamond"], machine(16))
    decision = Cosma("peak").apply(plan, budget())
    certificate = certified(decision)
    assert decision.plan.residences is None
    assert certificate.objective == "peak_bytes"
    assert certificate.value == certificate.bound == least_peak(plan)


def test_order_is_chosen_where_it_saves_traffic() -> None:
    """Two values made early and used late: running each beside its use moves nothing."""
    tensors = [Tensor("x", (1,), "int8", Role.INPUT)]
    tensors += [Tensor(name, (n,), "int8") for name, n in (("a", 10), ("b", 10), ("ya", 1), ("yb", 1), ("y", 1))]
    ops = [
        Op("make_a", ("x",), ("a",)),
        Op("make_b", ("x",), ("b",)),
        Op("use_a", ("a",), ("ya",)),
        Op("use_b", ("b",), ("yb",)),
        Op("join", ("ya", "yb"), ("y",)),
    ]
    graph = Graph("late", tuple(tensors), tuple(ops), ("y",))
    plan = Plan.of_order(graph, machine(13, 1))
    assert certified(Cosma("fixed").apply(plan, budget())).value > 0
    decision = Cosma().apply(plan, budget())
    assert certified(decision).value == 0
    assert certified(decision).scope == "order"
    peak = Cosma("peak").apply(plan, budget()).plan
    assert OrderProblem.of(plan).peak_bytes(peak.order) == 12


@pytest.mark.parametrize("seconds", [0.0, 0.1])
@pytest.mark.parametrize("method", [Cosma(), Cosma("fixed"), Cosma(addresses=False), Cosma("peak")], ids=str)
def test_short_of_time_the_start_is_returned_with_its_gap(method: Cosma, seconds: float) -> None:
    plan = tight(training_graph(40, 2), 0.3, alignment=1)
    decision = method.apply(plan, Budget.of_seconds(seconds, workers=1))
    certificate = certified(decision)
    if method == Cosma(addresses=False):
        start = LeastCostResidency().apply(plan, budget()).certificate
        assert start is not None
        assert certificate.value <= start.value
    assert certificate.gap == 0 or decision.note


def test_a_model_too_large_is_not_built() -> None:
    """Two thousand free branches: the note says why there is no more than the start."""
    tensors = [Tensor("x", (4,), "int8", Role.INPUT), *(Tensor(f"t{i}", (4,), "int8") for i in range(2000))]
    ops = [Op(f"op{i}", ("x",), (f"t{i}",)) for i in range(2000)]
    join = Tensor("y", (1,), "int8")
    ops += [Op("join", tuple(f"t{i}" for i in range(0, 2000, 500)), ("y",))]
    graph = Graph("wide", (*tensors, join), tuple(ops), ("y",))
    decision = Cosma(addresses=False).apply(Plan.of_order(graph, machine(20, 1)), budget())
    certificate = certified(decision)
    assert certificate.bound < certificate.value
    assert "too many" in decision.note


def test_stop_is_honoured_and_progress_told() -> None:
    """Ctrl-C at the first report leaves a valid plan at once."""
    stop, told = threading.Event(), list[Progress]()

    def listen(progress: Progress) -> None:
        told.append(progress)
        stop.set()

    plan = tight(training_graph(30, 1), 0.3, alignment=1)
    decision = Cosma().apply(plan, Budget.of_seconds(3600.0, listen=listen, stop=stop, workers=1))
    certificate = certified(decision)
    assert told
    assert told[0].incumbent is not None
    assert certificate.value <= told[0].incumbent


def test_a_working_set_that_does_not_fit_is_named() -> None:
    with pytest.raises(Infeasible, match="needs"):
        Cosma().apply(Plan.of_order(all_graphs()["diamond"], machine(16)), budget())
