"""Queues for operators of programs and small graphs: right, within memory, never slower, better than a baseline."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch

from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Plan
from opweave.compiler.runtime.device.arena import ArenaPool
from opweave.compiler.runtime.device.executor import Executor
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.program import Call, Origin, Program, Ref, Storage, View
from opweave.compiler.verify import verify
from opweave.compiler.verify.races import find_races
from opweave.errors import OptionError
from opweave.hw_models.model import Concurrency, EngineKind
from opweave.hw_models.registry import load
from opweave.passes.streams.assignment import critical_heirs, round_robin
from opweave.passes.streams.critical_path import CriticalPath, StreamDecision
from opweave.passes.streams.fluid import run
from opweave.passes.streams.tasks import Task
from tests.graphs.build import all_graphs
from tests.graphs.plans import keep_everything, keep_nothing
from tests.support.streamed import (
    example_inputs,
    made_by_calls,
    planned,
    random_linear_extension,
    random_program,
    reordered,
)

GRAPHS = all_graphs()
H100 = load("h100-sxm")
BUDGET_S = 20.0
EXTRA_BYTES = 1 << 30  # more than any program here needs


def branches(count: int, length: int, elements: int, made: bool = False) -> Program:
    """``count`` chains of ``length`` calls over one input, and a call that joins them into an output."""
    origins = {"x": Origin.INPUT, "y": Origin.OUTPUT}
    calls: list[Call] = []
    ends: list[str] = []
    for branch in range(count):
        last = "x"
        for position in range(length):
            name = f"b{branch}_{position}"
            calls.append(Call(f"call_{name}", "aten.add.out", (), {}, (last,), (name,)))
            origins[name] = Origin.CALL if made else Origin.PLANNED
            last = name
        ends.append(last)
    calls.append(Call("join", "aten.cat.out", (), {}, tuple(ends), ("y",)))
    cpu = torch.device("cpu")
    storages = {n: Storage(n, 4 * elements, torch.float32, cpu, origin) for n, origin in origins.items()}
    views = {n: View(n, n, (elements,), (1,), 0, torch.float32) for n in origins}
    return Program("branches", (Ref("x"),), (Ref("y"),), storages, views, tuple(calls), {})


def assigned(program: Program, *, extra_bytes: int = 0, **options: float) -> tuple[DevicePlan, StreamDecision]:
    device_plan = planned(program)
    step = CriticalPath(**{"margin": 0.0, **options})  # type: ignore[arg-type]
    budget = Budget.of_seconds(BUDGET_S, deterministic=True)
    return device_plan, step.assign(device_plan, made_by_calls(program), budget, extra_bytes=extra_bytes)


def check(program: Program, decision: StreamDecision) -> None:
    assert find_races(program, decision.device_plan) == ()
    assert verify(decision.device_plan.plan).faults == ()
    assert decision.bound_s <= decision.after_s * (1 + 1e-9)
    assert decision.after_s <= decision.before_s
    last = max(i.finish_s or 0.0 for i in decision.device_plan.plan.instructions)
    assert last == pytest.approx(decision.after_s)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("extra_bytes", [0, EXTRA_BYTES])
def test_random_programs_stay_right(seed: int, extra_bytes: int) -> None:
    program = random_program(seed)
    given, decision = assigned(program, extra_bytes=extra_bytes)
    check(program, decision)
    assert decision.device_plan.arena_bytes <= given.arena_bytes or extra_bytes


@pytest.mark.parametrize("seed", range(6))
def test_what_is_decided_computes_the_same(seed: int) -> None:
    """Through the host code, on the CPU: other addresses, another order, and any order that the waits admit."""
    program = random_program(seed, calls=40)
    given, decision = assigned(program, extra_bytes=EXTRA_BYTES)
    expected = results(program, given)
    assert all(map(torch.equal, results(program, decision.device_plan), expected))
    draw = random.Random(seed)
    for _ in range(3):
        order = random_linear_extension(decision.device_plan.plan, decision.device_plan.waits, draw)
        assert all(map(torch.equal, results(program, reordered(decision.device_plan, order)), expected))


def results(program: Program, device_plan: DevicePlan) -> list[torch.Tensor]:
    """Outputs and updated inputs."""
    inputs = example_inputs(program, 0)
    executor = Executor(program, device_plan, device=torch.device("cpu"), pool=ArenaPool())
    return [*executor(list(inputs)), *inputs]


def test_small_branches_run_at_the_same_time() -> None:
    """Four chains of small calls on four streams take little more than one of them, which is the bound."""
    program = branches(4, 6, 1024)
    _, decision = assigned(program, extra_bytes=EXTRA_BYTES)
    check(program, decision)
    assert decision.streams == 4
    assert decision.after_s < 0.4 * decision.before_s
    assert "4 of 4 queues" in decision.note


def test_large_branches_do_not() -> None:
    """Calls that fill the machine gain their launches at most, less than the margin."""
    program = branches(4, 3, 1 << 26)
    given, decision = assigned(program, extra_bytes=EXTRA_BYTES << 10, margin=0.03)
    check(program, decision)
    assert decision.streams == 1
    assert decision.after_s == decision.before_s
    assert {i.engine for i in decision.device_plan.plan.instructions} == {"sm"}
    assert decision.device_plan.plan.residences == given.plan.residences
    assert not any(decision.device_plan.waits)


def test_a_chain_stays_on_one_stream() -> None:
    decision = assigned(branches(1, 8, 1024), extra_bytes=EXTRA_BYTES)[1]
    assert decision.streams == 1


def test_bytes_that_may_be_added_buy_time() -> None:
    """In the least arena branches follow one another, as they share its bytes; with more, they need not."""
    program = branches(4, 6, 1024)
    tight, roomy = (assigned(program, extra_bytes=extra)[1] for extra in (0, EXTRA_BYTES))
    check(program, tight)
    assert tight.device_plan.arena_bytes < roomy.device_plan.arena_bytes
    assert roomy.after_s < tight.after_s


def test_what_calls_make_comes_from_pools_that_do_not_mix() -> None:
    """Memory that one stream's pool has got back is lost to the others: without extra bytes that keeps to one pool."""
    program = branches(2, 4, 1024, made=True)
    made = made_by_calls(program)
    for extra_bytes, pools in ((0, 1), (EXTRA_BYTES, 2)):
        _, decision = assigned(program, extra_bytes=extra_bytes)
        check(program, decision)
        steps = decision.device_plan.plan.instructions
        first = {r.buffer: r.begin for r in decision.device_plan.plan.residences or ()}
        assert len({steps[first[name]].engine for name in made}) == pools


def test_better_than_what_knows_no_costs() -> None:
    """Beside a long chain of small calls there is a short one of large ones: the critical path is not the longest."""
    small, large = Task(5e-6, 1e-6, 0.01), Task(5e-6, 40e-6, 0.5)
    tasks = [small, *[small] * 6, *[large] * 3, *[large] * 3]
    before: list[tuple[int, ...]] = [(), (0,), *((step,) for step in range(1, 6)), (0,), (7,), (8,), (0,), (10,), (11,)]
    concurrency = Concurrency(streams=4, issue_s=1e-6, event_s=1e-6, saturating_elements=1)
    seconds = []
    for rule in (critical_heirs, round_robin):
        queues = rule(tasks, before, frozenset(), 3, concurrency)
        times = run(tasks, [str(queue) for queue in queues], before, concurrency)
        seconds.append(max(finish for _, finish in times))
    assert seconds[0] < 0.95 * seconds[1]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("make", [keep_everything, keep_nothing])
def test_plans_with_copies_verify(name: str, make: Callable[..., Plan]) -> None:
    """As a pass: loads and stores on copy engines, the same traffic, the same plan each time."""
    plan = make(GRAPHS[name], H100)
    step = CriticalPath(streams=3, margin=0.0)
    first, again = (run_pass(step, plan, Budget.of_seconds(BUDGET_S, deterministic=True)) for _ in range(2))
    assert timeless(first) == timeless(again)
    assert verify(first).total_bytes == verify(plan).total_bytes


def timeless(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, passes=tuple(msgspec.structs.replace(r, seconds=0.0) for r in plan.passes))


def test_a_pass_needs_addresses() -> None:
    with pytest.raises(OptionError, match="no addresses yet"):
        CriticalPath().apply(Plan.of_order(GRAPHS["fan_out"], H100), Budget.of_seconds(1))


def test_machines_without_concurrency_keep_one_engine() -> None:
    """Copies still run beside what computes, and wait for it."""
    program = random_program(1)
    device_plan = planned(program)
    machine = msgspec.structs.replace(device_plan.plan.machine, concurrency=None)
    device_plan = replace(device_plan, plan=msgspec.structs.replace(device_plan.plan, machine=machine))
    decision = CriticalPath().assign(device_plan, made_by_calls(program), Budget.of_seconds(1))
    assert decision.streams == 1
    assert len(decision.device_plan.plan.machine.engines_of(EngineKind.COMPUTE)) == 1
    check(program, decision)


def test_little_effort_goes_a_long_way() -> None:
    """The first assignments tried are the most promising ones, and trying ends at the same place each time."""
    program = branches(4, 6, 1024)
    given = planned(program)
    budget = Budget.of_seconds(BUDGET_S)
    few, many = (
        CriticalPath(effort=effort).assign(given, frozenset(), budget, extra_bytes=EXTRA_BYTES)
        for effort in (200, 60_000)
    )
    check(program, few)
    assert many.after_s <= few.after_s < 0.6 * few.before_s


def test_out_of_time_is_one_queue() -> None:
    program = branches(4, 6, 1024)
    decision = CriticalPath().assign(planned(program), frozenset(), Budget.of_seconds(0.0))
    assert decision.streams == 1
    check(program, decision)


@pytest.mark.parametrize("options", [{"streams": -1}, {"margin": 1.0}, {"margin": -0.1}, {"effort": 0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="streams/critical_path: options are"):
        CriticalPath(**options)  # type: ignore[arg-type]
