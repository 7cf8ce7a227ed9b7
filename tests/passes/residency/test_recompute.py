"""Recomputation is exact over what it considers, never worse than fetching, honest when interrupted, and right."""

from __future__ import annotations

import threading
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Role
from opweave.compiler.pipeline import Budget, Progress, confirm, run_pass
from opweave.compiler.plan import Pin, Plan, Recompute
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from opweave.errors import Infeasible, OptionError
from opweave.hw_models.cost import op_joules, op_seconds, transfer_joules, transfer_seconds
from opweave.hw_models.model import EngineKind, HardwareModel
from opweave.hw_models.registry import load
from opweave.passes._solver.highs import solve
from opweave.passes.address.first_fit import FirstFit
from opweave.passes.residency._choice import Choice, Realised
from opweave.passes.residency._greedy import recomputed_greedily
from opweave.passes.residency._occurrences import Occurrences
from opweave.passes.residency._prices import Prices
from opweave.passes.residency._recompute_model import Question, build, kept_across, start
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.recompute import RecomputeResidency, _incumbent
from opweave.passes.residency.refetch import RefetchResidency
from opweave.passes.residency.workset import least_capacity
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, all_graphs, machine, random_sources
from tests.graphs.strategies import graphs
from tests.passes.residency.crowded import crowded_graphs
from tests.passes.residency.exhaustive_recompute import Price, least_price, paid
from tests.passes.residency.training import tight, training_graph

DEEP = 99  # chains of any length


def budget(seconds: float = 60.0) -> Budget:
    return Budget.of_seconds(seconds, workers=1, deterministic=True)


def bytes_of(plan: Plan) -> Price:
    """Traffic: bytes moved."""

    def again(op: int) -> int:
        return sum(plan.graph.buffers[b].nbytes for b in plan.graph.reads[op] if b in plan.streamed)

    return Price(int, int, again)


def seconds_of(plan: Plan) -> Price:
    """Latency: picoseconds on the machine's one compute and one copy engine."""
    core, dma = (plan.machine.engines_of(kind)[0] for kind in (EngineKind.COMPUTE, EngineKind.COPY))

    def again(op: int) -> int:
        flops, dtype, local, streamed = operands(plan, op)
        return round(1e12 * op_seconds(flops, dtype, local, streamed, plan.machine, core))

    def transfer(nbytes: int) -> int:
        return round(1e12 * transfer_seconds(nbytes, dma))

    return Price(transfer, transfer, again)


def joules_of(plan: Plan) -> Price:
    """Energy: femtojoules."""
    (core,) = plan.machine.engines_of(EngineKind.COMPUTE)

    def again(op: int) -> int:
        flops, dtype, local, streamed = operands(plan, op)
        return round(1e15 * op_joules(flops, dtype, local, streamed, plan.machine, core))

    def transfer(nbytes: int) -> int:
        return round(1e15 * transfer_joules(nbytes, plan.machine))

    return Price(transfer, transfer, again)


PRICES = {"traffic": bytes_of, "latency": seconds_of, "energy": joules_of}


def operands(plan: Plan, op: int) -> tuple[int, str, int, int]:
    """Operations, dtype, bytes in the scratchpad and bytes streamed, of one operator."""
    graph = plan.graph
    tensors = [graph.tensor[name] for name in dict.fromkeys((*graph.ops[op].inputs, *graph.ops[op].outputs))]
    local = sum(t.nbytes for t in tensors if t.buffer not in plan.streamed)
    streamed = sum(graph.buffers[b].nbytes for b in graph.reads[op] if b in plan.streamed)
    return graph.ops[op].flops, tensors[0].dtype, local, streamed


def powered(target: HardwareModel) -> HardwareModel:
    """The machine with energies: of a byte far away as much as of twenty operations."""
    near, far = (msgspec.structs.replace(m, energy_per_byte_j=e) for m, e in zip(target.memories, (1, 9), strict=True))
    engines = tuple(
        msgspec.structs.replace(e, energy_per_flop_j={"default": 0.5}) if e.kind is EngineKind.COMPUTE else e
        for e in target.engines
    )
    return msgspec.structs.replace(target, memories=(near, far), engines=engines)


@st.composite
def plans(draw: st.DrawFn, *, max_ops: int = 6) -> Plan:
    """Random graphs on scratchpads from the least that works upward, some of their weights streamed."""
    graph = draw(st.one_of(crowded_graphs(max_ops=max_ops), crowded_graphs(max_ops=max_ops), graphs(max_ops=max_ops)))
    written = {b for buffers in graph.writes for b in buffers}
    roles = (Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE)
    streamable = [b for b, base in graph.buffers.items() if base.role in roles and b not in written]
    streamed = draw(st.lists(st.sampled_from(streamable), unique=True)) if streamable else []
    share = draw(st.sampled_from((0.0, 0.2, 0.4, 0.6)))
    return tight(graph, share, alignment=draw(st.sampled_from((1, 1, 8))), streamed=tuple(streamed))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_traffic_is_what_exhaustive_search_finds(plan: Plan) -> None:
    decision = RecomputeResidency(depth=DEEP).apply(plan, budget())
    confirm("residency/recompute", decision.plan, decision.certificate)
    assert decision.certificate is not None
    assert decision.certificate.value == decision.certificate.bound
    price = bytes_of(plan)
    assert paid(decision.plan, price) == least_price(plan, price)
    assert least_price(plan, price, anywhere=True) <= paid(decision.plan, price)
    assert sum(isinstance(i, Recompute) for i in decision.plan.instructions) <= int(
        decision.note.split(" of ")[1].split()[0]
    )


@settings(max_examples=30, deadline=None)
@given(plans())
def test_chained_rows_say_the_same(plan: Plan) -> None:
    """Large graphs write capacity as differences of neighbours."""
    prices = Prices(plan, "traffic")
    occurrences = Occurrences.of(plan, prices, DEEP, 0)
    question = Question(occurrences, prices, 1)
    values = [solve(build(question, max_row_terms=terms), budget(), absolute_gap=0.5).objective for terms in (10**9, 0)]
    assert values[0] == pytest.approx(values[1])
    assert values[0] == pytest.approx(least_price(plan, bytes_of(plan)))


@settings(max_examples=30, deadline=None)
@given(plans())
def test_covers_forbid_what_does_not_fit_and_nothing_that_does(plan: Plan) -> None:
    """They stand in where the solver's tolerances let a row be missed."""
    occurrences = Occurrences.of(plan, Prices(plan, "traffic"), DEEP, 0)
    segments = frozenset((t, k) for t, track in enumerate(occurrences.tracks) for k in range(len(track.uses) - 1))
    slots = frozenset(e for e, event in enumerate(occurrences.events) if event.again)
    everything = Realised(occurrences, Choice(slots, segments))
    overfull = everything.overfull()
    covers = tuple(kept_across(everything, e) for e in overfull)
    decision = RecomputeResidency(depth=DEEP).apply(plan, budget())
    assert decision.certificate is not None
    price = decision.certificate.value - occurrences.problem.base_bytes
    question = Question(occurrences, Prices(plan, "traffic"), 1, covers)
    assert solve(build(question), budget(), absolute_gap=0.5).objective == pytest.approx(price)
    for event, cover in zip(overfull, covers, strict=True):
        assert all(start(everything)[name] == 1 for name in cover if not name.startswith("load"))
        assert cover or occurrences.events[event].again


@settings(max_examples=60, deadline=None)
@given(plans(max_ops=8), st.integers(1, 3))
def test_the_greedy_walk_fits_and_lowers_the_price(plan: Plan, depth: int) -> None:
    prices = Prices(plan, "traffic")
    occurrences = Occurrences.of(plan, prices, depth, 0)
    runs = frozenset(
        (t, k)
        for t, track in enumerate(occurrences.tracks)
        for k, (a, b) in enumerate(pairwise(track.uses))
        if occurrences.events[b.event].position - occurrences.events[a.event].position <= 1
        and not occurrences.events[a.event].again
        and not occurrences.events[b.event].again
    )
    before = Realised(occurrences, Choice(frozenset(), runs))
    after = recomputed_greedily(before, prices)
    assert not before.overfull()
    assert not after.overfull()
    assert before.choice.kept <= after.choice.kept
    assert after.price(prices) <= before.price(prices) - len(after.choice.again)
    assert verify(after.plan()).ok
    assert verify(after.plan()).additional_bytes == after.additional_bytes(prices)


def test_the_greedy_walk_needs_no_solver() -> None:
    """Short of time, it already spares most of what recomputing each value by itself can."""
    plan = tight(training_graph(60), 0.3, alignment=1)
    fetched = IlpResidency().apply(plan, budget()).certificate
    prices = Prices(plan, "traffic")
    occurrences = Occurrences.of(plan, prices, 1, 0)
    walked = recomputed_greedily(_incumbent(occurrences, IlpResidency().apply(plan, budget()).plan), prices)
    assert fetched is not None
    assert not walked.overfull()
    assert walked.additional_bytes(prices) < fetched.value


@settings(max_examples=25, deadline=None)
@given(plans(), st.sampled_from(["latency", "energy"]))
def test_seconds_and_joules_are_what_exhaustive_search_finds(plan: Plan, objective: str) -> None:
    plan = msgspec.structs.replace(plan, machine=powered(plan.machine))
    decision = RecomputeResidency(objective, depth=DEEP).apply(plan, budget())  # type: ignore[arg-type]
    confirm("residency/recompute", decision.plan, decision.certificate)
    price = PRICES[objective](plan)
    assert paid(decision.plan, price) == pytest.approx(least_price(plan, price), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(plans(max_ops=8), st.integers(0, 3))
def test_never_worse_than_fetching_only(plan: Plan, depth: int) -> None:
    fetched = IlpResidency().apply(plan, budget()).certificate
    decision = RecomputeResidency(depth=depth).apply(plan, budget())
    confirm("residency/recompute", decision.plan, decision.certificate)
    assert fetched is not None
    assert decision.certificate is not None
    assert decision.certificate.value <= fetched.value
    if depth == 0:
        assert decision.certificate.value == fetched.value
        assert not any(isinstance(i, Recompute) for i in decision.plan.instructions)


def placed(plan: Plan) -> Plan:
    """``plan`` with addresses, in a scratchpad as large as first fit needs."""
    ample = msgspec.structs.replace(plan, machine=plan.machine.with_scratchpad(1 << 20))
    return run_pass(FirstFit(), ample, budget())


@pytest.mark.parametrize("name", sorted(all_graphs()))
def test_executed_plans_compute_what_eager_computes(name: str) -> None:
    """In the least scratchpad that works, with everything that may be recomputed at hand."""
    graph = all_graphs()[name]
    if not graph.ops:
        return
    weights = tuple(b for b, base in graph.buffers.items() if base.role is Role.WEIGHT)
    for streamed in ((), weights):
        plan = placed(RecomputeResidency(depth=3).apply(tight(graph, streamed=streamed), budget()).plan)
        sources = random_sources(graph)
        result = run(plan, sources)
        assert same(result, graph, sources)
        assert result.moved_bytes == verify(simulate(plan)).total_bytes


@settings(max_examples=30, deadline=None)
@given(graphs(max_ops=8), st.sampled_from([0.0, 0.3]))
def test_random_executed_plans_compute_what_eager_computes(graph: Graph, share: float) -> None:
    plan = placed(RecomputeResidency(depth=3).apply(tight(graph, share), budget()).plan)
    sources = random_sources(graph)
    assert same(run(plan, sources), graph, sources)
    assert verify(simulate(plan)).ok


def backward(layers: int) -> Graph:
    """A chain of ``tanh`` forward and, backward, products of a gradient with each value, as training has them."""
    g = GraphBuilder("backward")
    values = [g.input("x", 8, 16)]
    for layer in range(layers):
        values.append(g.unary("tanh", values[-1], f"a{layer}"))
    gradient = g.unary("sigmoid", values[-1], "loss")
    for layer in reversed(range(layers)):
        gradient = g.binary("mul", gradient, values[layer], f"g{layer}")
    return g.build(gradient)


def test_a_training_step_is_recomputed_byte_for_byte() -> None:
    graph = backward(6)
    plan = tight(graph, 0.3)
    fetched = IlpResidency().apply(plan, budget()).certificate
    decision = RecomputeResidency(depth=3).apply(plan, budget())
    again = placed(decision.plan)
    sources = random_sources(graph)
    result = run(again, sources)
    assert same(result, graph, sources)
    assert result.recomputes > 1
    assert fetched is not None
    assert decision.certificate is not None
    assert decision.certificate.value == decision.certificate.bound < fetched.value


@pytest.mark.parametrize("seed", range(3))
def test_recomputing_saves_most_of_the_traffic_of_training_graphs(seed: int) -> None:
    plan = tight(training_graph(16, seed), 0.2, alignment=1)
    fetched = IlpResidency().apply(plan, budget()).certificate
    single, chains = (RecomputeResidency(depth=depth).apply(plan, budget()).certificate for depth in (1, 2))
    assert fetched is not None
    assert single is not None
    assert chains is not None
    assert single.value == single.bound
    assert single.scope == ("recompute" if single.bound else "residency")
    assert chains.value <= single.value < fetched.value / 2


def expensive(flops: int) -> Graph:
    """``a`` takes ``flops`` operations and is needed at once and at the end, across something large; ``x`` stays."""
    g = GraphBuilder("expensive")
    x = g.input("x", 8, 16)
    g.op("aten.tanh.default(%0)", x, outputs={"a": (8, 16)}, flops=flops)
    g.op("aten.repeat.default(%0, [4, 1])", "a", outputs={"wide": (32, 16)})
    g.op("aten.repeat.default(%0, [2, 1])", "wide", outputs={"wider": (64, 16)})
    g.op("aten.slice.Tensor(%0, 0, 0, 8)", "wider", outputs={"narrow": (8, 16)})
    g.binary("add", "narrow", x, "b")
    return g.build(g.binary("mul", "b", "a", "y"))


@pytest.mark.parametrize(
    ("objective", "flops", "recomputes"),
    [
        ("traffic", 10**9, 1),  # an operator of a millisecond, to spare 1024 bytes
        ("latency", 10**9, 0),
        ("latency", 128, 1),  # 1 us against two transfers of 1 us each and their bytes
        ("energy", 10**9, 0),
        ("energy", 128, 1),
    ],
)
def test_the_objective_decides_what_is_worth_it(objective: str, flops: int, recomputes: int) -> None:
    plan = tight(expensive(flops))
    plan = msgspec.structs.replace(plan, machine=powered(plan.machine))
    decision = RecomputeResidency(objective).apply(plan, budget())  # type: ignore[arg-type]
    confirm("residency/recompute", decision.plan, decision.certificate)
    assert sum(isinstance(i, Recompute) for i in decision.plan.instructions) == recomputes


def test_of_equal_traffic_the_fewest_operations_are_recomputed() -> None:
    """``a`` or ``c`` has to go; both can be made from ``x`` again, one at a thousand times the operations."""
    for costly in ("a", "c"):
        g = GraphBuilder("either")
        x = g.input("x", 8, 16)
        for name in ("a", "c"):
            flops = 10**6 if name == costly else 10**3
            g.op("aten.tanh.default(%0)", x, outputs={name: (8, 16)}, flops=flops)
        g.op("aten.repeat.default(%0, [3, 1])", x, outputs={"wide": (24, 16)})
        g.op("aten.slice.Tensor(%0, 0, 0, 8)", "wide", outputs={"narrow": (8, 16)})
        g.binary("add", "narrow", x, "b")
        g.binary("mul", "b", "a", "d")
        plan = Plan.of_order(g.build(g.binary("mul", "d", "c", "y")), machine(6 * 512))
        decision = RecomputeResidency().apply(plan, budget())
        assert decision.certificate is not None
        assert decision.certificate.value == 0
        again = [i.op for i in decision.plan.instructions if isinstance(i, Recompute)]
        assert again == ["op1" if costly == "a" else "op0"]


def test_random_operators_and_pinned_buffers_are_not_recomputed() -> None:
    graph = expensive(0)
    assert recomputed(tight(graph)) == ["op0"]
    ops = (msgspec.structs.replace(graph.ops[0], body="aten.rand_like.default(%0)"), *graph.ops[1:])
    assert recomputed(tight(msgspec.structs.replace(graph, ops=ops))) == []
    roomy = tight(graph, 0.9)
    pinned = msgspec.structs.replace(roomy, pins=(Pin("a", resident=True),))
    assert recomputed(pinned) == []


@settings(max_examples=30, deadline=None)
@given(plans(max_ops=8), st.data())
def test_pinned_buffers_stay(plan: Plan, data: st.DataObject) -> None:
    """One residence from the first to the last use, whatever else is recomputed, and with a reserve."""
    used = sorted({b for touched in plan.graph.touches for b in touched if plan.graph.buffers[b].nbytes})
    used = [b for b in used if b not in plan.streamed]
    chosen = data.draw(st.lists(st.sampled_from(used), max_size=2, unique=True)) if used else []
    pinned = msgspec.structs.replace(plan, pins=tuple(Pin(b, resident=True) for b in chosen))
    for reserve_bytes in (0, 7):
        try:
            fetched = IlpResidency(reserve_bytes=reserve_bytes).apply(pinned, budget()).certificate
        except Infeasible:
            return
        decision = RecomputeResidency(depth=3, reserve_bytes=reserve_bytes).apply(pinned, budget())
        confirm("residency/recompute", decision.plan, decision.certificate)
        assert decision.certificate is not None
        assert fetched is not None
        assert decision.certificate.value <= fetched.value


def recomputed(plan: Plan) -> list[str]:
    """Operators that run again."""
    decision = RecomputeResidency().apply(plan, budget())
    return [i.op for i in decision.plan.instructions if isinstance(i, Recompute)]


def test_energy_needs_a_machine_that_states_it() -> None:
    with pytest.raises(OptionError, match="memory 'sram' of machine 'test' states no energy_per_byte_j"):
        RecomputeResidency("energy").apply(tight(backward(4)), budget())
    npu = load("edge-npu").with_scratchpad(4096)
    RecomputeResidency("energy").apply(Plan.of_order(backward(4), npu), budget())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reserve_bytes": -1}, "reserve_bytes"), ({"depth": -1}, "depth"), ({"objective": "beauty"}, "traffic, latency")],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RecomputeResidency(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["traffic", "latency"])
def test_same_input_same_plan(objective: str) -> None:
    plan = tight(training_graph(12), 0.3)
    method = RecomputeResidency(objective)  # type: ignore[arg-type]
    assert method.apply(plan, budget()) == method.apply(plan, budget())


def test_without_time_nothing_is_worse_than_the_baseline() -> None:
    plan = tight(training_graph(24), 0.3, alignment=1)
    decision = RecomputeResidency().apply(plan, Budget.of_seconds(0.0))
    confirm("residency/recompute", decision.plan, decision.certificate)
    baseline = RefetchResidency().apply(plan, budget()).certificate
    assert baseline is not None
    assert decision.certificate is not None
    assert decision.certificate.value <= baseline.value
    assert decision.certificate.gap > 0
    assert "time limit came first" in decision.note


def test_stop_is_honoured_and_progress_told() -> None:
    stop, told = threading.Event(), list[Progress]()

    def listen(progress: Progress) -> None:
        told.append(progress)
        if progress.pass_name == "residency/recompute":
            stop.set()

    plan = tight(training_graph(80, 3), 0.2, alignment=1)
    begun = Budget.of_seconds(3600.0, listen=listen, stop=stop, workers=1)
    decision = RecomputeResidency().apply(plan, begun)
    confirm("residency/recompute", decision.plan, decision.certificate)
    assert decision.certificate is not None
    last = told[-1]
    assert last.bound is not None
    assert last.incumbent is not None
    assert decision.certificate.bound <= decision.certificate.value <= last.incumbent


def test_reserve_leaves_room() -> None:
    plan = tight(training_graph(12), 0.4, alignment=1)
    capacity = plan.machine.scratchpad_memory.capacity_bytes
    assert capacity - 300 >= least_capacity(plan)
    decision = RecomputeResidency(reserve_bytes=300).apply(plan, budget())
    confirm("residency/recompute", decision.plan, decision.certificate)
    assert verify(decision.plan).peak_bytes <= capacity - 300
    full = RecomputeResidency().apply(plan, budget()).certificate
    assert full is not None
    assert decision.certificate is not None
    assert decision.certificate.bound <= full.value <= decision.certificate.value
