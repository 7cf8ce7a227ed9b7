"""Programs whose tensors stay on the host, executed within memory limits: the bytes of eager, whatever is streamed."""

from __future__ import annotations

import dataclasses
import gc
from functools import cache

import pytest
import torch

from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Load, Recompute, Store
from opweave.compiler.runtime.device import host
from opweave.compiler.runtime.device.executor import Executor
from opweave.compiler.runtime.device.graph import planning_graph
from opweave.compiler.runtime.device.host import (
    HostExecutor,
    HostMemory,
    on_host,
    residents,
    with_resident,
)
from opweave.compiler.runtime.device.offload import fetched, sent
from opweave.compiler.runtime.device.program import Origin, Program
from opweave.compiler.verify.races import find_races
from opweave.passes.offload.planner import LimitedPlan, least_limit, plan_within
from tests.compiler.frontend.dynamo.poisoned import PoisonedPool
from tests.support.small_programs import CPU, ProgramBuilder, device_machine, evaluated, layered

WIDTHS = (32, 64, 48, 96, 32, 64)
MACHINE = device_machine()
LIMITS = 5


@cache
def host_program() -> tuple[Program, list[int]]:
    program, weights = layered(WIDTHS)
    return on_host(program), weights


@cache
def planned(limit: int, seconds: float = 5.0) -> LimitedPlan:
    program, weights = host_program()
    candidates = residents(program, weights)
    return plan_within(
        planning_graph(program),
        program.apart,
        MACHINE,
        limit,
        Budget.of_seconds(seconds, deterministic=True, workers=1),
        candidates=candidates,
    )


@cache
def limits() -> list[int]:
    """``LIMITS`` of them, from all weights down to the least."""
    program, _ = host_program()
    least = least_limit(planning_graph(program), program.apart, MACHINE)
    most = planned(1 << 28).occupied_bytes + 64
    return [most, (most * 3 + least) // 4, (most + least) // 2, least + 8192, least]


def tensors(seed: int) -> list[torch.Tensor]:
    program, _ = host_program()
    draw = torch.Generator().manual_seed(seed)
    shapes = [program.views[item.name].shape for item in program.inputs]  # type: ignore[union-attr]
    return [torch.randn(shape, generator=draw) for shape in shapes]


def executor(limited: LimitedPlan, memory: HostMemory, room_bytes: int | None = None) -> HostExecutor:
    program, weights = host_program()
    return HostExecutor(
        program,
        limited.device_plan,
        limited.resident,
        weights=weights,
        memory=memory,
        kernels={},
        pool=PoisonedPool(),
        room_bytes=room_bytes,
    )


@pytest.mark.parametrize("position", range(LIMITS))
def test_every_limit_gives_the_bytes_of_eager(position: int) -> None:
    """In a poisoned arena of exactly the planned bytes, twice, and what the program updates is updated on the host."""
    limited = planned(limits()[position])
    assert limited.occupied_bytes <= limits()[position]
    run = executor(limited, HostMemory(CPU))
    program, _ = host_program()
    ours, theirs = tensors(0), tensors(0)
    for _ in range(2):
        got, expected = run(list(ours)), evaluated(program, theirs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert run.memory.copied_bytes <= limited.resident_bytes


@pytest.mark.parametrize("position", range(LIMITS))
def test_transfers_race_with_nothing(position: int) -> None:
    """Copy engines run beside compute: with the waits that follow from the plan, every access is ordered."""
    program, _ = host_program()
    limited = planned(limits()[position])
    assert any(limited.device_plan.waits)
    assert not find_races(with_resident(program, limited.resident), limited.device_plan)


def test_less_memory_streams_more() -> None:
    """With room for everything only what is no weight is loaded; with the least, nothing stays."""
    most, least = planned(limits()[0]), planned(limits()[-1])
    program, weights = host_program()
    assert most.resident == residents(program, weights)
    assert sum(isinstance(i, Load) for i in most.device_plan.plan.instructions) == 2  # x and the total
    assert not least.resident
    assert least.loaded_bytes > most.loaded_bytes


def test_the_plan_is_of_the_program_that_runs() -> None:
    """Taking residents out of the graph gives the graph of the program that has them on the device."""
    program, _ = host_program()
    for limit in limits():
        limited = planned(limit)
        assert planning_graph(with_resident(program, limited.resident)) == limited.device_plan.plan.graph


def test_changed_weights_are_copied_again() -> None:
    """An update in place and another tensor in its place both reach the device; old copies are dropped."""
    program, _ = host_program()
    memory = HostMemory(CPU)
    run = executor(planned(limits()[0]), memory)
    inputs = tensors(1)
    run(list(inputs))
    kept = memory.copied_bytes
    inputs[1].mul_(2)
    assert torch.equal(run(list(inputs))[0], evaluated(program, [t.clone() for t in inputs])[0])
    inputs[2] = inputs[2] + 1
    assert torch.equal(run(list(inputs))[0], evaluated(program, [t.clone() for t in inputs])[0])
    assert memory.copied_bytes == kept


def test_weights_of_inference_mode_are_copied_each_time() -> None:
    """They have no count of changes, so that nothing tells whether a copy is still right."""
    program, _ = host_program()
    run = executor(planned(limits()[0]), HostMemory(CPU))
    with torch.inference_mode():
        inputs = [tensor.clone() for tensor in tensors(2)]
        run(list(inputs))
        inputs[1].mul_(2)
        assert torch.equal(run(list(inputs))[0], evaluated(program, [t.clone() for t in inputs])[0])


def test_copies_of_other_programs_make_room() -> None:
    """Two programs share a limit: before one runs, copies that only the other needs go where both are too much."""
    memory = HostMemory(CPU)
    limited = planned(limits()[1])
    run = executor(limited, memory, limited.resident_bytes)
    run(tensors(3))
    run_other = executor(limited, memory, limited.resident_bytes)
    run_other(tensors(4))
    assert memory.copied_bytes <= limited.resident_bytes


def test_copies_are_forgotten_on_demand() -> None:
    """What changes behind PyTorch's back is seen after ``forget``."""
    run = executor(planned(limits()[0]), HostMemory(CPU))
    inputs = tensors(5)
    before = run(list(inputs))[0]
    inputs[1].data.mul_(2)
    assert torch.equal(run(list(inputs))[0], before)
    run.memory.forget()
    assert not torch.equal(run(list(inputs))[0], before)


class Driver:
    """CUDA's runtime as far as pinning goes; refuses storages of ``refused`` bytes."""

    def __init__(self, refused: int = -1) -> None:
        self.refused = refused
        self.pinned: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 # CUDA's name
        assert flags == 0
        if nbytes == self.refused:
            return 1
        self.pinned.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802 # CUDA's name
        self.pinned.remove(address)


def test_each_storage_is_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one storage are pinned together, where it lies, until nobody needs it."""
    driver = Driver()
    monkeypatch.setattr(host, "_cudart", lambda: driver)
    memory = HostMemory(torch.device("cuda"))
    tensor = torch.zeros(8, 8)
    for view in (tensor, tensor[2:], tensor, torch.empty(0)):
        memory.pin(view)
    assert driver.pinned == [tensor.untyped_storage().data_ptr()]
    del memory
    gc.collect()
    assert not driver.pinned


def test_refused_pinning_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the error left for whoever asks the driver next."""
    forgotten: list[torch.device] = []
    monkeypatch.setattr(host, "_cudart", lambda: Driver(refused=256))
    monkeypatch.setattr(host, "_forget_error", forgotten.append)
    memory = HostMemory(torch.device("cuda"))
    tensor = torch.zeros(8, 8)
    with pytest.warns(UserWarning, match=r"cannot be pinned \(CUDA error 1\)"):
        memory.pin(tensor)
    memory.pin(tensor)
    assert forgotten == [memory.device]


def wide(rows: int = 256) -> Program:
    """Three large results, read in reverse: more than a small device holds."""
    builder = ProgramBuilder()
    x = builder.input("x", rows, 16)
    kept = []
    for layer in range(4):
        weight = builder.input(f"w{layer}", 16, 16)
        x = builder.out("aten.mm.out", x, weight, out=builder.tensor(f"p{layer}", rows, 16))
        kept.append(x)
    for layer, other in enumerate(reversed(kept)):
        x = builder.out("aten.mul.out", x, other, out=builder.tensor(f"m{layer}", rows, 16))
    builder.returns(x)
    return builder.program()


@pytest.mark.parametrize(("bandwidth", "instruction"), [(1e13, Store), (1e8, Recompute)])
def test_activations_leave_or_are_computed_again(bandwidth: float, instruction: type) -> None:
    """A model on the device beyond the limit: a fast link offloads, a slow one recomputes; both as eager."""
    program = wide()
    machine = device_machine(bandwidth, latency_s=1e-8)
    graph, apart = planning_graph(program), program.apart
    least = least_limit(graph, apart, machine)
    limited = plan_within(graph, apart, machine, least, Budget.of_seconds(10, deterministic=True, workers=1))
    assert any(isinstance(i, instruction) for i in limited.device_plan.plan.instructions)
    inputs = [torch.randn(p.shape) for p in (program.views[i.name] for i in program.inputs)]  # type: ignore
    run = Executor(program, limited.device_plan, device=CPU, kernels={}, pool=PoisonedPool())
    for _ in range(2):
        assert torch.equal(run(list(inputs))[0], evaluated(program, inputs)[0])


def test_calls_with_effects_run_once() -> None:
    """What draws numbers, allocates, or writes what the caller keeps is not repeatable; the rest is."""
    builder = ProgramBuilder()
    x = builder.input("x", 4, 4)
    builder.out("aten.tanh.out", x, out=builder.tensor("a", 4, 4))
    builder.out("aten.randn.out", [4, 4], out=builder.tensor("b", 4, 4), effect=True)
    builder.make("aten.neg.default", "c", x, shape=(4, 4))
    state = builder.input("state", 4, 4)
    builder.update("aten.add_.Tensor", state, x)
    builder.out("aten.tanh.out", state, out=builder.tensor("d", 4, 4))
    graph = planning_graph(builder.program())
    assert [op.repeatable for op in graph.ops] == [True, False, False, False, False]


def test_what_a_forward_pass_offloads() -> None:
    """A saved result goes to the host, and the backward pass loads it; one that is an output, too, stays as well."""
    builder = ProgramBuilder()
    x = builder.input("x", 8, 8)
    saved = builder.out("aten.tanh.out", x, out=builder.tensor("saved", 8, 8))
    result = builder.out("aten.exp.out", saved, out=builder.tensor("result", 8, 8))
    builder.returns(result, saved, builder.view("again", result, 64))
    forward = sent(builder.program(), (1, 2))
    assert forward.storages["saved"].origin is Origin.RETURNED
    assert forward.storages["result"].origin is Origin.OUTPUT
    limited = plan_within(planning_graph(forward), forward.apart, MACHINE, 1 << 20, Budget.of_seconds(2))
    value = torch.randn(8, 8)
    got = Executor(forward, limited.device_plan, device=CPU, kernels={})([value])
    expected = evaluated(builder.program(), [value])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    backward = ProgramBuilder()
    given = backward.input("saved", 8, 8)
    backward.returns(backward.out("aten.neg.out", given, out=backward.tensor("gradient", 8, 8)))
    program = fetched(backward.program(), ("saved",))
    limited = plan_within(planning_graph(program), program.apart, MACHINE, 1 << 20, Budget.of_seconds(2))
    assert next(type(i) for i in limited.device_plan.plan.instructions) is Load
    assert torch.equal(Executor(program, limited.device_plan, device=CPU, kernels={})([got[1]])[0], -got[1])


def test_storages_without_bytes() -> None:
    """They have no residence, and are there nevertheless: as operands and as outputs, on either side."""
    builder = ProgramBuilder()
    x = builder.input("x", 0, 4)
    y = builder.out("aten.tanh.out", x, out=builder.tensor("y", 0, 4))
    z = builder.out("aten.exp.out", y, out=builder.tensor("z", 0, 4))
    builder.returns(z)
    for program in (builder.program(), on_host(builder.program())):
        limited = plan_within(planning_graph(program), program.apart, MACHINE, 1 << 20, Budget.of_seconds(2))
        run = Executor(program, limited.device_plan, device=CPU, kernels={})
        assert run([torch.empty(0, 4)])[0].shape == (0, 4)


def test_inputs_that_are_outputs() -> None:
    """An output that is (a view of) an input in host memory is the caller's own tensor."""
    builder = ProgramBuilder()
    x = builder.input("x", 4, 4)
    builder.returns(builder.view("row", x, 4, offset=4), builder.out("aten.tanh.out", x, out=builder.tensor("y", 4, 4)))
    program = on_host(builder.program())
    limited = plan_within(planning_graph(program), program.apart, MACHINE, 1 << 20, Budget.of_seconds(2))
    value = torch.randn(4, 4)
    row, _ = Executor(program, limited.device_plan, device=CPU, kernels={})([value])
    assert row.data_ptr() == value[1].data_ptr()
    assert torch.equal(row, value[1])


def test_an_unused_input_stays_where_it_is() -> None:
    """It is no part of the graph, and is not loaded."""
    program, weights = host_program()
    unused = dataclasses.replace(program, calls=program.calls[:0], outputs=())
    assert not planning_graph(unused).tensors
    assert residents(unused, weights)
