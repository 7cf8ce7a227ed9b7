"""Orders improved around their peak: legal, never worse, and the best there is where one window holds all operators."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from opweave.compiler.graph import Graph, Op, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.hw_models.registry import load
from opweave.passes.device.ordering import framed
from opweave.passes.device.windows import improved, live_bytes_of
from opweave.passes.order.problem import OrderProblem
from tests.passes.device.device_graphs import DeviceGraph, device_graphs, least_peak_of_all, peak_of


def budget() -> Budget:
    return Budget.of_seconds(30, deterministic=True)


def problem_of(graph: Graph) -> OrderProblem:
    return framed(OrderProblem.of(Plan.of_order(graph, load("h100-sxm"))), graph)


def wide(operators: int, seed: int) -> Graph:
    """Each operator reads one to three of the twenty before it: much freedom, and more than one window."""
    draw = random.Random(seed)
    tensors = tuple(Tensor(f"t{i}", (512 * draw.randint(1, 20),), "uint8") for i in range(operators))
    ops = []
    for i in range(operators):
        read = {f"t{draw.randrange(max(0, i - 20), i)}" for _ in range(draw.randint(1, 3))} if i else set()
        ops.append(Op(f"o{i}", tuple(sorted(read)), (f"t{i}",)))
    return Graph("wide", tensors, tuple(ops), ())


def check_legal(problem: OrderProblem, order: tuple[int, ...]) -> None:
    place = {op: position for position, op in enumerate(order)}
    assert sorted(order) == list(range(len(problem.predecessors)))
    assert all(place[p] < place[op] for op, before in enumerate(problem.predecessors) for p in before)


@settings(max_examples=50, deadline=None)
@given(device_graphs(max_ops=5))
def test_one_window_over_everything_finds_the_least_peak(case: DeviceGraph) -> None:
    problem = problem_of(case.graph)
    order = improved(problem, range(len(case.graph.ops)), 0, budget())
    check_legal(problem, order)
    assert peak_of(case.graph, order) == least_peak_of_all(case.graph)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_windows_lower_the_peak_and_break_nothing(seed: int) -> None:
    graph = wide(120, seed)
    problem = problem_of(graph)
    program = tuple(range(120))
    order = improved(problem, program, 0, budget())
    check_legal(problem, order)
    assert peak_of(graph, order) == max(live_bytes_of(problem, order))
    assert peak_of(graph, order) < peak_of(graph, program)


def test_an_order_that_reaches_the_bound_or_has_no_time_is_kept() -> None:
    problem = problem_of(wide(60, 0))
    program = tuple(range(60))
    assert improved(problem, program, max(live_bytes_of(problem, program)), budget()) == program
    stopped = budget()
    stopped.stop.set()
    assert improved(problem, program, 0, stopped) == program
