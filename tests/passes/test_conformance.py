"""Every registered pass over every small graph: verified, deterministic, never worse than its baseline, in time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import msgspec
import pytest

from opweave.compiler.graph import Graph, Role
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Plan
from opweave.compiler.simulate import latency_ns
from opweave.compiler.verify import verify
from opweave.passes.address.placement import PlacementError
from opweave.passes.order.problem import OrderProblem
from opweave.passes.registry import make, names
from tests.graphs.build import all_graphs, machine

GRAPHS = all_graphs()
# Traversals: what others are compared with, at times worse than the order given.
TRAVERSALS = {"order/depth_first", "order/breadth_first", "order/greedy"}
SECONDS = 20.0
PASSES = {name: make(name) for name in names()}


def capacities(graph: Graph) -> Iterator[int]:
    """The least scratchpad every operator alone fits into, and one with half as much again."""
    plan = Plan.of_order(graph, machine(1))
    least = OrderProblem.of(plan).capacity
    yield from (least, least * 3 // 2 // 16 * 16)


@cache
def inputs(graph_name: str, decision: str) -> tuple[Plan, ...]:
    """Plans a pass of ``decision`` starts from: weights resident and streamed, scratchpads tight and roomy."""
    graph = GRAPHS[graph_name]
    weights = [name for name, base in graph.buffers.items() if base.role is Role.WEIGHT]
    plans = []
    for streamed in ((), weights) if weights else ((),):
        for capacity in capacities(graph):
            plan = Plan.of_order(graph, machine(max(capacity, 16)), streamed=streamed)
            plans += _inputs(plan, decision)
    return tuple(plans)


def _inputs(plan: Plan, decision: str) -> list[Plan]:
    """``plan`` with what must be decided before: for latencies with and without offsets."""
    if decision not in ("address", "latency"):
        return [plan]
    resident = run_pass(PASSES["residency/least_cost"], plan, Budget.of_seconds(SECONDS))
    if decision == "address":
        return [resident]
    placed = decided("address/exact", resident, Budget.of_seconds(SECONDS))
    return [resident] if placed is None else [resident, placed]


def decided(name: str, plan: Plan, budget: Budget) -> Plan | None:
    """What the pass decides; ``None`` if it placed nothing, as address passes may (their errors are tested below)."""
    try:
        return run_pass(PASSES[name], plan, budget)
    except PlacementError as error:
        failure = error
    assert name.startswith("address/")
    assert failure.conflict
    assert failure.available_bytes == plan.machine.scratchpad_memory.capacity_bytes
    assert failure.required_bytes > failure.available_bytes
    return None


def timeless(plan: Plan | None) -> bytes:
    """A plan's JSON without the seconds its passes took."""
    if plan is None:
        return b""
    records = tuple(msgspec.structs.replace(record, seconds=0.0) for record in plan.passes)
    return msgspec.structs.replace(plan, passes=records).to_json()


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", PASSES)
def test_plans_verify_and_repeat(name: str, graph: str) -> None:
    """The verifier finds nothing, and the same input gives the same bytes in deterministic mode."""
    for plan in inputs(graph, name.partition("/")[0]):
        first = decided(name, plan, Budget.of_seconds(SECONDS, deterministic=True))
        again = decided(name, plan, Budget.of_seconds(SECONDS, deterministic=True))
        assert timeless(first) == timeless(again)
        if first is not None:
            assert verify(first).faults == ()
            assert_not_worse(name, plan, first)


def assert_not_worse(name: str, before: Plan, after: Plan) -> None:
    """Compare with the decision's baseline: the given order, nothing kept, no byte used twice."""
    match name.partition("/")[0]:
        case "order" if name not in TRAVERSALS:
            problem = OrderProblem.of(before)
            assert problem.spill_bytes(after.order) <= problem.spill_bytes(before.order)
        case "residency" | "joint":
            baseline = run_pass(PASSES["residency/refetch"], before, Budget.of_seconds(SECONDS))
            assert verify(after).additional_bytes <= verify(baseline).additional_bytes
        case "latency":
            assert latency_ns(after) <= latency_ns(before)
            assert verify(after).additional_bytes == verify(before).additional_bytes
        case "address":
            alignment = after.machine.scratchpad_memory.alignment_bytes
            sizes = (after.graph.buffers[r.buffer].nbytes for r in after.residences or ())
            assert verify(after).arena_bytes <= sum(-(-size // alignment) * alignment for size in sizes)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("seconds", [0.05, 0.0])
def test_short_of_time(name: str, graph: str, seconds: float) -> None:
    """A pass never fails because time ran out; only placements may stay unfound, and then say so."""
    for plan in inputs(graph, name.partition("/")[0]):
        result = decided(name, plan, Budget.of_seconds(seconds, workers=1))
        assert result is None or verify(result).faults == ()


@pytest.mark.parametrize("name", PASSES)
def test_told_to_stop(name: str) -> None:
    """A stop that came before the pass began still leaves a valid plan."""
    for plan in inputs("fan_out", name.partition("/")[0]):
        budget = Budget.of_seconds(SECONDS)
        budget.stop.set()
        result = decided(name, plan, budget)
        assert result is None or verify(result).faults == ()


@pytest.mark.parametrize("name", PASSES)
def test_name_is_path(name: str) -> None:
    """A pass calls itself what it was asked for as."""
    assert PASSES[name].name == name
