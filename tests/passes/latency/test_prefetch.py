"""Moving transfers: right plans, the same bytes, never slower, and as fast as can be where that is known."""

from __future__ import annotations

from itertools import permutations

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Role
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Instruction, Load, Pin, Plan, Run, Store
from opweave.compiler.simulate import latency_ns, simulate
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.hw_models.model import Direction, Engine, EngineKind, HardwareModel
from opweave.passes.latency.bound import latency_bound_of_order_s, latency_bound_s
from opweave.passes.latency.prefetch import Prefetch
from opweave.passes.planner import Planner
from opweave.passes.residency.workset import least_capacity
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, all_graphs, machine, random_sources
from tests.graphs.edits import without_offsets
from tests.graphs.replay import computes_the_right_outputs
from tests.graphs.strategies import graphs
from tests.passes.residency.crowded import crowded_graphs

FAST = Planner("order/given", "residency/least_cost", "address/exact")


def budget(*, deterministic: bool = True) -> Budget:
    return Budget.of_seconds(30, deterministic=deterministic, workers=1)


KINDS = ("even", "two_way", "slow_copy", "slow_compute")


def target(capacity_bytes: int, kind: str) -> HardwareModel:
    """A machine whose transfers of a few bytes take as long as operators, a tenth or ten times of it.

    ``two_way`` has a copy engine for each direction and two compute engines.
    """
    latency_s = {"slow_copy": 1e-5, "slow_compute": 1e-7}.get(kind, 1e-6)
    bandwidth = {"slow_copy": 1e6, "slow_compute": 1e9}.get(kind, 1e8)
    engines = [Engine("core", EngineKind.COMPUTE, flops_per_s={"default": 1e9}, launch_s=1e-6)]
    directions = {"in_out": Direction.BOTH}
    if kind == "two_way":
        engines.append(Engine("slow", EngineKind.COMPUTE, flops_per_s={"default": 1e8}, launch_s=3e-6))
        directions = {"in": Direction.LOAD, "out": Direction.STORE}
    for name, direction in directions.items():
        copy = Engine(name, EngineKind.COPY, bandwidth_bytes_per_s=bandwidth, latency_s=latency_s, direction=direction)
        engines.append(copy)
    return msgspec.structs.replace(machine(capacity_bytes), engines=tuple(engines))


def placed(graph: Graph, extra_bytes: int, kind: str = "even", residency: str = "residency/least_cost") -> Plan:
    """The graph's own order placed in the least scratchpad and ``extra_bytes``."""
    capacity = max(16, least_capacity(Plan.of_order(graph, machine()))) + extra_bytes
    planner = Planner("order/given", residency, "address/exact")
    return planner.plan(Plan.of_order(graph, target(capacity, kind)), budget())


def storing_every_version(plan: Plan) -> Plan:
    """``plan`` with a store behind every operator for each buffer it writes, so that versions may not be mixed up."""
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    sequence: list[Instruction] = []
    place = []
    for step, instruction in enumerate(plan.instructions):
        place.append(len(sequence))
        sequence.append(instruction)
        if isinstance(instruction, Run):
            written = plan.graph.writes[index[instruction.op]]
            sequence += [
                Store(r.buffer) for r in plan.residences or () if r.buffer in written and r.begin <= step < r.end
            ]
    place.append(len(sequence))
    residences = tuple(
        msgspec.structs.replace(r, begin=place[r.begin], end=place[r.end]) for r in plan.residences or ()
    )
    return msgspec.structs.replace(plan, instructions=tuple(sequence), residences=residences, passes=())


def moves(plan: Plan) -> list[tuple[str, str]]:
    return sorted((type(i).__name__, i.buffer) for i in plan.instructions if isinstance(i, Load | Store))


def assert_improves(before: Plan, after: Plan) -> None:
    assert verify(simulate(after)).faults == ()
    assert moves(after) == moves(before)
    assert after.order == before.order
    bounds = latency_bound_s(before), latency_bound_of_order_s(before)
    assert bounds[0] <= bounds[1]
    assert bounds[1] * 1e9 - 1 <= latency_ns(after) <= latency_ns(before)


@settings(deadline=None, max_examples=150)
@given(
    crowded_graphs(max_ops=12),
    st.integers(0, 300),
    st.sampled_from(KINDS),
    st.sampled_from(("residency/least_cost", "residency/refetch")),
    st.booleans(),
)
def test_random_plans_stay_right_and_never_slow_down(
    graph: Graph, extra_bytes: int, kind: str, residency: str, stores: bool
) -> None:
    """Versions, updates in place, spills and needless transfers: the plan computes the same, event by event."""
    before = placed(graph, extra_bytes, kind, residency)
    before = storing_every_version(before) if stores else before
    assert verify(before).faults == ()
    after = run_pass(Prefetch(), before, budget())
    assert_improves(before, after)
    assert computes_the_right_outputs(simulate(after))


@settings(deadline=None, max_examples=25)
@given(crowded_graphs(), st.integers(0, 100), st.sampled_from(KINDS))
def test_recomputations_stay_right(graph: Graph, extra_bytes: int, kind: str) -> None:
    before = placed(graph, extra_bytes, kind, "residency/recompute")
    after = run_pass(Prefetch(), before, budget())
    assert_improves(before, after)
    assert computes_the_right_outputs(simulate(after))


@settings(deadline=None, max_examples=40)
@given(crowded_graphs(), st.integers(0, 10), st.sampled_from(KINDS))
def test_banks_and_pins_are_kept(graph: Graph, extra: int, kind: str) -> None:
    """Two banks that each hold any operator; the first buffer stays in the second one."""
    least = -(-least_capacity(Plan.of_order(graph, machine())) // 16) * 16
    banked = target(2 * least, kind).with_banks(least, least + 16 * extra)
    used = next(buffer for touched in graph.touches for buffer in touched)
    before = FAST.plan(Plan.of_order(graph, banked, pins=(Pin(used, bank=1),)), budget())
    after = run_pass(Prefetch(), before, budget())
    assert_improves(before, after)


@settings(deadline=None, max_examples=60)
@given(crowded_graphs(), st.integers(0, 200), st.sampled_from(KINDS))
def test_plans_without_offsets_stay_right_too(graph: Graph, extra_bytes: int, kind: str) -> None:
    before = without_offsets(placed(graph, extra_bytes, kind))
    before = msgspec.structs.replace(before, passes=())
    after = run_pass(Prefetch(), before, budget())
    assert_improves(before, after)
    assert all(residence.offset is None for residence in after.residences or ())


@settings(deadline=None, max_examples=30)
@given(graphs(), st.integers(0, 4))
def test_random_models_compute_what_eager_computes(graph: Graph, extra: int) -> None:
    after = run_pass(Prefetch(), placed(graph, 64 * extra), budget())
    sources = random_sources(graph)
    assert same(run(after, sources), graph, sources)


def matmuls(count: int) -> Graph:
    """A chain of products, each with a weight of its own, all times equal on ``even_machine``."""
    g = GraphBuilder("matmuls")
    y = g.input("x", 16, 16)
    for i in range(count):
        y = g.matmul(y, g.weight(f"w{i}", 16, 16), f"y{i}")
    return g.build(y)


def even_machine(capacity_bytes: int) -> HardwareModel:
    """A weight of ``matmuls`` loads in 1 s, and a product takes 1 s."""
    engines = (
        Engine("core", EngineKind.COMPUTE, flops_per_s={"default": 2.0 * 16**3}),
        Engine("dma", EngineKind.COPY, bandwidth_bytes_per_s=1024.0),
    )
    return msgspec.structs.replace(machine(capacity_bytes), engines=engines)


def test_two_weights_at_a_time_hide_all_loads_but_the_first() -> None:
    """Room for a product's operands and one more weight: x and w0 load, eight products run, y7 is stored."""
    plan = FAST.plan(Plan.of_order(matmuls(8), even_machine(4 * 1024)), budget())
    after = run_pass(Prefetch(), plan, budget())
    assert latency_ns(after) == (2 + 8 + 1) * 10**9
    certificate = after.certificates[-1]
    assert (certificate.objective, certificate.gap, certificate.scope) == ("latency_ns", 0.0, "residency")


def test_without_room_for_another_weight_nothing_can_be_hidden() -> None:
    plan = FAST.plan(Plan.of_order(matmuls(8), even_machine(3 * 1024)), budget())
    after = run_pass(Prefetch(), plan, budget())
    assert latency_ns(after) == latency_ns(plan) == (1 + 8 * 2 + 1) * 10**9
    assert latency_bound_s(plan) == 2 + 8 + 1
    assert latency_bound_of_order_s(plan) == 1 + 8 * 2 + 1


def test_a_store_gives_way_to_loads_that_are_waited_for() -> None:
    """Storing an output right when it is final would keep the next product waiting for its weight."""
    g = GraphBuilder("outputs")
    x = g.input("x", 16, 16)
    made = [g.matmul(x, g.weight(f"w{i}", 16, 16), f"y{i}") for i in range(6)]
    plan = FAST.plan(Plan.of_order(g.build(*made), even_machine(16 * 1024)), budget())
    after = run_pass(Prefetch(), plan, budget())
    assert latency_ns(plan) > latency_ns(after) == (1 + 6 + 6) * 10**9


@pytest.mark.parametrize("name", all_graphs())
def test_the_bound_holds_for_every_order(name: str) -> None:
    """No order of a small graph, planned for speed, ends before the bound; nor before the bound of that order."""
    graph = all_graphs()[name]
    empty = Plan.of_order(graph, machine(1 << 16))
    bound = latency_bound_s(empty) * 1e9
    orders = (o for o in permutations(range(len(graph.ops))) if is_valid(graph, o))
    for order, _ in zip(orders, range(20), strict=False):
        plan = FAST.plan(empty.with_order(order), budget())
        after = run_pass(Prefetch(), plan, budget())
        assert bound <= latency_bound_of_order_s(after) * 1e9 <= latency_ns(after) + 1


def is_valid(graph: Graph, order: tuple[int, ...]) -> bool:
    place = {op: position for position, op in enumerate(order)}
    return all(place[b] < place[op] for op, before in enumerate(graph.predecessors) for b in before)


@settings(deadline=None, max_examples=25)
@given(crowded_graphs(max_ops=4))
def test_no_sequence_beats_the_bound_and_none_is_beaten_by_it(graph: Graph) -> None:
    """Bound <= the fastest of all sequences of the instructions <= what the pass finds, for tiny plans."""
    before = msgspec.structs.replace(without_offsets(placed(graph, 1 << 12)), passes=())
    assume(len(before.instructions) <= 6)
    after = run_pass(Prefetch(), before, budget())
    sequences = all_sequences(before)
    fastest = min(latency_ns(plan) for plan in sequences)
    in_order = min(latency_ns(plan) for plan in sequences if plan.order == before.order)
    assert latency_bound_of_order_s(before) * 1e9 - 1 <= in_order <= latency_ns(after)
    assert latency_bound_s(before) * 1e9 - 1 <= fastest <= latency_ns(after)


def all_sequences(plan: Plan) -> list[Plan]:
    """Every order of the plan's instructions in which everything stays resident and nothing is faulty."""
    end = len(plan.instructions)
    found = []
    for order in permutations(plan.instructions):
        begins = {i.buffer: step for step, i in reversed(list(enumerate(order))) if isinstance(i, Load)}
        index = {op.name: n for n, op in enumerate(plan.graph.ops)}
        for step, instruction in reversed(list(enumerate(order))):
            if not isinstance(instruction, Load | Store):
                written = plan.graph.writes[index[instruction.op]]
                begins |= {b: step for b in written if not plan.graph.buffers[b].role.is_source}
        residences = tuple(
            msgspec.structs.replace(r, begin=begins[r.buffer], end=end)
            for r in plan.residences or ()
            if r.buffer in begins
        )
        candidate = msgspec.structs.replace(plan, instructions=order, residences=residences)
        if not verify(candidate).faults:
            found.append(candidate)
    return found


def test_a_plan_without_residences_is_refused() -> None:
    with pytest.raises(OptionError, match="latency/prefetch moves loads and stores and the plan has no residences"):
        Prefetch().apply(Plan.of_order(matmuls(1), machine()), budget())


def test_the_effort_is_positive() -> None:
    with pytest.raises(OptionError, match="more than 0 seconds"):
        Prefetch(effort=0)


def test_a_stop_leaves_the_plan_as_it_is() -> None:
    plan = placed(matmuls(4), 4096)
    stopped = budget(deterministic=False)
    stopped.stop.set()
    assert Prefetch().apply(plan, stopped).plan == plan


def test_streamed_weights_are_not_loaded() -> None:
    graph = matmuls(4)
    weights = [name for name, base in graph.buffers.items() if base.role is Role.WEIGHT]
    plan = FAST.plan(Plan.of_order(graph, machine(1 << 14), streamed=weights), budget())
    after = run_pass(Prefetch(), plan, budget())
    assert_improves(plan, after)
    assert [buffer for _, buffer in moves(after)] == ["x", "y3"]


def test_claims_about_places_that_changed_are_withdrawn() -> None:
    """The saved plan verifies with its records: the arena certified before is another one now."""
    plan = placed(matmuls(6), 4096)
    after = simulate(run_pass(Prefetch(), plan, budget()))
    assert after.residences != plan.residences
    assert verify(after).faults == ()
