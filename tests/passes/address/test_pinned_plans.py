"""Whole plans with banks and pins: planned, verified, and refused where nothing can be placed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.pins import pins_of
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Load, Pin, Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.hw_models.model import HardwareModel
from opweave.passes.planner import Planner
from opweave.passes.residency.belady import BeladyResidency
from opweave.passes.residency.gaps import GapProblem, gaps_of_residences
from opweave.passes.residency.ilp import IlpResidency
from opweave.passes.residency.refetch import RefetchResidency
from opweave.passes.residency.workset import least_capacity, planned_buffers
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, all_graphs, machine, random_sources
from tests.graphs.strategies import graphs

GRAPHS = all_graphs()


def budget() -> Budget:
    return Budget.of_seconds(60, deterministic=True)


def two_banks(capacity: int) -> HardwareModel:
    """Banks of about equal size that hold ``capacity`` bytes in sum."""
    half = max(16, -(-capacity // 32) * 16)
    return machine(1, 16).with_banks(half, half)


@given(graphs(max_ops=6), st.data())
@settings(max_examples=40, deadline=None)
def test_plans_keep_to_banks_and_pins(graph: Graph, data: st.DataObject) -> None:
    """Where each bank holds two working sets, buffers pinned to a byte, to a bank and as resident always find room.

    The executor knows of neither, and computes what eager computes.
    """
    least = least_capacity(Plan.of_order(graph, machine()))
    plan = Plan.of_order(graph, two_banks(4 * least))
    names = sorted(planned_buffers(plan))
    chosen = data.draw(st.permutations(names))[:3]
    kinds: tuple[dict[str, Any], ...] = ({"offset": 0}, {"bank": 1}, {"resident": True})
    pins = tuple(Pin(name, **kind) for name, kind in zip(chosen, kinds, strict=False))
    planned = Planner(order="order/given").plan(msgspec.structs.replace(plan, pins=pins), budget())
    assert planned.pins == pins
    assert verify(planned).faults == ()
    sources = random_sources(graph)
    assert same(run(planned, sources), graph, sources)


def skip() -> Graph:
    """``x`` is used first and last; in between runs a chain that fills the memory."""
    g = GraphBuilder("skip")
    x = g.input("x", 16)
    a = g.unary("relu", x, "a")
    g.op("aten.cat.default([%0, %0])", a, outputs={"b": (32,)})
    g.op("aten.slice.Tensor(%0, 0, 0, 16)", "b", outputs={"c": (16,)})
    return g.build(g.binary("add", "c", x, "y"))


@pytest.mark.parametrize("residency", [IlpResidency(), BeladyResidency(), RefetchResidency()], ids=lambda r: r.name)
def test_a_resident_pin_is_kept(residency: IlpResidency | BeladyResidency | RefetchResidency) -> None:
    """What would be dropped stays, with one load, when it is pinned; without room the operator is named."""
    graph = skip()
    free = Plan.of_order(graph, machine(256, 16))
    dropped = run_pass(RefetchResidency(), free, budget())
    assert sum(i == Load("x") for i in dropped.instructions) == 2
    pinned = msgspec.structs.replace(free, pins=(Pin("x", resident=True),))
    kept = run_pass(residency, pinned, budget())
    assert sum(i == Load("x") for i in kept.instructions) == 1
    tight = msgspec.structs.replace(pinned, machine=machine(192, 16))
    with pytest.raises(Infeasible, match=r"operator 'op1' .* \('x' 64\) need 256 bytes, but memory 'sram' has 192"):
        residency.apply(tight, budget())


def test_gaps_that_a_pin_keeps_are_no_cut() -> None:
    """A cut names only what can be dropped instead."""
    plan = run_pass(BeladyResidency(), Plan.of_order(skip(), machine(256, 16)), budget())
    index = [r.buffer for r in plan.residences or ()].index("x")
    assert gaps_of_residences(plan, [index]).gaps
    pinned = msgspec.structs.replace(plan, pins=(Pin("x", resident=True),))
    assert not gaps_of_residences(pinned, [index]).gaps
    assert {i.gap.buffer for i in GapProblem.of(pinned).intervals} == {"a", "b", "c"}


def test_a_working_set_that_no_bank_holds() -> None:
    """Three buffers of 64 bytes in two banks of 112: the sum fits, and the message says why it does not help."""
    g = GraphBuilder("join")
    graph = g.build(g.binary("add", g.input("x", 16), g.input("y", 16), "z"))
    plan = Plan.of_order(graph, machine(1, 16).with_banks(112, 112))
    with pytest.raises(Infeasible) as caught:
        Planner().plan(plan, budget())
    message = caught.value.message
    assert "operator 'op0' has no place in memory 'sram', which has banks of 112 and 112 bytes" in message
    assert "'x' (64 bytes)" in message
    assert (caught.value.required_bytes, caught.value.available_bytes) == (192, 224)
    assert "one bank of 192 bytes" in caught.value.hint
    enough = msgspec.structs.replace(plan, machine=machine(1, 16).with_banks(128, 96))
    assert verify(Planner().plan(enough, budget())).ok


def test_operands_pinned_to_the_same_bytes() -> None:
    graph = skip()
    plan = Plan.of_order(graph, machine(1024, 16))
    pins = pins_of({"x": {"offset": 64}, "a": {"offset": 96}}, plan)
    with pytest.raises(Infeasible, match=r"'a' \(64 bytes, pinned to byte 96\)") as caught:
        Planner().plan(msgspec.structs.replace(plan, pins=pins), budget())
    assert "pins may be in their way" in caught.value.hint
    apart = pins_of({"x": {"offset": 64}, "a": {"offset": 128}}, plan)
    planned = Planner().plan(msgspec.structs.replace(plan, pins=apart), budget())
    assert {r.buffer: r.offset for r in planned.residences or ()}.items() >= {("x", 64), ("a", 128)}


def test_buffers_of_different_times_may_be_pinned_to_the_same_bytes() -> None:
    """``a`` and ``c`` never live together."""
    plan = Plan.of_order(skip(), machine(1024, 16))
    pins = pins_of({"a": {"offset": 0}, "c": {"offset": 0}}, plan)
    planned = Planner(residency="residency/refetch").plan(msgspec.structs.replace(plan, pins=pins), budget())
    assert verify(planned).ok


def test_the_order_is_decided_with_the_pins_kept() -> None:
    plan = replace(Planner(), order="order/beam").plan(
        Plan.of_order(GRAPHS["diamond"], machine(), pins=(Pin("x", offset=32),)), budget()
    )
    assert plan.pins == (Pin("x", offset=32),)
    assert {r.offset for r in plan.residences or () if r.buffer == "x"} == {32}
