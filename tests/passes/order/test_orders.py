"""Orders are legal on any graph, certificates hold over all orders, estimates are honest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings

from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget, Progress, run_pass
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.passes.order.beam import BeamOrder
from opweave.passes.order.breadth_first import BreadthFirstOrder
from opweave.passes.order.depth_first import DepthFirstOrder
from opweave.passes.order.given import GivenOrder
from opweave.passes.order.greedy import GreedyOrder
from opweave.passes.order.problem import OrderProblem
from opweave.passes.residency.ilp import IlpResidency
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.strategies import graphs

ORDERS = (GivenOrder(), DepthFirstOrder(), BreadthFirstOrder(), GreedyOrder(), BeamOrder(width=16, patience=20))


def tight(graph: Graph, alignment: int = 16) -> Plan:
    """The graph on the least scratchpad its largest working set fits into."""
    least = OrderProblem.of(Plan.of_order(graph, machine(1, alignment))).capacity
    return Plan.of_order(graph, machine(max(least, 1), alignment))


def topological_orders(problem: OrderProblem, done: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every legal order."""
    if len(done) == len(problem.predecessors):
        yield done
    for op, before in enumerate(problem.predecessors):
        if op not in done and set(before) <= set(done):
            yield from topological_orders(problem, (*done, op))


@given(graphs(max_ops=10))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_order_is_legal(graph: Graph) -> None:
    """The pipeline verifies the order, and recounts the peak each pass certifies."""
    plan = tight(graph)
    for order in ORDERS:
        result = run_pass(order, plan, Budget.of_seconds(10, deterministic=True))
        assert verify(result).faults == ()


@given(graphs(max_ops=6))
@settings(max_examples=40, deadline=None)
def test_bound_holds_for_every_order(graph: Graph) -> None:
    """No legal order has a lower peak than the bound in the certificate."""
    plan = tight(graph)
    problem = OrderProblem.of(plan)
    certificate = GivenOrder().apply(plan, Budget.of_seconds(1)).certificate
    assert certificate is not None
    for order in islice(topological_orders(problem), 200):
        assert certificate.bound <= problem.peak_bytes(order)


@given(graphs(max_ops=8))
@settings(max_examples=40, deadline=None)
def test_estimate_is_reachable(graph: Graph) -> None:
    """The spill estimate comes from evictions that are possible: the optimum is never above it, zero means zero."""
    plan = tight(graph)
    estimate = OrderProblem.of(plan).spill_bytes(plan.order)
    result = run_pass(IlpResidency(), plan, Budget.of_seconds(10, deterministic=True))
    (certificate,) = result.certificates
    assert certificate.value <= estimate


@given(graphs(max_ops=9))
@settings(max_examples=40, deadline=None)
def test_beam_is_never_worse_than_given(graph: Graph) -> None:
    plan = tight(graph)
    problem = OrderProblem.of(plan)
    found = BeamOrder(width=4, patience=10).apply(plan, Budget.of_seconds(10)).plan
    assert problem.spill_bytes(found.order) <= problem.spill_bytes(plan.order)


@given(graphs(max_ops=6))
@settings(max_examples=30, deadline=None)
def test_beam_with_room_finds_least_peak(graph: Graph) -> None:
    """A beam wider than the number of down-sets, on a machine where any excess shows, meets the best estimate."""
    plan = tight(graph)
    problem = OrderProblem.of(plan)
    found = BeamOrder(width=256, patience=100).apply(plan, Budget.of_seconds(10, deterministic=True)).plan
    if any(problem.peak_bytes(order) <= problem.capacity for order in topological_orders(problem)):
        assert problem.spill_bytes(found.order) == 0


def branches(count: int, length: int) -> Graph:
    """Long branches from one input that meet at the end, written level by level: far from the best order."""
    g = GraphBuilder("branches")
    x = g.input("x", 4, 16)
    names = [x] * count
    for level in range(length):
        names = [g.unary("relu", name, f"b{i}_{level}") for i, name in enumerate(names)]
    total = names[0]
    for i, name in enumerate(names[1:]):
        total = g.binary("add", total, name, f"t{i}")
    return g.build(total)


def test_beam_improves_a_bad_order() -> None:
    """Level by level six branches are live; branch by branch, three buffers suffice with the running total."""
    plan = tight(branches(6, 4))
    problem = OrderProblem.of(plan)
    assert problem.spill_bytes(plan.order) > 0
    found = BeamOrder().apply(plan, Budget.of_seconds(20, deterministic=True))
    assert problem.spill_bytes(found.plan.order) < problem.spill_bytes(plan.order) / 2
    assert "estimated" in found.note


def test_beam_on_more_operators_repeats() -> None:
    """Annealing takes over above 64 operators: better than beams of width 1 alone, and the same every time."""
    plan = tight(branches(14, 6))
    problem = OrderProblem.of(plan)
    runs = [BeamOrder().apply(plan, Budget.of_seconds(60, deterministic=True)).plan.order for _ in range(2)]
    assert runs[0] == runs[1]
    beams = BeamOrder(width=1, patience=0).apply(plan, Budget.of_seconds(60, deterministic=True)).plan.order
    assert problem.spill_bytes(runs[0]) <= problem.spill_bytes(beams) < problem.spill_bytes(plan.order)


def test_beam_on_operators_too_many_for_bitmasks() -> None:
    """List scheduling gives the first order, annealing the last; the time that is left is kept to."""
    plan = tight(branches(80, 60))
    problem = OrderProblem.of(plan)
    BeamOrder().apply(plan, Budget.of_seconds(1))  # compiles what is compiled once for a machine
    found = BeamOrder().apply(plan, Budget.of_seconds(4)).plan  # enough on a busy machine, too
    assert problem.spill_bytes(found.order) < problem.spill_bytes(plan.order) / 2


def test_depth_first_and_greedy_finish_branches() -> None:
    """Both run a branch to its end before they begin another; breadth-first keeps all of them live."""
    plan = tight(branches(6, 4))
    peak = {order.name: verify(order.apply(plan, Budget.of_seconds(1)).plan).peak_bytes for order in ORDERS}
    assert peak["order/depth_first"] < peak["order/breadth_first"]
    assert peak["order/greedy"] < peak["order/breadth_first"]


def test_orders_survive_deep_graphs() -> None:
    """A chain far deeper than Python's recursion limit."""
    g = GraphBuilder("deep")
    y = g.input("x", 1, 1)
    for i in range(3000):
        y = g.unary("relu", y, f"y{i}")
    plan = tight(g.build(y))
    result = run_pass(DepthFirstOrder(), plan, Budget.of_seconds(5))
    assert result.order == tuple(range(3000))


def test_streamed_weights_do_not_count() -> None:
    """A streamed weight occupies nothing; of ``chain`` the largest working set is then that of the activation ops."""
    graph = all_graphs()["chain"]
    size = {name: base.nbytes for name, base in graph.buffers.items()}
    resident = OrderProblem.of(Plan.of_order(graph, machine()))
    assert resident.largest_working_set() == size["x"] + size["w"] + size["a"]
    streamed = OrderProblem.of(Plan.of_order(graph, machine(), streamed=["w", "v"]))
    assert streamed.largest_working_set() == size["a"] + size["b"]


def test_footprint_is_aligned() -> None:
    """Capacity is compared with padded sizes, traffic counts plain ones."""
    g = GraphBuilder("odd")
    graph = g.build(g.unary("relu", g.input("x", 3), "y"))
    problem = OrderProblem.of(Plan.of_order(graph, machine(64, 16)))
    assert problem.nbytes == (12, 12)
    assert problem.footprint == (16, 16)


def test_beam_reports_progress() -> None:
    """The listener hears estimates that only fall."""
    heard: list[Progress] = []
    BeamOrder().apply(tight(branches(6, 4)), Budget.of_seconds(20, deterministic=True, listen=heard.append))
    incumbents = [progress.incumbent for progress in heard if progress.incumbent is not None]
    assert len(incumbents) > 1
    assert incumbents == sorted(incumbents, reverse=True)
    assert {progress.pass_name for progress in heard} == {"order/beam"}


@pytest.mark.parametrize("options", [{"width": 0}, {"patience": -1}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        BeamOrder(**options)
