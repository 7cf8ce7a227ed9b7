"""Host code for several streams, run on a driver that finds what may race: the events between steps are the right ones.

What `find_races` proves of a plan, this proves of the statements that are written for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from opweave.compiler.pipeline import Budget
from opweave.compiler.runtime.device.code import HostCode, write_host_code
from opweave.compiler.runtime.device.graph import planning_graph
from opweave.compiler.runtime.device.host import on_host, residents, with_resident
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.order import synchronisation
from opweave.compiler.runtime.device.program import Origin, Program, Ref
from opweave.compiler.runtime.device.streams import Streams
from opweave.passes.offload.planner import least_limit, plan_within
from tests.support.queues import Driver, queues
from tests.support.small_programs import device_machine, evaluated, layered
from tests.support.streamed import example_inputs, on_streams, planned, random_program

CUDA = torch.device("cuda", 0)


def on_device(program: Program) -> Program:
    """The program as if its storages lay on a GPU."""
    return replace(program, storages={n: replace(s, device=CUDA) for n, s in program.storages.items()})


def written(program: Program, device_plan: DevicePlan, driver: Driver, **more: Any) -> HostCode:
    """Its host code, with memory from the driver's pools."""
    code = write_host_code(on_device(program), device_plan, {})
    names: Mapping[str, Any] = {**code.names, "empty_cuda": driver.empty, **more}
    return replace(code, names=names)


def received(program: Program, seed: int, driver: Driver) -> list[torch.Tensor]:
    """Inputs; those that are handed over come from a pool that nobody knows."""
    inputs = example_inputs(program, seed)
    for position, item in enumerate(program.inputs):
        assert isinstance(item, Ref)
        if program.storages[item.name].origin is Origin.GIVEN:
            given = inputs[position]
            inputs[position] = driver.empty(tuple(given.shape), given.stride(), given.dtype, known=False).copy_(given)
    return inputs


def outputs_of(program: Program, device_plan: DevicePlan, seed: int) -> tuple[torch.Tensor, ...]:
    """What it returns without streams."""
    call = write_host_code(program, device_plan, {}).bind(torch.zeros(device_plan.arena_bytes, dtype=torch.uint8))
    return call(list(example_inputs(program, seed)))


def run_twice(program: Program, device_plan: DevicePlan, **more: Any) -> Driver:
    """Two calls, one behind the other, in one arena; what they return is checked."""
    expected = outputs_of(program, device_plan, 0)
    arena = torch.zeros(device_plan.arena_bytes, dtype=torch.uint8)
    with queues() as (driver, launches):
        call = written(program, device_plan, driver, **more).bind(arena)
        caller = driver.current
        for _ in range(2):
            inputs = received(program, 0, driver)
            with launches():
                outputs = call(inputs)
            assert driver.current is caller
            for output, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, wanted, rtol=0, atol=0)
        with launches():  # the caller, on its own stream, may do with outputs what it likes
            for output in outputs:
                output.add_(1)
        return driver


@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_races_between_streams(seed: int, hosts: bool) -> None:
    program = random_program(seed)
    device_plan = on_streams(program, planned(program, hosts=hosts), 3, seed)
    driver = run_twice(program, device_plan)
    assert len(driver.streams) == len({i.engine for i in device_plan.plan.instructions} | {"sm"})
    assert driver.launches >= 2 * len(program.calls)
    assert driver.races == []


@pytest.mark.parametrize("part", ["fork", "join", "main", "waits"])
def test_the_driver_finds_what_is_left_out(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the parts some program races: each is needed, and the driver sees what it is for."""
    if part == "fork":
        monkeypatch.setattr(Streams, "fork", lambda streams: ["caller = current_stream()"] if streams.sides else [])
    if part == "join":
        monkeypatch.setattr(Streams, "join", lambda streams: streams.main())
    if part == "main":
        monkeypatch.setattr(Streams, "main", lambda streams: [])
    races = []
    for seed in range(12):
        program = random_program(seed)
        device_plan = on_streams(program, planned(program), 3, seed)
        if part == "waits":
            device_plan = replace(device_plan, waits=((),) * len(device_plan.waits))
        races += run_twice(program, device_plan).races
    assert races


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_transfers_race_with_nothing(part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads and stores go to queues of their own, from the most that they have to do to the least."""
    program, weights = layered((32, 64, 48, 96, 32, 64))
    hosted, machine = on_host(program), device_machine()
    graph, apart = planning_graph(hosted), hosted.apart
    least, most = least_limit(graph, apart, machine), sum(int(s.nbytes) for s in hosted.storages.values())
    limit, candidates = round(least + part * (most - least)), residents(hosted, weights)
    budget = Budget.of_seconds(5, deterministic=True, workers=1)
    limited = plan_within(graph, apart, machine, limit, budget, candidates=candidates)
    device_plan = limited.device_plan
    waits = synchronisation(device_plan, frozenset(n for n, s in hosted.storages.items() if s.origin is Origin.CALL))
    device_plan = replace(device_plan, waits=waits)
    resident = with_resident(hosted, limited.resident)
    empty: Callable[..., torch.Tensor] = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *args, pin_memory, **more: empty(*args, **more))
    with queues() as (driver, launches):
        code = written(resident, device_plan, driver)
        assert code.has_events
        arena, spill = torch.zeros(device_plan.arena_bytes, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
        call = code.bind(arena, spill)
        ours = [torch.rand(resident.views[item.name].shape) for item in resident.inputs if isinstance(item, Ref)]
        theirs = [tensor.clone() for tensor in ours]
        for _ in range(2):
            with launches():
                outputs = call(list(ours))
            for output, wanted in zip(outputs, evaluated(program, theirs), strict=True):
                torch.testing.assert_close(output, wanted, rtol=0, atol=0)
    assert driver.races == []
    assert len(driver.streams) > 1


def test_one_engine_needs_no_stream() -> None:
    program = random_program(0)
    code = write_host_code(on_device(program), planned(program), {})
    assert not code.has_events
    assert "stream" not in code.source
