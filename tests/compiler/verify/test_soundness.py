"""A plan that verifies computes the right outputs: checked by an independent replay of changed plans."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Instruction, Load, Plan, Residence, Run, Store
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import Fault, verify
from opweave.hw_models.model import Engine, EngineKind, HardwareModel
from tests.graphs.build import all_graphs, machine
from tests.graphs.edits import with_residence, with_times
from tests.graphs.plans import keep_everything, keep_nothing
from tests.graphs.replay import computes_the_right_outputs
from tests.graphs.strategies import graphs


def two_of_each() -> HardwareModel:
    base = machine(capacity_bytes=1 << 12)
    core = Engine("core2", EngineKind.COMPUTE, flops_per_s={"default": 1e10}, launch_s=3e-6)
    dma = Engine("dma2", EngineKind.COPY, bandwidth_bytes_per_s=1e7, latency_s=2e-6)
    return msgspec.structs.replace(base, engines=(*base.engines, core, dma))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    graph: Graph = draw(graphs(max_ops=5))
    make = draw(st.sampled_from((keep_everything, keep_nothing)))
    return make(graph, two_of_each())


def shifted_by(plan: Plan, step: int, by: int) -> Plan:
    """Residences where every step from ``step`` on comes ``by`` later."""

    def moved(at: int) -> int:
        return at + by if at > step else at

    residences = tuple(
        Residence(r.buffer, r.memory, moved(r.begin), moved(r.end), r.offset) for r in plan.residences or ()
    )
    return msgspec.structs.replace(plan, residences=residences)


@st.composite
def changed_plans(draw: st.DrawFn) -> Plan:
    """Right plans with one or two changes; a few stay right, as after a swap of independent instructions."""
    plan: Plan = draw(plans())
    for _ in range(draw(st.integers(1, 2))):
        plan = _changed(draw, plan)
    return plan


def _changed(draw: st.DrawFn, plan: Plan) -> Plan:
    residences, instructions = plan.residences or (), plan.instructions
    kind = draw(st.sampled_from(("offset", "end", "begin", "drop", "drop and shift", "swap", "replace")))
    if kind in ("offset", "end", "begin"):
        if not residences:
            return plan
        index = draw(st.integers(0, len(residences) - 1))
        old = residences[index]
        if kind == "offset":
            new = msgspec.structs.replace(old, offset=(old.offset or 0) + 16 * draw(st.integers(-8, 8)))
        else:
            by = draw(st.integers(-3, 3))
            new = msgspec.structs.replace(old, **{kind: getattr(old, kind) + by})
        return msgspec.structs.replace(plan, residences=(*residences[:index], new, *residences[index + 1 :]))
    if not instructions:
        return plan
    step = draw(st.integers(0, len(instructions) - 1))
    if kind.startswith("drop"):
        short = msgspec.structs.replace(plan, instructions=(*instructions[:step], *instructions[step + 1 :]))
        return shifted_by(short, step, -1) if kind == "drop and shift" else short
    changed = list(instructions)
    other = draw(st.integers(0, len(instructions) - 1))
    if kind == "swap":
        changed[step], changed[other] = changed[other], changed[step]
    else:
        changed[step] = instructions[other]
    return msgspec.structs.replace(plan, instructions=tuple(changed))


@settings(max_examples=300)
@given(changed_plans())
def test_a_changed_plan_is_caught_or_still_computes_the_right_outputs(plan: Plan) -> None:
    if verify(plan).ok:
        assert computes_the_right_outputs(plan)


@settings(max_examples=200)
@given(plans(), st.data())
def test_changed_times_are_caught_or_still_compute_the_right_outputs(plan: Plan, data: st.DataObject) -> None:
    timed = simulate(plan)
    assert verify(timed).ok
    assert computes_the_right_outputs(timed)
    if not timed.instructions:
        return
    step = data.draw(st.integers(0, len(timed.instructions) - 1))
    instruction = timed.instructions[step]
    assert instruction.start_s is not None
    assert instruction.finish_s is not None
    start_s = data.draw(st.sampled_from([i.start_s for i in timed.instructions if i.start_s is not None]))
    moved = with_times(timed, step, start_s, start_s + (instruction.finish_s - instruction.start_s))
    engine = data.draw(st.sampled_from([e.name for e in timed.machine.engines]))
    again: Instruction = msgspec.structs.replace(moved.instructions[step], engine=engine)
    moved = msgspec.structs.replace(
        moved, instructions=(*moved.instructions[:step], again, *moved.instructions[step + 1 :])
    )
    if verify(moved).ok:
        assert computes_the_right_outputs(moved)


@settings(max_examples=200)
@given(changed_plans())
def test_verify_raises_nothing_on_odd_plans(plan: Plan) -> None:
    verification = verify(plan)
    assert verification.total_bytes == verification.compulsory_bytes + verification.additional_bytes
    timed = tuple(msgspec.structs.replace(i, start_s=float("nan"), finish_s=float("-inf")) for i in plan.instructions)
    faults = {finding.fault for finding in verify(msgspec.structs.replace(plan, instructions=timed)).faults}
    assert not timed or {Fault.TIME_MALFORMED, Fault.ENGINE_UNKNOWN} <= faults


CHAIN = keep_everything(all_graphs()["chain"])


@pytest.mark.parametrize(
    "plan",
    [
        with_residence(CHAIN, "w", offset=0),  # over x
        with_residence(CHAIN, "a", end=CHAIN.instructions.index(Run("op1"))),
        msgspec.structs.replace(CHAIN, instructions=(*CHAIN.instructions[:-1], Store("x"))),
        msgspec.structs.replace(CHAIN, instructions=(Load("w"), *CHAIN.instructions[1:])),
        with_times(simulate(CHAIN), CHAIN.instructions.index(Run("op0")), 0.0, 1e-9),
    ],
)
def test_the_replay_can_tell_wrong_plans(plan: Plan) -> None:
    assert computes_the_right_outputs(CHAIN)
    assert not computes_the_right_outputs(plan)
    assert not verify(plan).ok
