"""Whether a graph is well formed: names, makers, order; nothing is computed and no operator looked at."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import onnx
from onnx import AttributeProto

from ....errors import ModelError, UnsupportedOperator

__all__ = ["captured_names", "check_graph", "check_names", "in_order", "require_tensors"]


def check_names(root: onnx.GraphProto) -> None:
    """Names are text: protobuf hands out bytes where a name is not valid UTF-8."""
    pending = [root]
    while pending:
        graph = pending.pop()
        named = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        names = [entry.name for entry in named]
        for node in graph.node:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
            names += [attribute.name for attribute in node.attribute]
            pending.extend(_subgraphs(node))
        for name in names:
            if not isinstance(name, str):
                raise ModelError(f"a name in the graph is not valid UTF-8: {name!r}")


def check_graph(graph: onnx.GraphProto) -> None:
    """Every value has one name and one maker, and whatever is used is made."""
    if graph.sparse_initializer:
        raise UnsupportedOperator("the model stores sparse initializers, which opweave does not read")
    known = _unique((info.name for info in graph.input), "graph input")
    known |= _unique((tensor.name for tensor in graph.initializer), "initializer")
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and name in known:
                raise ModelError(f"{_where(node, index)} makes {name!r} a second time; ONNX values are assigned once")
            known.update([name] if name else [])
    for index, node in enumerate(graph.node):
        for name in (*node.input, *captured_names(node)):
            if name and name not in known:
                raise ModelError(
                    f"{_where(node, index)} uses {name!r}, which no node makes and which is no input or initializer"
                )
    for info in graph.output:
        if info.name not in known:
            raise ModelError(f"graph output {info.name!r} is made by no node")


def _unique(names: Iterator[str], what: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        if not name or name in found:
            raise ModelError(f"{what} {name!r} is declared twice" if name else f"one {what} has no name")
        found.add(name)
    return found


def _where(node: onnx.NodeProto, index: int) -> str:
    return f"node {node.name or index!r} ({node.op_type})"


def in_order(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, ...]:
    """The nodes so that each comes after what it uses, otherwise in the model's order; ModelError if there is a cycle.

    ONNX asks for topological order, but exporters are known that do not keep it.
    """
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    missing: list[int] = []
    users: dict[int, list[int]] = {}
    for index, node in enumerate(graph.node):
        makers = {maker[name] for name in (*node.input, *captured_names(node)) if name in maker}
        missing.append(len(makers))
        for other in makers:
            users.setdefault(other, []).append(index)
    ready = [index for index, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users.get(index, ()):
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(graph.node):
        stuck = next(index for index, count in enumerate(missing) if count > 0)
        raise ModelError(f"the graph is cyclic: {_where(graph.node[stuck], stuck)} depends on its own result")
    return tuple(graph.node[index] for index in order)


def captured_names(node: onnx.NodeProto) -> list[str]:
    """Names that the node's subgraphs use from outside, each once, found without recursion."""
    found: dict[str, None] = {}
    pending = [(graph, frozenset[str]()) for graph in _subgraphs(node)]
    while pending:
        graph, outer = pending.pop()
        local = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer} | outer
        for inner in graph.node:
            found.update((name, None) for name in inner.input if name and name not in local)
            local.update(inner.output)
            pending.extend((subgraph, frozenset(local)) for subgraph in _subgraphs(inner))
        found.update((info.name, None) for info in graph.output if info.name not in local)
    return list(found)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def require_tensors(graph: onnx.GraphProto) -> None:
    """UnsupportedOperator if an input or output of the graph is a sequence, an optional, a map or of no type."""
    initializers = {tensor.name for tensor in graph.initializer}
    for what, infos in (("input", graph.input), ("output", graph.output)):
        for info in infos:
            kind = info.type.WhichOneof("value")
            untyped_output = what == "output" and kind is None
            if kind != "tensor_type" and info.name not in initializers and not untyped_output:
                described = (kind or "value of no type").removesuffix("_type")
                raise UnsupportedOperator(f"graph {what} {info.name!r} is of kind {described}, not a tensor")
