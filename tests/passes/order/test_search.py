"""The compiled walk equals its plain twin, and the search yields what it says."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from benchmarks.networks import layered
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.passes.order.problem import OrderProblem
from opweave.passes.order.search import Found, search_orders
from opweave.passes.order.track import Arrays, Track
from opweave.passes.order.walk import FURTHEST, IMPOSSIBLE, LEAST_COST, place, walk
from tests.graphs.build import machine
from tests.passes.order.brute_force import least_traffic, problems, random_graph


def deterministic(**fields: object) -> Budget:
    return Budget.of_seconds(60, deterministic=True, **fields)


def tracked(problem: OrderProblem, order: list[int], rule: int) -> tuple[Arrays, Track, int]:
    """A recorded track of ``order``, every operator a block."""
    arrays = Arrays.of(problem, [(op,) for op in range(len(order))])
    track = Track.of(arrays, max(1, len(problem.nbytes)))
    track.sequence[:] = order
    place(arrays, track, 0, len(order))
    return arrays, track, walk(arrays, track, 0, len(order), rule, True)


def legal_order(problem: OrderProblem, seed: int) -> list[int]:
    draw, order = random.Random(seed), list[int]()
    while len(order) < len(problem.touches):
        ready = [op for op, before in enumerate(problem.predecessors) if op not in order and set(before) <= set(order)]
        order.append(draw.choice(ready))
    return order


@given(st.integers(0, 1 << 40), st.integers(1, 30), st.sampled_from((1, 4)))
@settings(max_examples=60, deadline=None)
@example(1, 2, 1)  # an operator that touches every buffer there is, two of them resident
@example(7778, 20, 1)  # several victims are cheaper than one only without what the last of them makes superfluous
def test_walk_equals_its_twin(seed: int, operators: int, alignment: int) -> None:
    """Compiled and plain eviction move the same bytes under both rules."""
    for problem in problems(random_graph(seed, operators), alignment):
        order = legal_order(problem, seed)
        costs = [tracked(problem, order, rule)[2] for rule in (FURTHEST, LEAST_COST)]
        assert min(costs) == problem.spill_bytes(order)


@given(st.integers(0, 1 << 40), st.integers(20, 80))
@settings(max_examples=60, deadline=None)
def test_walk_after_a_change_equals_a_fresh_one(seed: int, operators: int) -> None:
    """From step 0 to where the state is the remembered one again, the rest being taken over."""
    for problem in problems(random_graph(seed, operators)):
        before, after = legal_order(problem, seed), legal_order(problem, seed)
        swappable = [i for i in range(len(after) - 1) if after[i] not in problem.predecessors[after[i + 1]]]
        for rule in (FURTHEST, LEAST_COST):
            arrays, track, _ = tracked(problem, before, rule)
            for i in swappable[:5]:
                changed = [*before[:i], before[i + 1], before[i], *before[i + 2 :]]
                track.sequence[:] = changed
                place(arrays, track, 0, len(changed))
                fresh = tracked(problem, changed, rule)[2]
                assert walk(arrays, track, 0, i + 2, rule, False) == fresh


def test_a_track_that_is_too_small_says_so() -> None:
    (problem, *_) = problems(random_graph(7, 12))
    arrays = Arrays.of(problem, [(op,) for op in range(12)])
    track = Track.of(arrays, 1)
    track.sequence[:] = np.arange(12)
    place(arrays, track, 0, 12)
    assert walk(arrays, track, 0, 12, FURTHEST, True) == IMPOSSIBLE


@given(st.integers(0, 1 << 40), st.integers(3, 7))
@settings(max_examples=25, deadline=None)
def test_found_orders_are_legal_and_improve(seed: int, operators: int) -> None:
    """Each costs what eviction says or more, and none less than the least of all orders."""
    for problem in problems(random_graph(seed, operators)):
        found = list(search_orders(problem, deterministic(), patience=1))
        assert [f.spill for f in found] == sorted({f.spill for f in found}, reverse=True)
        for one in found:
            done: set[int] = set()
            for op in one.order:
                assert set(problem.predecessors[op]) <= done
                done.add(op)
            assert len(done) == operators
            assert problem.spill_bytes(one.order) <= one.spill
        assert found[-1].spill >= least_traffic(problem, [(op,) for op in range(operators)])


def lattice(width: int, height: int) -> OrderProblem:
    """Operators that each read two neighbours of the row before; room for half a row."""
    tensors = [Tensor("x", (8,), "int8", Role.INPUT)]
    ops: list[Op] = []
    row = ["x"]
    for level in range(height):
        fresh = [f"t{level}_{i}" for i in range(width)]
        tensors += [Tensor(name, (8 + 3 * (i % 3),), "int8") for i, name in enumerate(fresh)]
        for i, name in enumerate(fresh):
            ops.append(Op(f"o{level}_{i}", tuple(dict.fromkeys((row[i % len(row)], row[(i + 1) % len(row)]))), (name,)))
        row = fresh
    return OrderProblem.of(Plan.of_order(Graph("lattice", tuple(tensors), tuple(ops), tuple(row)), machine(44, 1)))


def test_search_improves_and_repeats() -> None:
    """Level by level most of a row spills; diagonally less does. Same seed, same orders."""
    problem = lattice(8, 6)
    runs = [list(search_orders(problem, deterministic(seed=3), patience=2)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][-1].spill < problem.spill_bytes(range(48))


def test_search_on_a_layered_network() -> None:
    """Two thirds of what a network of several hundred operators spills need not be; the work limit ends the search."""
    graph = layered(400, 6, 0)
    assert len(graph.ops) == 400
    assert graph == layered(400, 6, 0)
    problem = OrderProblem.of(Plan.of_order(graph, machine(1, 1)))
    found = list(search_orders(problem, deterministic(), most_moves=20_000))
    assert found[-1].spill < problem.spill_bytes(range(400)) / 3


def test_search_begins_with_the_best_seed_order() -> None:
    problem = lattice(8, 6)
    best: Found = list(search_orders(problem, deterministic(), patience=2))[-1]
    first = next(search_orders(problem, deterministic(), seed_orders=[best.order], blocks=[(op,) for op in range(48)]))
    assert first.spill <= best.spill


def test_search_ends_at_its_target() -> None:
    problem = lattice(8, 6)
    spill = problem.spill_bytes(range(48))
    found = list(search_orders(problem, deterministic(), target=spill - 1))
    assert found[-1].spill < spill
    assert all(f.spill >= spill for f in found[:-1])


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_search_ends_when_the_budget_does(seconds: float) -> None:
    """With hardly any time it may find nothing, and does not fail."""
    found = list(search_orders(lattice(8, 6), Budget.of_seconds(seconds)))
    assert all(f.spill >= 0 for f in found)


def test_search_ends_when_told_to() -> None:
    """Deterministic searches look at no clock, but do stop."""
    stop = threading.Event()
    found = search_orders(lattice(12, 12), deterministic(stop=stop), patience=1 << 40)
    next(found)
    stop.set()
    assert len(list(found)) <= 2


def test_search_makes_room_for_many_resident_buffers() -> None:
    """More buffers are resident at once than a track begins with."""
    names = [f"t{i}" for i in range(100)]
    tensors = (Tensor("x", (4,), "int8", Role.INPUT), Tensor("y", (4,), "int8"))
    ops = (*(Op(f"o{n}", ("x",), (n,)) for n in names), Op("sum", tuple(names), ("y",)))
    graph = Graph("many", (*tensors, *(Tensor(n, (4,), "int8") for n in names)), ops, ("y",))
    found = list(search_orders(OrderProblem.of(Plan.of_order(graph, machine(404, 1))), deterministic()))
    assert found[-1].spill == 0
