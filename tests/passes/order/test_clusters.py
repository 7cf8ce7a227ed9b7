"""Clusters lose nothing: brute force over all orders and residencies, with blocks kept together and without."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.plan import Plan
from opweave.passes.order.clusters import clusters
from opweave.passes.order.problem import OrderProblem
from tests.graphs.build import all_graphs, machine
from tests.graphs.strategies import graphs
from tests.passes.order.brute_force import least_traffic, problems, random_graph


def check(graph: Graph, alignment: int = 1) -> None:
    for problem in problems(graph, alignment):
        blocks = clusters(problem)
        assert sorted(op for block in blocks for op in block) == list(range(len(problem.touches)))
        singles = [(op,) for op in range(len(problem.touches))]
        if len(blocks) < len(singles):
            assert least_traffic(problem, blocks) == least_traffic(problem, singles)


@given(st.integers(0, 1 << 40), st.integers(3, 7), st.sampled_from((1, 4)))
@settings(max_examples=60, deadline=None)
def test_clusters_keep_an_optimal_order(seed: int, operators: int, alignment: int) -> None:
    """Least traffic over all orders is met by orders that run every cluster back to back."""
    check(random_graph(seed, operators), alignment)


@pytest.mark.slow
@given(st.integers(0, 1 << 40), st.integers(4, 8), st.sampled_from((1, 4)))
@settings(max_examples=4000, deadline=None)
def test_clusters_keep_an_optimal_order_thousands(seed: int, operators: int, alignment: int) -> None:
    check(random_graph(seed, operators), alignment)


@given(graphs(max_ops=7))
@settings(max_examples=30, deadline=None)
def test_clusters_keep_an_optimal_order_of_executable_graphs(graph: Graph) -> None:
    """Graphs with views, joins, splits and in-place updates of part of a buffer."""
    check(graph, 16)


def test_a_shrinking_chain_is_one_cluster() -> None:
    """What each operator leaves takes the place of what it read; a branch before it does not."""
    tensors = (Tensor("x", (9,), "int8", Role.INPUT), *(Tensor(f"t{n}", (n,), "int8") for n in (8, 7, 6, 5)))
    names = ("x", "t8", "t7", "t6", "t5")
    ops = tuple(Op(f"o{k}", (a,), (b,)) for k, (a, b) in enumerate(pairwise(names)))
    plan = Plan.of_order(Graph("chain", tensors, ops, ("t5",)), machine(100, 1))
    assert clusters(OrderProblem.of(plan)) == ((0, 1, 2, 3),)


def test_what_grows_before_it_shrinks_is_held_back() -> None:
    """The large result between two small ones is made right before it is read."""
    sizes = {"x": 2, "small": 2, "large": 8, "end": 1}
    roles = {"x": Role.INPUT}
    tensors = tuple(Tensor(n, (s,), "int8", roles.get(n, Role.ACTIVATION)) for n, s in sizes.items())
    ops = (Op("a", ("x",), ("small",)), Op("b", ("small",), ("large",)), Op("c", ("large",), ("end",)))
    plan = Plan.of_order(Graph("bulge", tensors, ops, ("end",)), machine(100, 1))
    assert (1, 2) in {block[-2:] for block in clusters(OrderProblem.of(plan))}


def test_blocks_are_in_a_legal_order() -> None:
    """Running block after block meets every dependency."""
    for graph in all_graphs().values():
        problem = OrderProblem.of(Plan.of_order(graph, machine()))
        done: set[int] = set()
        for op in (op for block in clusters(problem) for op in block):
            assert set(problem.predecessors[op]) <= done
            done.add(op)
