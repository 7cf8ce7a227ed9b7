"""Graphs with less in them to plan: weights that stay on the device, and buffers that are allocated apart."""

from __future__ import annotations

import msgspec

from ...compiler.graph import Graph, Op

__all__ = ["with_residents", "without_bytes"]


def with_residents(graph: Graph, resident: frozenset[str]) -> Graph:
    """``graph`` without the sources ``resident``, which operators read where they stay; the time that takes remains."""
    if not resident:
        return graph
    ops = tuple(_reading(graph, op, resident) for op in graph.ops)
    tensors = tuple(tensor for tensor in graph.tensors if tensor.buffer not in resident)
    return msgspec.structs.replace(graph, tensors=tensors, ops=ops)


def _reading(graph: Graph, op: Op, resident: frozenset[str]) -> Op:
    inputs = tuple(name for name in op.inputs if graph.tensor[name].buffer not in resident)
    if len(inputs) == len(op.inputs):
        return op
    buffers = dict.fromkeys(graph.tensor[name].buffer for name in op.inputs)
    nbytes = sum(graph.buffers[buffer].nbytes for buffer in buffers if buffer in resident)
    return msgspec.structs.replace(op, inputs=inputs, outside_bytes=op.outside_bytes + nbytes)


def without_bytes(graph: Graph, apart: frozenset[str]) -> Graph:
    """``graph`` with the buffers ``apart`` emptied, so that they need no place; operators take as long as before."""
    if not apart:
        return graph
    tensors = tuple(
        msgspec.structs.replace(tensor, shape=(0,), strides=None, offset_bytes=0) if tensor.buffer in apart else tensor
        for tensor in graph.tensors
    )
    ops = []
    for op in graph.ops:
        operands = [graph.tensor[name] for name in dict.fromkeys((*op.inputs, *op.outputs))]
        nbytes = sum(tensor.nbytes for tensor in operands if tensor.buffer in apart)
        ops.append(msgspec.structs.replace(op, outside_bytes=op.outside_bytes + nbytes))
    return msgspec.structs.replace(graph, tensors=tensors, ops=tuple(ops))
