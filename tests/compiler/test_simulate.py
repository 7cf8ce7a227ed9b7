"""Times the simulator gives: against hand-worked figures, the verifier, and the roofline bound."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Load, Plan, Residence, Run, Store
from opweave.compiler.simulate import simulate, timeline_summary
from opweave.compiler.verify import Fault, verify
from opweave.errors import PlanError
from opweave.hw_models.model import Direction, Engine, EngineKind, HardwareModel
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.edits import without_offsets
from tests.graphs.plans import keep_everything, keep_nothing
from tests.graphs.strategies import graphs

GRAPHS = all_graphs()


def round_machine(*more: Engine) -> HardwareModel:
    """256 bytes load in 1 s and compute in 2 s (256 flops at 128 flops/s); memories never bind."""
    engines = (
        Engine("core", EngineKind.COMPUTE, flops_per_s={"default": 128.0}),
        Engine("dma", EngineKind.COPY, bandwidth_bytes_per_s=256.0),
    )
    return msgspec.structs.replace(machine(), engines=(*engines, *more))


def two_independent_operators() -> Graph:
    g = GraphBuilder("two")
    for name in ("x", "z"):
        g.input(name, 4, 16)
    g.op("aten.relu.default(%0)", "x", outputs={"a": (4, 16)}, flops=256)
    g.op("aten.tanh.default(%0)", "z", outputs={"b": (4, 16)}, flops=256)
    return g.build("a", "b")


def spans(plan: Plan) -> list[tuple[float | None, float | None]]:
    return [(i.start_s, i.finish_s) for i in plan.instructions]


def two_operator_plan(z_offset: int | None) -> Plan:
    do = (Load("x"), Run("op0"), Load("z"), Run("op1"), Store("a"), Store("b"))
    offset = {"x": 0, "a": 256, "z": z_offset, "b": 1024}
    lives = {"x": (0, 2), "a": (1, 6), "z": (2, 4), "b": (3, 6)}
    residences = tuple(
        Residence(b, "sram", *lives[b], offset=None if z_offset is None else offset[b]) for b in ("x", "a", "z", "b")
    )
    return Plan(two_independent_operators(), round_machine(), do, residences)


def test_loads_and_stores_overlap_computes_where_bytes_are_free() -> None:
    plan = simulate(two_operator_plan(512))
    assert spans(plan) == [(0, 1), (1, 3), (1, 2), (3, 5), (3, 4), (5, 6)]
    assert [i.engine for i in plan.instructions] == ["dma", "core", "dma", "core", "dma", "dma"]


@pytest.mark.parametrize("z_offset", [0, 16, None])
def test_a_load_waits_for_the_last_user_of_the_bytes_it_takes(z_offset: int | None) -> None:
    """Shared bytes, even partly; without offsets any bytes may come to be shared."""
    plan = simulate(two_operator_plan(z_offset))
    assert spans(plan) == [(0, 1), (1, 3), (3, 4), (4, 6), (4, 5), (6, 7)]


def test_an_instruction_goes_to_the_engine_that_finishes_it_first() -> None:
    slow = Engine("slow", EngineKind.COMPUTE, flops_per_s={"default": 100.0})
    crawling = Engine("crawling", EngineKind.COMPUTE, flops_per_s={"default": 1.0})
    plan = msgspec.structs.replace(two_operator_plan(512), machine=round_machine(slow, crawling))
    timed = simulate(plan)
    assert [i.engine for i in timed.instructions if isinstance(i, Run)] == ["core", "slow"]
    assert spans(timed)[3] == (2, 2 + 2.56)


def test_streamed_bytes_occupy_the_compute_engine() -> None:
    graph = GRAPHS["shared_weight"]
    slow_backing = tuple(
        msgspec.structs.replace(m, bandwidth_bytes_per_s=1.0) if m.name == "dram" else m for m in machine().memories
    )
    plan = keep_everything(graph, msgspec.structs.replace(machine(), memories=slow_backing), streamed=("shared",))
    timed = simulate(plan)
    assert verify(timed).ok
    seconds = [i.finish_s - i.start_s for i in timed.instructions if isinstance(i, Run) and i.finish_s and i.start_s]
    assert [round(s) for s in seconds] == [4096, 0, 0, 4096]


def test_summary_counts_busy_seconds_and_the_bound() -> None:
    timeline = timeline_summary(simulate(two_operator_plan(512)))
    assert timeline.latency_s == 6
    assert [(e.engine, e.busy_s, e.utilisation) for e in timeline.engines] == [("core", 4, 4 / 6), ("dma", 4, 4 / 6)]
    assert (timeline.compute_bound_s, timeline.transfer_bound_s) == (4, 4)
    assert (timeline.bound_s, timeline.bound_by) == (4, "compute")


def test_bytes_of_engines_that_share_the_work_bound_together() -> None:
    second = Engine("dma2", EngineKind.COPY, bandwidth_bytes_per_s=256.0)
    plan = msgspec.structs.replace(two_operator_plan(512), machine=round_machine(second))
    assert timeline_summary(simulate(plan)).transfer_bound_s == 2


def machines() -> st.SearchStrategy[HardwareModel]:
    extra = st.sampled_from(
        [
            (),
            (Engine("core2", EngineKind.COMPUTE, flops_per_s={"default": 1e10}, launch_s=2e-6),),
            (Engine("dma2", EngineKind.COPY, bandwidth_bytes_per_s=1e7, latency_s=3e-6),),
        ]
    )
    return extra.map(lambda more: msgspec.structs.replace(machine(), engines=(*machine().engines, *more)))


@given(graphs(), machines(), st.booleans())
def test_simulated_plans_verify_and_never_beat_the_bound(graph: Graph, target: HardwareModel, keep: bool) -> None:
    addressed = (keep_everything if keep else keep_nothing)(graph, target)
    for plan in (addressed, without_offsets(addressed), Plan.of_order(graph, target)):
        timed = simulate(plan)
        assert [str(finding) for finding in verify(timed).faults] == []
        timeline = timeline_summary(timed)
        assert timeline.latency_s >= timeline.bound_s * (1 - 1e-12)  # rounding of sums in another order
        assert all(0 <= use.utilisation <= 1 for use in timeline.engines)
        assert simulate(timed) == timed


@given(graphs(), machines())
def test_no_offsets_are_never_faster_than_some(graph: Graph, target: HardwareModel) -> None:
    """With one engine of each kind the order of issue is fixed, so fewer constraints cannot be slower."""
    plan = keep_nothing(graph, msgspec.structs.replace(target, engines=target.engines[:2]))
    known, unknown = simulate(plan), simulate(without_offsets(plan))
    assert timeline_summary(known).latency_s <= timeline_summary(unknown).latency_s


def test_plans_that_name_unknown_things_end_in_one_error() -> None:
    plan = keep_everything(GRAPHS["chain"])
    with pytest.raises(PlanError, match="step 8 names operator 'nobody'"):
        simulate(msgspec.structs.replace(plan, instructions=(*plan.instructions, Run("nobody"))))
    with pytest.raises(PlanError, match="step 8 names buffer 'nothing'"):
        simulate(msgspec.structs.replace(plan, instructions=(*plan.instructions, Load("nothing"))))
    stray = Residence("nothing", "sram", 0, 1)
    with pytest.raises(PlanError, match="residence 0 names buffer 'nothing'"):
        simulate(msgspec.structs.replace(plan, residences=(stray,)))
    with pytest.raises(PlanError, match="step 0 has no times"):
        timeline_summary(plan)


def test_nothing_takes_no_time() -> None:
    timeline = timeline_summary(simulate(keep_everything(GRAPHS["no_operators"])))
    assert (timeline.latency_s, timeline.bound_s) == (0, 0)
    assert all(use.utilisation == 0 for use in timeline.engines)


def test_copy_engines_keep_to_their_direction() -> None:
    """Loads and stores of a machine with one engine for each run side by side, and swapping engines is a fault."""
    base = round_machine()
    dma = base.engines[1]
    engines = (
        base.engines[0],
        msgspec.structs.replace(dma, name="in", direction=Direction.LOAD),
        msgspec.structs.replace(dma, name="out", direction=Direction.STORE),
    )
    plan = msgspec.structs.replace(two_operator_plan(512), machine=msgspec.structs.replace(base, engines=engines))
    timed = simulate(plan)
    assert [i.engine for i in timed.instructions] == ["in", "core", "in", "core", "out", "out"]
    assert verify(timed).ok
    assert timeline_summary(timed).transfer_bound_s == 2
    swapped = tuple(
        msgspec.structs.replace(i, engine={"in": "out", "out": "in"}.get(i.engine, i.engine))
        for i in timed.instructions
    )
    faults = {finding.fault for finding in verify(msgspec.structs.replace(timed, instructions=swapped)).faults}
    assert faults == {Fault.ENGINE_OF_WRONG_KIND}
