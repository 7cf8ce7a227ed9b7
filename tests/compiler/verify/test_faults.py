"""Broken plans with exactly one fault each; together they cover the whole enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec
import pytest

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Certificate, Load, PassRecord, Pin, Plan, Residence, Run, Store
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import Fault, verify, verify_ranks
from opweave.hw_models.model import Engine, EngineKind
from tests.compiler.verify.collective_faults import (
    COLLECTIVE_FAULTS,
    RANK_FAULTS,
    communicating,
    on_ranks,
    resident,
    timed,
)
from tests.compiler.verify.recompute_faults import RECOMPUTE_FAULTS
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.edits import with_instruction, with_more, with_residence, with_times, without_offsets
from tests.graphs.plans import keep_everything, keep_nothing
from tests.graphs.recomputed import recomputing

Objective = Literal["additional_traffic_bytes", "peak_bytes", "arena_bytes"]

GRAPHS = all_graphs()
CHAIN = keep_everything(GRAPHS["chain"])
STEPS = len(CHAIN.instructions)
TIMED = simulate(CHAIN)
SPACED = keep_everything(GRAPHS["chain"], gap_bytes=16)
UNUSED = keep_everything(GRAPHS["unused_input"])
IN_PLACE = keep_nothing(GRAPHS["in_place"])
FAR = 1 << 16  # an offset that no small plan uses


def order(name: str, *steps: int) -> Plan:
    return Plan.of_order(GRAPHS[name], machine(), steps or None)


def streaming(plan: Plan, buffer: str) -> Plan:
    return msgspec.structs.replace(plan, streamed=(buffer,))


def on(plan: Plan, capacity_bytes: int) -> Plan:
    return msgspec.structs.replace(plan, machine=machine(capacity_bytes))


def banked(plan: Plan, *banks_bytes: int) -> Plan:
    return msgspec.structs.replace(plan, machine=plan.machine.with_banks(*banks_bytes))


def pinned(plan: Plan, *pins: Pin) -> Plan:
    return msgspec.structs.replace(plan, pins=pins)


def step_of(plan: Plan, do: type[Run | Load | Store], name: str) -> int:
    names = [(type(i), i.buffer if isinstance(i, Load | Store) else i.op) for i in plan.instructions]
    return names.index((do, name))


def moved_to(plan: Plan, step: int, other: int, *, behind: bool = False) -> Plan:
    """The instruction at ``step`` starts when ``other`` starts (or finishes), and ends when it did."""
    instruction, reference = plan.instructions[step], plan.instructions[other]
    start_s = reference.finish_s if behind else reference.start_s
    assert start_s is not None
    assert instruction.start_s is not None
    assert start_s < instruction.start_s
    return with_times(plan, step, start_s, instruction.finish_s)


def shortened(plan: Plan, step: int) -> Plan:
    """The instruction at ``step`` starts when it did and takes a millionth less time."""
    instruction = plan.instructions[step]
    assert instruction.start_s is not None
    assert instruction.finish_s is not None
    seconds = (instruction.finish_s - instruction.start_s) * (1 - 1e-6)
    return with_times(plan, step, instruction.start_s, instruction.start_s + seconds)


def without_residence(plan: Plan, buffer: str) -> Plan:
    return msgspec.structs.replace(plan, residences=tuple(r for r in plan.residences or () if r.buffer != buffer))


def claiming(plan: Plan, objective: Objective, value: int, bound: int, name: str = "residency/ilp") -> Plan:
    return plan.with_record(PassRecord(name, 1.0, Certificate(objective, value, bound, "ilp", "residency")))


def two_readers() -> Graph:
    g = GraphBuilder("two_readers")
    g.unary("relu", g.input("x", 8, 16), "a")
    g.unary("tanh", g.input("z", 8, 16), "b")
    return g.build("a", "b")


def handed_over() -> Plan:
    """``z`` takes the bytes of ``x`` over; only that makes its load wait for the operator that reads ``x``."""
    instructions = (Load("x"), Run("op0"), Load("z"), Run("op1"), Store("a"), Store("b"))
    residences = (
        Residence("x", "sram", 0, 2, 0),
        Residence("a", "sram", 1, 6, 512),
        Residence("z", "sram", 2, 4, 0),
        Residence("b", "sram", 3, 6, 1024),
    )
    return Plan(two_readers(), machine(), instructions, residences)


def overwritten_after_drop() -> Plan:
    """``a`` is stored and dropped; then an operator that does not read it writes half of it."""
    g = GraphBuilder("overwrite")
    x = g.input("x", 4, 16)
    a = g.unary("relu", x, "a")
    g.view("half", x, 2, 16)
    g.view("half_of_a", a, 2, 16)
    g.call("aten.clone.default(%0)", "half", outputs=("half_of_a",))
    instructions = (Load("x"), Run("op0"), Store("a"), Run("op1"), Run("op2"), Store("y"))
    residences = (
        Residence("x", "sram", 0, 6, 0),
        Residence("a", "sram", 1, 3, 256),
        Residence("y", "sram", 4, 6, 512),
    )
    return Plan(g.build(g.unary("tanh", x, "y")), machine(), instructions, residences)


def fetched_while_stored() -> Plan:
    """On a second copy engine, ``a`` is loaded again while its store is still under way."""
    one = machine()
    dma2 = Engine("dma2", EngineKind.COPY, bandwidth_bytes_per_s=1e12)
    two = msgspec.structs.replace(one, engines=(*one.engines, dma2))
    plan = msgspec.structs.replace(simulate(keep_nothing(GRAPHS["chain"], one)), machine=two)
    load = step_of(plan, Load, "a")
    elsewhere = with_instruction(plan, load, msgspec.structs.replace(plan.instructions[load], engine="dma2"))
    assert verify(elsewhere).ok
    return moved_to(elsewhere, load, step_of(plan, Store, "a"))


BROKEN: tuple[tuple[Fault, Callable[[], Plan]], ...] = (
    (Fault.OPERATOR_MISSING, lambda: order("chain", 0, 1, 2)),
    (Fault.OPERATOR_REPEATED, lambda: with_more(order("chain"), Run("op0"))),
    (Fault.OPERATOR_UNKNOWN, lambda: with_more(CHAIN, Run("nobody"))),
    (Fault.DEPENDENCY_VIOLATED, lambda: order("chain", 1, 0, 2, 3)),  # read after write
    (Fault.DEPENDENCY_VIOLATED, lambda: order("in_place", 1, 0, 2, 3, 4, 5)),  # write after read
    (Fault.DEPENDENCY_VIOLATED, lambda: order("in_place", 0, 2, 3, 1, 4, 5)),  # write after write
    (Fault.BUFFER_UNKNOWN, lambda: with_more(CHAIN, Store("nothing"))),
    (Fault.BUFFER_UNKNOWN, lambda: with_more(CHAIN, Load("nothing"))),
    (Fault.BUFFER_UNKNOWN, lambda: with_more(CHAIN, Residence("nothing", "sram", 0, 1, FAR))),
    (Fault.BUFFER_UNKNOWN, lambda: streaming(CHAIN, "nothing")),
    (Fault.MEMORY_UNKNOWN, lambda: with_residence(CHAIN, "a", memory="tape")),
    (Fault.NOT_THE_SCRATCHPAD, lambda: with_residence(CHAIN, "a", memory="dram")),
    (Fault.ENGINE_UNKNOWN, lambda: with_instruction(CHAIN, 0, Load("x", engine="oxen"))),
    (
        Fault.ENGINE_UNKNOWN,
        lambda: with_instruction(TIMED, 0, msgspec.structs.replace(TIMED.instructions[0], engine="")),
    ),
    (Fault.ENGINE_OF_WRONG_KIND, lambda: with_instruction(CHAIN, 0, Load("x", engine="core"))),
    (Fault.ENGINE_OF_WRONG_KIND, lambda: with_instruction(CHAIN, Run("op0"), Run("op0", engine="dma"))),
    (Fault.STREAMED_ILLEGALLY, lambda: streaming(order("chain"), "x")),  # an input
    (Fault.STREAMED_ILLEGALLY, lambda: streaming(order("in_place"), "state")),  # written
    (Fault.STREAMED_ILLEGALLY, lambda: streaming(CHAIN, "w")),  # resident too
    (Fault.STREAMED_ILLEGALLY, lambda: with_more(keep_everything(GRAPHS["chain"], streamed=("w",)), Load("w"))),
    (Fault.PARTLY_DECIDED, lambda: with_more(order("chain"), Store("y"))),
    (Fault.PARTLY_DECIDED, lambda: with_residence(CHAIN, "a", offset=None)),
    (Fault.PARTLY_DECIDED, lambda: with_times(TIMED, 2, None, 1.0)),
    (Fault.RESIDENCE_OUT_OF_RANGE, lambda: with_residence(CHAIN, "y", end=STEPS + 1)),
    (Fault.RESIDENCE_OUT_OF_RANGE, lambda: with_residence(CHAIN, "x", begin=-1)),
    (Fault.RESIDENCE_OUT_OF_RANGE, lambda: with_more(UNUSED, Residence("ignored", "sram", 2, 2, FAR))),
    (Fault.RESIDENCE_UNEXPLAINED, lambda: with_more(UNUSED, Residence("ignored", "sram", 1, 2, FAR))),  # at a Run
    (Fault.RESIDENCE_UNEXPLAINED, lambda: with_more(UNUSED, Residence("ignored", "sram", 3, 4, FAR))),  # at a Store
    (Fault.RESIDENCE_REPEATED, lambda: with_more(CHAIN, Residence("x", "sram", 0, 2, FAR))),
    (Fault.ZERO_BYTES_MOVED, lambda: with_more(keep_everything(GRAPHS["zero_bytes"]), Store("none"))),
    (Fault.ZERO_BYTES_MOVED, lambda: with_more(keep_everything(GRAPHS["zero_bytes"]), Load("empty"))),
    (
        Fault.ZERO_BYTES_MOVED,
        lambda: with_more(keep_everything(GRAPHS["zero_bytes"]), Residence("none", "sram", 1, 2, 0)),
    ),
    (Fault.NOT_RESIDENT_WHEN_READ, lambda: with_residence(CHAIN, "v", end=step_of(CHAIN, Load, "v") + 1)),
    (Fault.NOT_RESIDENT_WHEN_WRITTEN, lambda: without_residence(UNUSED, "dead")),
    (Fault.NOT_RESIDENT_WHEN_WRITTEN, overwritten_after_drop),
    (Fault.VALUE_LOST, lambda: with_residence(CHAIN, "a", end=step_of(CHAIN, Run, "op1"))),
    (Fault.LOAD_OF_RESIDENT, lambda: with_residence(with_more(CHAIN, Load("w")), "w", end=STEPS + 1)),
    (Fault.LOAD_WITHOUT_RESIDENCE, lambda: with_more(CHAIN, Load("w"))),
    (Fault.LOAD_WITHOUT_COPY, lambda: with_instruction(keep_nothing(GRAPHS["chain"]), Store("a"), Store("x"))),
    (Fault.LOAD_OF_STALE_COPY, lambda: with_instruction(IN_PLACE, Store("state"), Store("x"))),
    (Fault.STORE_NOT_RESIDENT, lambda: with_more(CHAIN, Store("w"))),
    (Fault.OUTPUT_NOT_STORED, lambda: with_instruction(CHAIN, Store("y"), Store("x"))),
    (Fault.CAPACITY_EXCEEDED, lambda: without_offsets(on(CHAIN, verify(CHAIN).peak_bytes - 1))),
    (Fault.OUT_OF_BOUNDS, lambda: on(SPACED, verify(SPACED).arena_bytes - 1)),
    (Fault.OUT_OF_BOUNDS, lambda: with_residence(CHAIN, "x", offset=-FAR)),
    (Fault.MISALIGNED, lambda: with_residence(CHAIN, "x", offset=FAR + 1)),
    (Fault.REGIONS_OVERLAP, lambda: with_residence(SPACED, "w", offset=496)),
    (Fault.BANK_CROSSED, lambda: banked(CHAIN, 16, FAR)),
    (Fault.BUFFER_UNKNOWN, lambda: pinned(CHAIN, Pin("nobody"))),
    (Fault.PIN_MOVED, lambda: pinned(CHAIN, Pin("x", offset=FAR))),
    (Fault.PIN_MOVED, lambda: pinned(CHAIN, Pin("x", bank=1))),
    (Fault.PIN_RELEASED, lambda: pinned(IN_PLACE, Pin("state", resident=True))),
    (Fault.TIME_MALFORMED, lambda: with_times(TIMED, 0, -1.0, 0.0)),
    (Fault.TIME_MALFORMED, lambda: with_times(TIMED, 0, 1.0, 0.5)),
    (Fault.TIME_MALFORMED, lambda: with_times(TIMED, 0, math.nan, 1.0)),
    (Fault.TIME_MALFORMED, lambda: with_times(TIMED, STEPS - 1, 1.0, math.inf)),
    (Fault.FASTER_THAN_MACHINE, lambda: shortened(TIMED, 0)),
    (Fault.FASTER_THAN_MACHINE, lambda: shortened(TIMED, step_of(TIMED, Run, "op0"))),
    (Fault.FASTER_THAN_MACHINE, lambda: shortened(TIMED, STEPS - 1)),
    (Fault.ENGINE_OVERLAP, lambda: moved_to(TIMED, 1, 0)),
    (Fault.STARTS_BEFORE_OPERANDS, lambda: moved_to(TIMED, step_of(TIMED, Run, "op0"), 0)),
    (Fault.STARTS_BEFORE_OPERANDS, lambda: moved_to(TIMED, STEPS - 1, STEPS - 2)),  # a store before its value
    (Fault.STARTS_BEFORE_OPERANDS, fetched_while_stored),
    (Fault.STARTS_BEFORE_REGION_FREE, lambda: moved_to(simulate(handed_over()), 2, 0, behind=True)),
    (Fault.CLAIM_REFUTED, lambda: claiming(CHAIN, "additional_traffic_bytes", 16, 0)),
    (Fault.CLAIM_REFUTED, lambda: claiming(without_offsets(CHAIN), "additional_traffic_bytes", 16, 0)),
    (Fault.CLAIM_REFUTED, lambda: claiming(CHAIN, "arena_bytes", verify(CHAIN).arena_bytes - 16, 0)),
    (Fault.CLAIM_REFUTED, lambda: claiming(CHAIN, "additional_traffic_bytes", 0, 16)),  # the bound contradicts it
    (Fault.CLAIM_REFUTED, lambda: claiming(order("chain"), "peak_bytes", 3584, 3585)),
    (Fault.STARTS_BEFORE_REGION_FREE, lambda: moved_to(simulate(without_offsets(handed_over())), 2, 0, behind=True)),
    *RECOMPUTE_FAULTS,
    *COLLECTIVE_FAULTS,
)


@pytest.mark.parametrize(("fault", "broken"), BROKEN, ids=[f"{i}-{fault.name}" for i, (fault, _) in enumerate(BROKEN)])
def test_broken_plan_has_exactly_this_fault(fault: Fault, broken: Callable[[], Plan]) -> None:
    verification = verify(broken())
    assert {finding.fault for finding in verification.faults} == {fault}, list(map(str, verification.faults))
    assert not verification.ok
    for finding in verification.faults:
        assert fault.value in str(finding)
        assert "'" in finding.message  # names what is concerned


def test_every_fault_is_made() -> None:
    assert {fault for fault, _ in (*BROKEN, *RANK_FAULTS)} == set(Fault)


@pytest.mark.parametrize(("fault", "broken"), RANK_FAULTS)
def test_ranks_that_do_not_go_together(fault: Fault, broken: Callable[[], dict[int, Plan]]) -> None:
    plans = broken()
    assert all(verify(plan).ok for plan in plans.values())
    findings = verify_ranks(plans)
    assert {finding.fault for finding in findings} == {fault}, list(map(str, findings))
    assert all("'" in finding.message for finding in findings)


def test_ranks_that_go_together() -> None:
    """What is started and waited for in one order, whatever comes in between; also where a group reaches further."""
    blocking = communicating(Run("op0"), Run("op1"), Run("op2"), Run("op3"))
    for plan in (communicating(), resident(), timed(), blocking):
        assert verify(plan).ok, list(map(str, verify(plan).faults))
        assert not verify_ranks(on_ranks(plan, communicating()))
        assert not verify_ranks({1: plan})


def test_a_rank_that_leaves_a_collective_out() -> None:
    """The other one waits for ever."""
    alone = msgspec.structs.replace(communicating(), instructions=(Run("op0"),))
    faults = {finding.fault for finding in verify_ranks(on_ranks(communicating(), alone))}
    assert faults == {Fault.COLLECTIVE_ORDER_DIFFERS, Fault.RANKS_WAIT_FOR_EACH_OTHER}


def test_pins_that_are_kept() -> None:
    offsets = {r.buffer: r.offset for r in CHAIN.residences or ()}
    pins = tuple(Pin(name, offset=offset, bank=0, resident=True) for name, offset in offsets.items())
    assert verify(pinned(CHAIN, *pins)).ok
    assert verify(pinned(banked(CHAIN, verify(CHAIN).arena_bytes, FAR), *pins)).ok


def test_claims_stand_until_the_decision_is_taken_again() -> None:
    wrong = claiming(CHAIN, "additional_traffic_bytes", 16, 0)
    assert verify(claiming(wrong, "additional_traffic_bytes", 0, 0, "residency/belady")).ok
    assert verify(wrong.with_record(PassRecord("residency/belady", 1.0))).ok
    assert not verify(wrong.with_record(PassRecord("address/exact", 1.0))).ok
    assert verify(wrong.with_record(PassRecord("joint/cosma", 1.0))).ok
    assert verify(claiming(wrong, "additional_traffic_bytes", 0, 0, "joint/cosma")).ok
    jointly = claiming(CHAIN, "additional_traffic_bytes", 16, 0, "joint/cosma")
    assert not verify(jointly).ok
    assert verify(claiming(jointly, "additional_traffic_bytes", 0, 0)).ok
    assert verify(wrong.with_order(wrong.order)).ok  # dropped with the residences
    assert verify(claiming(without_offsets(CHAIN), "arena_bytes", 16, 0)).ok


@pytest.mark.parametrize(
    "plan",
    [CHAIN, TIMED, UNUSED, IN_PLACE, handed_over(), simulate(handed_over()), recomputing(), simulate(recomputing())],
)
def test_the_plans_they_are_made_from_are_right(plan: Plan) -> None:
    assert verify(plan).ok
