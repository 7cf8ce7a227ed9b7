"""A rewritten graph is taken for its original only if it computes the same."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Tensor
from opweave.compiler.rewritten import computes_same
from opweave.errors import ModelError
from tests.compiler.runtime.eager import eager
from tests.graphs.build import GraphBuilder, all_graphs, random_sources
from tests.graphs.strategies import graphs


def moved(graph: Graph, **buffers: str) -> Graph:
    """``graph`` with buffers, by name, at the places of others; everything in them goes along."""
    tensors = (msgspec.structs.replace(t, buffer=buffers.get(t.buffer, t.buffer)) for t in graph.tensors)
    return Graph(graph.name, tuple(tensors), graph.ops, graph.outputs)


def listed(graph: Graph, *order: int) -> Graph:
    return Graph(graph.name, graph.tensors, tuple(graph.ops[i] for i in order), graph.outputs)


def fork() -> Graph:
    """``a`` has two readers, ``b`` (op1) and ``c`` (op2)."""
    g = GraphBuilder("fork")
    a = g.unary("relu", g.input("x", 4, 4), "a")
    b = g.unary("tanh", a, "b")
    c = g.unary("sigmoid", a, "c")
    return g.build(g.binary("add", b, c, "d"))


@pytest.mark.parametrize("name", all_graphs())
def test_a_graph_computes_what_it_computes(name: str) -> None:
    graph = all_graphs()[name]
    assert computes_same(graph, Graph(graph.name, graph.tensors, graph.ops, graph.outputs))


def test_the_last_reader_may_write_over_what_it_reads() -> None:
    """The second reader may, the first only where it is listed second."""
    graph = fork()
    assert computes_same(moved(graph, c="a"), graph)
    assert not computes_same(moved(graph, b="a"), graph)
    assert computes_same(moved(listed(graph, 0, 2, 1, 3), b="a"), graph)
    assert computes_same(moved(graph, c="a", d="a"), graph)
    assert computes_same(moved(graph, d="b"), graph)


def test_sources_and_outputs_stay_as_they_are() -> None:
    g = GraphBuilder("ends")
    a = g.unary("relu", g.input("x", 4, 4), "a")
    graph = g.build(a, g.unary("tanh", a, "b"))
    assert not computes_same(moved(graph, a="x"), graph)
    assert not computes_same(moved(graph, b="a"), graph)


def test_two_results_of_one_operator_need_two_places() -> None:
    g = GraphBuilder("halves")
    a = g.unary("relu", g.input("x", 8, 4), "a")
    g.op("aten.split_with_sizes.default(%0, [4, 4], 0)", a, outputs={"p": (4, 4), "q": (4, 4)})
    graph = g.build(g.binary("add", "p", "q", "y"))
    assert computes_same(moved(graph, p="a"), graph)
    assert not computes_same(moved(graph, p="a", q="a"), graph)


def test_updates_keep_their_turn() -> None:
    """Two updates of one buffer in the other order leave another value, though each reader of it comes last."""
    g = GraphBuilder("turns")
    a = g.unary("relu", g.input("x", 4, 4), "a")
    once = g.update("add", a, "x", "once")
    graph = g.build(g.update("mul", once, "x", "twice"))
    turned = tuple(msgspec.structs.replace(op, inputs=("a", "x")) for op in graph.ops[2:])
    assert not computes_same(msgspec.structs.replace(graph, ops=(*graph.ops[:1], *turned, graph.ops[1])), graph)


@pytest.mark.parametrize("change", ["operator", "tensor", "output", "missing"])
def test_another_model_is_another_model(change: str) -> None:
    graph = fork()
    ops: tuple[Op, ...] = graph.ops
    tensors: tuple[Tensor, ...] = graph.tensors
    outputs = graph.outputs
    match change:
        case "operator":
            ops = (*ops[:-1], msgspec.structs.replace(ops[-1], body="aten.mul.Tensor(%0, %1)"))
        case "tensor":
            tensors = (*tensors[:-1], msgspec.structs.replace(tensors[-1], shape=(16,)))
        case "output":
            outputs = ("c",)
        case "missing":
            ops, tensors, outputs = ops[:-1], tensors[:-1], ("b", "c")
    assert not computes_same(Graph(graph.name, tensors, ops, outputs), graph)
    assert not computes_same(graph, Graph(graph.name, tensors, ops, outputs))


@given(graphs(min_ops=2, max_ops=8), st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_passes_computes_the_same_numbers(graph: Graph, data: st.DataObject) -> None:
    """Results put anywhere, operators in any legal order: what is accepted gives the original's outputs, bit for bit.

    About a tenth of these graphs are accepted.
    """
    place: dict[str, str] = {}
    for _ in range(data.draw(st.integers(1, 2))):
        result = data.draw(st.sampled_from([name for op in graph.ops for name in op.outputs]))
        size = graph.tensor[result].nbytes
        others = [name for name, base in graph.buffers.items() if base.nbytes >= size and name not in (result, *place)]
        if result in graph.buffers and result not in place.values() and others:
            place[result] = data.draw(st.sampled_from(others))
    urgency = data.draw(st.permutations(range(len(graph.ops))))
    order: list[int] = []
    while len(order) < len(graph.ops):
        ready = (i for i, before in enumerate(graph.predecessors) if i not in order and set(before) <= set(order))
        order.append(min(ready, key=urgency.__getitem__))
    try:
        rewritten = listed(moved(graph, **place), *order)
    except ModelError:  # a view that is listed before what it is a view of, for example
        return
    if computes_same(rewritten, graph):
        sources = random_sources(graph)
        for got, wanted in zip(eager(rewritten, sources)[0], eager(graph, sources)[0], strict=True):
            assert torch.equal(got, wanted)
