"""The order of least peak is that of exhaustive search, from either end, interpreted or compiled, padded or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph
from opweave.compiler.pipeline import Budget, Progress, run_pass
from opweave.compiler.plan import Plan
from opweave.errors import OptionError
from opweave.passes.inplace._overwrite import candidates
from opweave.passes.order import _peak_search
from opweave.passes.order._peak_arrays import BITS, Overwrites
from opweave.passes.order._peak_search import aligned_peak, least_peak_order
from opweave.passes.order._reach import CAPACITY_TOO_SMALL, FOUND
from opweave.passes.order.least_peak import LeastPeakOrder
from opweave.passes.order.problem import OrderProblem
from opweave.passes.residency.workset import planned_buffers
from tests.graphs.build import GraphBuilder, machine
from tests.graphs.strategies import graphs

AMPLE = partial(Budget.of_seconds, 600.0, deterministic=True)


def plan_of(graph: Graph, alignment: int = 1) -> Plan:
    return Plan.of_order(graph, machine(1 << 20, alignment))


def overwrites_of(plan: Plan) -> Overwrites:
    index = {buffer: number for number, buffer in enumerate(planned_buffers(plan))}
    return [tuple(index[b] for b in buffers if b in index) for buffers in candidates(plan.graph)]


def exhaustive(problem: OrderProblem, sizes: Sequence[int], overwrites: Overwrites) -> int:
    """Least peak by dynamic programming over every set of operators that can have run."""
    count = len(problem.predecessors)
    users = [sum(1 << op for op in ops) for ops in problem.users]

    def during(done: int, op: int) -> int:
        now = done | 1 << op
        live = sum(size for size, mask in zip(sizes, users, strict=True) if mask & now and mask & ~done)
        return live - max((sizes[b] for b in overwrites[op] if not users[b] & ~now), default=0)

    @cache
    def best(done: int) -> int:
        if done == (1 << count) - 1:
            return 0
        ready = (o for o in range(count) if not done >> o & 1 and all(done >> p & 1 for p in problem.predecessors[o]))
        return min(max(during(done, op), best(done | 1 << op)) for op in ready)

    return best(0)


def check_against_exhaustive_search(graph: Graph, alignment: int, *, in_place: bool) -> None:
    plan = plan_of(graph, alignment)
    problem = OrderProblem.of(plan)
    overwrites = overwrites_of(plan) if in_place else [()] * len(graph.ops)
    found = least_peak_order(problem, AMPLE(), overwrites=overwrites)
    assert found.peak == found.bound == exhaustive(problem, problem.footprint, overwrites)
    assert aligned_peak(problem, found.order, overwrites) == found.peak


@given(graphs(max_ops=10), st.sampled_from([1, 16, 48]), st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_is_least_of_all_orders(graph: Graph, alignment: int, in_place: bool) -> None:
    check_against_exhaustive_search(graph, alignment, in_place=in_place)


@pytest.mark.slow
@given(graphs(min_ops=6, max_ops=13), st.sampled_from([1, 16, 48]), st.booleans())
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
def test_is_least_of_all_orders_of_many_graphs(graph: Graph, alignment: int, in_place: bool) -> None:
    check_against_exhaustive_search(graph, alignment, in_place=in_place)


@given(graphs(min_ops=4, max_ops=10), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_each_end_alone_is_exact(graph: Graph, backward: bool, in_place: bool) -> None:
    """Neither end needs the other's levels: what one reduces or excludes is never hidden by the other one."""
    plan = plan_of(graph)
    problem = OrderProblem.of(plan)
    overwrites = overwrites_of(plan) if in_place else [()] * len(graph.ops)
    end = _peak_search._End(problem, overwrites, backward=backward)
    while (status := end.explore(1000, compiled=False)) == CAPACITY_TOO_SMALL:
        end.raise_to(end.next_capacity())
    assert status == FOUND
    least = exhaustive(problem, problem.footprint, overwrites)
    assert end.capacity == least
    assert aligned_peak(problem, end.order(), overwrites) == least


@given(graphs(max_ops=8), st.sampled_from([1, 16, 48]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_certificate_counts_plain_bytes(graph: Graph, alignment: int) -> None:
    """The verifier recounts the value; the bound is the least peak in plain bytes, even where padding decides."""
    plan = plan_of(graph, alignment)
    problem = OrderProblem.of(plan)
    (certificate,) = run_pass(LeastPeakOrder(), plan, AMPLE()).certificates
    assert certificate.bound == exhaustive(problem, problem.nbytes, [()] * len(graph.ops))
    assert certificate.value == certificate.bound or alignment > 1


def cells(count: int) -> Graph:
    """Cells of unequal branches over the two cells before, joined at the end; a poor order: branch levels in turn."""
    g = GraphBuilder("cells")
    before = last = g.unary("relu", g.input("x", 4, 16), "stem")
    for cell in range(count):
        ends = [before, last, last, before, last]
        for level in range(3):
            ends = [g.unary("relu", end, f"c{cell}_{level}_{i}") for i, end in enumerate(ends)]
        total = ends[0]
        for i, end in enumerate(ends[1:]):
            total = g.binary("add", total, end, f"c{cell}_t{i}")
        before, last = last, total
    return g.build(last)


def test_closes_the_gap_of_a_stack_of_cells() -> None:
    """Hundreds of operators; the given order keeps every branch of a cell live."""
    plan = plan_of(cells(12))
    (certificate,) = run_pass(LeastPeakOrder(), plan, AMPLE()).certificates
    assert certificate.value == certificate.bound
    assert certificate.value < OrderProblem.of(plan).peak_bytes(plan.order)


@given(graphs(min_ops=4, max_ops=10), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_compiled_and_interpreted_find_the_same(graph: Graph, backward: bool, in_place: bool) -> None:
    """Same levels, same order, step by step: compiling changes how long it takes and nothing else."""
    plan = plan_of(graph)
    overwrites = overwrites_of(plan) if in_place else [()] * len(graph.ops)
    steps: list[list[tuple[int, int, int]]] = []
    orders = []
    for compiled in (False, True):
        end = _peak_search._End(OrderProblem.of(plan), overwrites, backward=backward)
        steps.append([])
        while not steps[-1] or steps[-1][-1][0] != FOUND:
            status = end.explore(3, compiled=compiled)
            steps[-1].append((status, end.capacity, end.expanded))
            if status == CAPACITY_TOO_SMALL:
                end.raise_to(end.next_capacity())
        orders.append(end.order())
    assert steps[0] == steps[1]
    assert orders[0] == orders[1]


def ladder(chains: int, length: int) -> Graph:
    """Chains of unequal sizes side by side, listed level by level: a down-set's operators are far apart."""
    g = GraphBuilder("ladder")
    x = g.input("x", 4, 4)
    ends = [g.matmul(x, g.weight(f"w{i}", 4, 4 * (1 + i % 3)), f"m{i}") for i in range(chains)]
    for level in range(length):
        ends = [g.unary("relu", end, f"c{i}_{level}") for i, end in enumerate(ends)]
    for i, end in enumerate(ends):
        ends[i] = g.matmul(end, g.weight(f"v{i}", 4 * (1 + i % 3), 1), f"n{i}")
    g.op(f"aten.cat.default([{', '.join(f'%{i}' for i in range(chains))}], 1)", *ends, outputs={"y": (4, chains)})
    return g.build("y")


@pytest.mark.parametrize("graph", [cells(12), ladder(8, 20)], ids=["cells", "ladder"])
def test_windows_widen_as_they_must(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of operators, of which a window holds 63 at first: the same peak as with room for all of them."""
    problem = OrderProblem.of(plan_of(graph))
    assert len(graph.ops) > 2 * BITS
    found = []
    for window in (1, len(graph.ops)):
        monkeypatch.setattr(_peak_search, "WINDOW", window)
        found.append(least_peak_order(problem, AMPLE()))
    assert found[0].peak == found[0].bound == found[1].peak == found[1].bound


@given(graphs(min_ops=4, max_ops=10), st.integers(1, 6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_little_effort_leaves_a_sound_bound(graph: Graph, effort: int) -> None:
    problem = OrderProblem.of(plan_of(graph))
    given_order = tuple(range(len(graph.ops)))
    found = least_peak_order(problem, AMPLE(), effort=effort)
    assert found.bound <= exhaustive(problem, problem.footprint, [()] * len(graph.ops)) <= found.peak
    assert found.peak <= aligned_peak(problem, given_order)


def test_full_memory_leaves_a_sound_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a handful of down-sets neither end can finish; probes still look for better orders."""
    plan = plan_of(cells(3))
    problem = OrderProblem.of(plan)
    least = least_peak_order(problem, AMPLE()).peak
    monkeypatch.setattr(_peak_search, "MEMORY_BYTES", 2_000)
    found = least_peak_order(problem, AMPLE(), effort=20_000)
    assert found.bound <= least <= found.peak <= problem.peak_bytes(plan.order)


def test_stop_returns_the_given_order() -> None:
    plan = plan_of(cells(3))
    budget = AMPLE()
    budget.stop.set()
    assert LeastPeakOrder().apply(plan, budget).plan.order == plan.order


def test_tells_bounds_that_rise_and_peaks_that_fall() -> None:
    heard: list[Progress] = []
    run_pass(LeastPeakOrder(), plan_of(cells(3)), AMPLE(listen=heard.append))
    bounds = [progress.bound for progress in heard if progress.bound is not None]
    peaks = [progress.incumbent for progress in heard if progress.incumbent is not None]
    assert len(heard) > 1
    assert bounds == sorted(bounds)
    assert peaks == sorted(peaks, reverse=True)
    assert bounds[-1] == peaks[-1]


def test_graph_without_operators() -> None:
    plan = Plan.of_order(Graph("nothing", (), (), ()), machine())
    (certificate,) = run_pass(LeastPeakOrder(), plan, AMPLE()).certificates
    assert msgspec.structs.asdict(certificate) | {"value": 0, "bound": 0} == msgspec.structs.asdict(certificate)


def test_effort_out_of_range() -> None:
    with pytest.raises(OptionError, match="effort"):
        LeastPeakOrder(effort=0)
