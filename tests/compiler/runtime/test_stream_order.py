"""Steps of several streams in any order that their waits admit compute the same, on the CPU, through the host code."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.runtime.device.arena import ArenaPool
from opweave.compiler.runtime.device.conflicts import Access, predecessors
from opweave.compiler.runtime.device.executor import Executor
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.order import recorded, reduced, synchronisation
from opweave.compiler.runtime.device.program import Program
from opweave.errors import PlanError
from tests.support.streamed import (
    example_inputs,
    on_streams,
    planned,
    random_linear_extension,
    random_program,
    reordered,
)


def results(program: Program, device_plan: DevicePlan) -> list[torch.Tensor]:
    """Outputs, and the inputs as the program leaves them, which it updates."""
    inputs = example_inputs(program, 0)
    executor = Executor(program, device_plan, device=torch.device("cpu"), pool=ArenaPool())
    return [*executor(list(inputs)), *inputs]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_every_admitted_order_computes_the_same(seed: int) -> None:
    """Outputs and updated inputs, to the last bit."""
    program = random_program(seed)
    device_plan = planned(program)
    expected = results(program, device_plan)
    assigned = on_streams(program, device_plan, 3, seed)
    orders = {random_linear_extension(assigned.plan, assigned.waits, random.Random(draw)) for draw in range(4)}
    assert len(orders) > 1
    for order in orders:
        assert sorted(order) == list(range(len(device_plan.plan.instructions)))
        assert same(results(program, reordered(assigned, order)), expected)


def test_without_waits_some_order_computes_something_else() -> None:
    """The orders drawn have teeth: what the waits prevent does happen without them."""
    wrong = 0
    for seed in range(8):
        program = random_program(seed)
        device_plan = planned(program)
        assigned = replace(on_streams(program, device_plan, 3, seed), waits=())
        order = random_linear_extension(assigned.plan, assigned.waits, random.Random(seed))
        try:
            wrong += not same(results(program, reordered(assigned, order)), results(program, device_plan))
        except (NameError, KeyError):
            wrong += 1  # read before anything was allocated for it
    assert wrong >= 4


def test_one_engine_waits_for_nothing() -> None:
    device_plan = planned(random_program(0))
    assert recorded(synchronisation(device_plan)) == frozenset()


def test_a_step_without_engine_is_refused() -> None:
    program = random_program(0)
    assigned = on_streams(program, planned(program), 2, 0)
    steps = (msgspec.structs.replace(assigned.plan.instructions[0], engine=""), *assigned.plan.instructions[1:])
    with pytest.raises(PlanError, match="step 0 names no engine"):
        synchronisation(replace(assigned, plan=msgspec.structs.replace(assigned.plan, instructions=steps)))


def test_a_buffer_without_address_is_refused() -> None:
    program = random_program(0)
    assigned = on_streams(program, planned(program), 2, 0)
    with pytest.raises(PlanError, match="has no address at step"):
        synchronisation(replace(assigned, plan=msgspec.structs.replace(assigned.plan, residences=())))


def conflicting(first: tuple[Access, ...], second: tuple[Access, ...]) -> bool:
    return any(
        a.space == b.space and a.begin < b.end and b.begin < a.end and (a.writes or b.writes)
        for a, b in itertools.product(first, second)
    )


def closure(before: list[set[int]]) -> list[set[int]]:
    """All steps that must be done before each one."""
    whole: list[set[int]] = []
    for others in before:
        whole.append(others | {far for other in others for far in whole[other]})
    return whole


ACCESSES = st.builds(
    lambda space, begin, size, writes: Access(space, begin, begin + size, writes),
    st.sampled_from(["hbm", "home"]),
    st.integers(0, 12),
    st.integers(1, 6),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(st.lists(ACCESSES, max_size=3).map(tuple), max_size=12))
def test_predecessors_order_every_conflict_and_nothing_else(touched: list[tuple[Access, ...]]) -> None:
    """Against the definition: all pairs of steps that conflict, closed under transitivity."""
    found = [set(steps) for steps in predecessors(touched)]
    every = [{o for o in range(step) if conflicting(touched[o], touched[step])} for step in range(len(touched))]
    assert closure(found) == closure(every)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 20))), max_size=16))
def test_reduced_waits_order_the_same_and_none_can_go(steps: list[tuple[int, set[int]]]) -> None:
    engines = [f"e{engine}" for engine, _ in steps]
    needed = [{other for other in others if other < step} for step, (_, others) in enumerate(steps)]
    previous = [max((o for o in range(s) if engines[o] == engines[s]), default=None) for s in range(len(steps))]
    queued = [set() if other is None else {other} for other in previous]
    waits = reduced(engines, needed)
    whole = closure([q | n for q, n in zip(queued, needed, strict=True)])
    assert closure([q | set(w) for q, w in zip(queued, waits, strict=True)]) == whole
    for step, others in enumerate(waits):
        for other in others:
            fewer = [set(w) - ({other} if s == step else set()) for s, w in enumerate(waits)]
            assert closure([q | w for q, w in zip(queued, fewer, strict=True)]) != whole
