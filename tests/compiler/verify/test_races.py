"""Plans over several streams with exactly one fault each, and proof that every wait of a reduced set is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import msgspec
import pytest
import torch

from opweave.compiler.plan import Instruction, Load, Plan, Recompute, Residence, Run, Store
from opweave.compiler.runtime.device.graph import planning_graph
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.order import recorded, synchronisation
from opweave.compiler.runtime.device.program import Call, Origin, Program, Ref, Storage, View
from opweave.compiler.verify.races import RaceFault, RaceFinding, find_races
from opweave.hw_models.registry import load
from tests.support.streamed import made_by_calls, on_streams, planned, random_program

NBYTES = 512
MAIN, SIDE = "sm", "sm1"
MACHINE = load("h100-sxm").with_streams(2)


def call(name: str, reads: str, writes: str, *, effect: bool = False) -> Call:
    return Call(name, "aten.add.out", (), {}, tuple(reads.split()), tuple(writes.split()), (), effect)


def program_of(*calls: Call, outputs: str = "", **origins: Origin) -> Program:
    """A program over storages that are planned unless ``origins`` says otherwise."""
    names = dict.fromkeys(n for c in calls for n in (*c.reads, *c.writes))
    storages = {n: Storage(n, NBYTES, torch.uint8, torch.device("cpu"), origins.get(n, Origin.PLANNED)) for n in names}
    views = {n: View(n, n, (NBYTES,), (1,), 0, torch.uint8) for n in names}
    inputs = tuple(Ref(n) for n in names if origins.get(n) in (Origin.INPUT, Origin.GIVEN))
    returned = tuple(Ref(n) for n in outputs.split())
    return Program("p", inputs, returned, MappingProxyType(storages), MappingProxyType(views), calls, {})


def plan_of(program: Program, engines: str, offsets: dict[str, int] | None = None, *, steps: str = "") -> DevicePlan:
    """The program's order, or ``steps``, on ``engines``; each buffer stays from first to last use, apart by default."""
    graph = planning_graph(program)
    plan = Plan.of_order(graph, MACHINE)
    names = steps.split() or [op.name for op in graph.ops]
    runs = tuple(Run(name, engine) for name, engine in zip(names, engines.split(), strict=True))
    index = {op.name: i for i, op in enumerate(graph.ops)}
    uses = {
        name: [step for step, run in enumerate(runs) if name in graph.touches[index[run.op]]]
        for name, base in graph.buffers.items()
        if base.nbytes
    }
    own = {name: number * NBYTES for number, name in enumerate(uses)}
    own |= offsets or {}
    residences = tuple(Residence(n, "hbm", steps[0], steps[-1] + 1, own[n]) for n, steps in uses.items())
    lone = {
        n for n, s in program.storages.items() if s.origin in (Origin.OUTPUT, Origin.CALL, Origin.GIVEN)
    } & own.keys()
    arena = min((own[n] for n in lone), default=len(own) * NBYTES)
    plan = msgspec.structs.replace(plan, instructions=runs, residences=residences)
    return DevicePlan(plan, arena, {n: own[n] for n in lone})


def waiting(program: Program, device_plan: DevicePlan) -> DevicePlan:
    return replace(device_plan, waits=synchronisation(device_plan, made_by_calls(program)))


BRANCHES = program_of(
    call("left", "x", "a"),
    call("right", "x", "b"),
    call("join", "a b", "y"),
    outputs="y",
    x=Origin.INPUT,
    y=Origin.OUTPUT,
)
ON_TWO = waiting(BRANCHES, plan_of(BRANCHES, "sm sm1 sm sm"))


def test_branches_need_one_wait() -> None:
    """What joins two streams waits for the other one; what returns is behind everything without waiting."""
    assert ON_TWO.waits == ((), (), (1,), ())
    assert recorded(ON_TWO.waits) == {1}
    assert find_races(BRANCHES, ON_TWO) == ()


def with_steps(device_plan: DevicePlan, *steps: Instruction) -> DevicePlan:
    return replace(device_plan, plan=msgspec.structs.replace(device_plan.plan, instructions=steps))


def without_engine() -> tuple[Program, DevicePlan]:
    steps = list(ON_TWO.plan.instructions)
    steps[1] = msgspec.structs.replace(steps[1], engine="")
    return BRANCHES, with_steps(ON_TWO, *steps)


def without_call() -> tuple[Program, DevicePlan]:
    return replace(BRANCHES, calls=(*BRANCHES.calls, call("more", "x", "x"))), ON_TWO


def unknown_call() -> tuple[Program, DevicePlan]:
    plan = with_steps(ON_TWO, *ON_TWO.plan.instructions, Recompute("nothing", MAIN))
    return BRANCHES, replace(plan, waits=(*plan.waits, ()))


def without_address() -> tuple[Program, DevicePlan]:
    residences = tuple(r for r in ON_TWO.plan.residences or () if r.buffer != "a")
    return BRANCHES, replace(ON_TWO, plan=msgspec.structs.replace(ON_TWO.plan, residences=residences))


def effects() -> tuple[Program, DevicePlan]:
    program = program_of(call("first", "x", "a", effect=True), call("second", "x", "b", effect=True), x=Origin.INPUT)
    return program, plan_of(program, "sm sm1")


def repeated_effect() -> tuple[Program, DevicePlan]:
    program = program_of(call("draw", "x", "a", effect=True), x=Origin.INPUT)
    device_plan = plan_of(program, "sm")
    plan = msgspec.structs.replace(
        device_plan.plan,
        instructions=(*device_plan.plan.instructions, Recompute("draw", MAIN)),
        residences=(Residence("a", "hbm", 0, 2, 0),),
    )
    return program, replace(device_plan, plan=plan)


#: ``a``, made by a call on the first stream, is read on the second, freed, and its bytes made into ``c`` on the first.
REUSE = program_of(
    call("make", "x", "a"),
    call("read", "a", "b"),
    call("again", "x", "c"),
    x=Origin.INPUT,
    a=Origin.CALL,
    c=Origin.CALL,
)


def reuse() -> tuple[Program, DevicePlan]:
    device_plan = plan_of(REUSE, "sm sm1 sm", {"b": 0, "a": NBYTES, "c": 2 * NBYTES})
    return REUSE, replace(device_plan, waits=((), (0,), ()))


def host_reuse() -> tuple[Program, DevicePlan]:
    """The same with an input that is handed over, whose pool is unknown, and an output."""
    program = program_of(
        call("read", "g", "b"), call("write", "x", "y"), outputs="y", x=Origin.INPUT, g=Origin.GIVEN, y=Origin.OUTPUT
    )
    return program, plan_of(program, "sm sm1 sm sm", {"b": 0, "g": NBYTES, "y": 2 * NBYTES})


def read_too_early() -> tuple[Program, DevicePlan]:
    program = program_of(call("update", "x", "x"), call("read", "x", "a"), x=Origin.INPUT)
    return program, plan_of(program, "sm sm", steps="read update")


def lost_update() -> tuple[Program, DevicePlan]:
    """Two updates of an input that read nothing, in the wrong order: the caller would find the first one's bytes."""
    program = program_of(call("fill", "", "x"), call("fill again", "", "x"), x=Origin.INPUT)
    device_plan = plan_of(program, "sm sm")
    return program, with_steps(device_plan, Run("fill again", MAIN), Run("fill", MAIN))


def clobbered() -> tuple[Program, DevicePlan]:
    """Two buffers that live at the same time at one address, on one stream."""
    return BRANCHES, plan_of(BRANCHES, "sm sm sm sm", {"a": 0, "b": 0})


def loads_nothing() -> tuple[Program, DevicePlan]:
    """``a`` leaves the scratchpad without having been stored."""
    program = program_of(call("make", "x", "a"), call("read", "a", "b"), x=Origin.INPUT)
    device_plan = plan_of(program, "sm sm")
    plan = msgspec.structs.replace(
        device_plan.plan,
        instructions=(Run("make", MAIN), Load("a", MAIN), Run("read", MAIN)),
        residences=(
            Residence("a", "hbm", 0, 1, 0),
            Residence("a", "hbm", 1, 3, 0),
            Residence("b", "hbm", 2, 3, NBYTES),
        ),
    )
    return program, replace(device_plan, plan=plan)


FAULTS: list[tuple[RaceFault, Callable[[], tuple[Program, DevicePlan]]]] = [
    (RaceFault.WAITS_MALFORMED, lambda: (BRANCHES, replace(ON_TWO, waits=((),)))),
    (RaceFault.WAITS_MALFORMED, lambda: (BRANCHES, replace(ON_TWO, waits=((1,), (), (1,), ())))),
    (RaceFault.ENGINE_MISSING, without_engine),
    (RaceFault.CALL_MISSING, without_call),
    (RaceFault.CALL_UNKNOWN, unknown_call),
    (RaceFault.NO_ADDRESS, without_address),
    (RaceFault.UNORDERED_ACCESS, lambda: (BRANCHES, replace(ON_TWO, waits=((),) * 4))),
    (RaceFault.UNORDERED_EFFECTS, effects),
    (RaceFault.UNORDERED_EFFECTS, repeated_effect),
    (RaceFault.UNORDERED_REUSE, reuse),
    (RaceFault.UNORDERED_REUSE, host_reuse),
    (RaceFault.WRONG_VALUE, read_too_early),
    (RaceFault.WRONG_VALUE, lost_update),
    (RaceFault.WRONG_VALUE, clobbered),
    (RaceFault.WRONG_VALUE, loads_nothing),
]


@pytest.mark.parametrize(("fault", "make"), FAULTS)
def test_exactly_this_fault(fault: RaceFault, make: Callable[[], tuple[Program, DevicePlan]]) -> None:
    found = find_races(*make())
    assert {finding.fault for finding in found} == {fault}, "\n".join(map(str, found))
    assert all(str(finding).startswith(fault.value) for finding in found)


def test_every_fault_has_a_plan() -> None:
    assert {fault for fault, _ in FAULTS} == set(RaceFault)


@pytest.mark.parametrize("make", [effects, reuse, host_reuse])
def test_synchronisation_mends_what_is_unordered(make: Callable[[], tuple[Program, DevicePlan]]) -> None:
    program, device_plan = make()
    assert find_races(program, device_plan)
    assert find_races(program, waiting(program, device_plan)) == ()


def test_arena_reuse_across_streams_waits() -> None:
    """``b`` takes the bytes of ``a`` while another stream may still read them."""
    program = program_of(call("make", "x", "a"), call("read", "a", "c"), call("write", "x", "b"), x=Origin.INPUT)
    device_plan = plan_of(program, "sm sm1 sm", {"a": 0, "b": 0, "c": NBYTES})
    assert {f.fault for f in find_races(program, replace(device_plan, waits=((), (0,), ())))} == {
        RaceFault.UNORDERED_ACCESS
    }
    assert waiting(program, device_plan).waits == ((), (0,), (1,))


def test_copies_are_ordered_with_what_computes() -> None:
    """A store waits for the value, the load for the store, whoever takes the bytes in between for both."""
    program = program_of(
        call("make", "x", "a"),
        call("use", "x", "b"),
        call("read", "a b", "y"),
        outputs="y",
        x=Origin.INPUT,
        y=Origin.OUTPUT,
    )
    device_plan = plan_of(program, "sm sm sm sm")
    plan = msgspec.structs.replace(
        device_plan.plan,
        instructions=(
            Run("make", MAIN),
            Store("a", "device_to_host"),
            Run("use", MAIN),
            Load("a", "host_to_device"),
            Run("read", MAIN),
            Run("return", MAIN),
        ),
        residences=(
            Residence("a", "hbm", 0, 2, 0),
            Residence("b", "hbm", 2, 5, 0),
            Residence("a", "hbm", 3, 5, NBYTES),
            Residence("y", "hbm", 4, 6, 2 * NBYTES),
        ),
    )
    device_plan = waiting(program, replace(device_plan, plan=plan, arena_bytes=2 * NBYTES, apart={"y": 2 * NBYTES}))
    assert device_plan.waits == ((), (0,), (1,), (1,), (3,), ())
    assert find_races(program, device_plan) == ()
    assert {f.fault for f in every_dropped(program, device_plan)} == {RaceFault.UNORDERED_ACCESS}


def every_dropped(program: Program, device_plan: DevicePlan) -> list[RaceFinding]:
    """What is found when one wait is dropped, for each of them."""
    found: list[RaceFinding] = []
    for step, others in enumerate(device_plan.waits):
        for other in others:
            waits = list(device_plan.waits)
            waits[step] = tuple(o for o in others if o != other)
            findings = find_races(program, replace(device_plan, waits=tuple(waits)))
            assert findings, f"step {step} need not wait for {other}"
            found += findings
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("hosts", [False, True])
def test_every_wait_is_needed_and_enough(seed: int, hosts: bool) -> None:
    """Random programs on random streams, with memory used again in every way there is."""
    program = random_program(seed)
    device_plan = on_streams(program, planned(program, hosts=hosts), 3, seed)
    assert find_races(program, device_plan) == ()
    assert sum(map(len, device_plan.waits)) > 5
    every_dropped(program, device_plan)


def test_a_moved_address_is_found() -> None:
    """Addresses that overlap while both are alive are found, whatever the waits are."""
    program = random_program(3)
    device_plan = on_streams(program, planned(program), 2, 3)
    residences = list(device_plan.plan.residences or ())
    arena = [i for i, r in enumerate(residences) if r.offset is not None and r.offset < device_plan.arena_bytes]
    pairs = [
        (i, j)
        for i in arena
        for j in arena
        if i < j and residences[i].begin < residences[j].begin < residences[i].end - 1
    ]
    assert pairs
    for i, j in pairs:
        changed = list(residences)
        changed[j] = msgspec.structs.replace(changed[j], offset=changed[i].offset)
        moved = replace(device_plan, plan=msgspec.structs.replace(device_plan.plan, residences=tuple(changed)))
        assert find_races(program, waiting(program, moved))
