"""Operands that an operator's result may be written over, and the graph in which it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ...compiler.graph import Graph, Op, Tensor
from ..order.problem import ancestor_masks

__all__ = ["ELEMENTWISE", "candidates", "last_in_any_order", "last_in_order", "overwritten"]

#: Operators whose result at each place depends on their operands at that place alone, or on small ones that broadcast.
ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in (
        *("abs", "neg", "sign", "ceil", "floor", "round", "trunc", "frac", "clone", "lift_fresh_copy"),
        *("relu", "relu6", "leaky_relu", "_prelu_kernel", "prelu", "elu", "celu", "selu", "threshold", "hardtanh"),
        *("sigmoid", "hardsigmoid", "log_sigmoid", "silu", "hardswish", "mish", "gelu", "softplus", "tanh"),
        *("clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "fmax", "fmin"),
        *("add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "remainder", "fmod", "floor_divide"),
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "pow", "erf", "erfc"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh"),
        *("logical_and", "logical_or", "logical_xor", "logical_not"),
        *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
        *("eq", "ne", "lt", "le", "gt", "ge", "where", "masked_fill"),
        *("_native_batch_norm_legit_no_training",),
    )
)


def candidates(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """For each operator, the buffers its result may be written over once nobody else needs them, in operand order.

    The operator is elementwise and has one result that is not empty, a buffer of its own. The operand fills a buffer
    of the same bytes, laid out as the result is: same shape, dtype and strides. It is neither a source, whose value
    may be needed again, nor returned by the model; and the operator reads nothing else of that buffer.
    """
    return tuple(tuple(_operands(graph, op)) for op in graph.ops)


def _operands(graph: Graph, op: Op) -> list[str]:
    results = [graph.tensor[name] for name in op.outputs if graph.tensor[name].nbytes]
    if op.target.rpartition(".")[0] not in ELEMENTWISE or len(results) != 1 or results[0].name != results[0].buffer:
        return []
    result = results[0]
    found: list[str] = []
    read = [graph.tensor[name] for name in op.inputs]
    for buffer in dict.fromkeys(tensor.buffer for tensor in read):
        base = graph.buffers[buffer]
        alike = all(_layout(tensor) == _layout(result) for tensor in read if tensor.buffer == buffer)
        kept = base.role.is_source or buffer in graph.output_buffers
        if alike and not kept and base.nbytes == result.nbytes:
            found.append(buffer)
    return found


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.element_strides, tensor.offset_bytes


def last_in_any_order(graph: Graph) -> dict[str, str]:
    """Results by the buffers they may be written over whatever the order: all other users of it come before."""
    users: dict[str, list[int]] = {}
    for index, touched in enumerate(graph.touches):
        for buffer in touched:
            users.setdefault(buffer, []).append(index)
    ancestors = ancestor_masks(graph.predecessors)
    chosen: dict[str, str] = {}
    for index, buffers in enumerate(candidates(graph)):
        for buffer in buffers:
            if all(other == index or ancestors[index] >> other & 1 for other in users[buffer]):
                chosen[_result(graph, index)] = buffer
                break
    return chosen


def last_in_order(graph: Graph, order: Sequence[int]) -> dict[str, str]:
    """Results by the buffers they may be written over in ``order``: their operator is the last there to use it."""
    last = {buffer: op for op in order for buffer in graph.touches[op]}
    chosen: dict[str, str] = {}
    for index, buffers in enumerate(candidates(graph)):
        for buffer in buffers:
            if last[buffer] == index:
                chosen[_result(graph, index)] = buffer
                break
    return chosen


def _result(graph: Graph, op: int) -> str:
    return next(name for name in graph.ops[op].outputs if graph.tensor[name].nbytes)


def overwritten(graph: Graph, chosen: Mapping[str, str], order: Sequence[int] | None = None) -> Graph:
    """``graph`` with results as new versions of the buffers they are written over; operators listed in ``order``.

    ``chosen`` holds buffers by results. Views of a result follow it. The order of the operators matters, as it says
    which version each of them reads: one that others would have to come before must be listed after them.
    """
    place = dict(chosen)
    for result in chosen:  # a result may be written over another one
        buffer = chosen[result]
        while buffer in place:
            buffer = place[buffer]
        place[result] = buffer
    tensors = tuple(
        msgspec.structs.replace(tensor, buffer=place[tensor.buffer]) if tensor.buffer in place else tensor
        for tensor in graph.tensors
    )
    ops = graph.ops if order is None else tuple(graph.ops[op] for op in order)
    return Graph(graph.name, tensors, ops, graph.outputs)
