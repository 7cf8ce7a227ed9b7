"""Control flow that is decided while importing: an If with a known condition, a Loop with a known trip count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from .external import read_tensor
from .graph import untraced
from .node import CannotLower, Node, Value

if TYPE_CHECKING:
    from .trace import Interpreter, Scope

__all__ = ["inline_control"]

_MAX_TRIPS = 256


def inline_control(interpreter: Interpreter, node: Node, scope: Scope) -> Sequence[Value | None] | None:
    """The outputs of an If or Loop whose course is known while importing; ``None`` for every other node."""
    inline = {"If": _inline_if, "Loop": _inline_loop, "Scan": _inline_scan}.get(node.op_type)
    if node.proto.domain not in ("", "ai.onnx") or inline is None:
        return None
    counters = (interpreter.native, interpreter.folded, interpreter.fallbacks, interpreter.opaque)
    saved = [Counter(counter) for counter in counters]
    try:
        return inline(interpreter, node, scope)
    except CannotLower:
        interpreter.native, interpreter.folded, interpreter.fallbacks, interpreter.opaque = saved
        return None


def _run(interpreter: Interpreter, graph: onnx.GraphProto, values: dict[str, Value], scope: Scope) -> list[Value]:
    from .trace import Scope

    with untraced():
        for proto in graph.initializer:
            constant = read_tensor(proto, interpreter.source.folder, f"initializer {proto.name!r}")
            values[proto.name] = Value(proto.name, None, constant)
    inner = Scope(values, scope.opsets, scope.depth + 1, scope.path)
    interpreter.run_nodes(graph.node, inner)
    return [inner.values[info.name] for info in graph.output]


def _inline_if(interpreter: Interpreter, node: Node, scope: Scope) -> list[Value]:
    branch = "then_branch" if bool(node.scalar(0)) else "else_branch"
    return _run(interpreter, node.attributes[branch].g, dict(scope.values), scope)


def _inline_loop(interpreter: Interpreter, node: Node, scope: Scope) -> list[Value]:
    body = node.attributes["body"].g
    trips = int(node.scalar(0)) if node.has(0) else _MAX_TRIPS + 1
    running = bool(node.scalar(1)) if node.has(1) else True
    carried = [value for value in node.inputs[2:] if value is not None]
    scans: list[list[Value]] = [[] for _ in range(len(body.output) - 1 - len(carried))]
    if scans and any(interpreter_sequence(value) for value in carried):
        raise CannotLower("a loop over sequences with scan outputs")
    step = 0
    while running and step < trips:
        if step >= _MAX_TRIPS:
            raise CannotLower(f"the loop runs more than {_MAX_TRIPS} times")
        with untraced():
            counter = Value("", None, torch.from_numpy(np.array(step, np.int64)))
            condition = Value("", None, torch.from_numpy(np.array(True)))
        values = dict(scope.values)
        values.update(zip((info.name for info in body.input), (counter, condition, *carried), strict=True))
        results = _run(interpreter, body, values, scope)
        if results[0].constant is None:
            raise CannotLower("the loop's condition is only known when the model runs")
        running = bool(interpreter.demand(results[0]).item())
        carried = results[1 : 1 + len(carried)]
        for scan, value in zip(scans, results[1 + len(carried) :], strict=True):
            scan.append(value)
        step += 1
    if scans and not step:
        raise CannotLower("a loop with scan outputs that never runs")
    stacked = [Value("", torch.stack([interpreter.resolve(value) for value in scan])) for scan in scans]
    return [*carried, *stacked]


def _inline_scan(interpreter: Interpreter, node: Node, scope: Scope) -> list[Value]:
    if node.opset < 9:
        raise CannotLower("Scan of opset 8 has a batch dimension")
    body, scanned = node.attributes["body"].g, node.integer("num_scan_inputs")
    values = [value for value in node.inputs if value is not None]
    carried, inputs = values[: len(values) - scanned], values[len(values) - scanned :]
    tensors = [interpreter.resolve(value) for value in inputs]
    axes = [node.axis(axis, tensor.dim()) for axis, tensor in
            zip(node.integers("scan_input_axes", [0] * scanned), tensors, strict=True)]  # fmt: skip
    backwards = node.integers("scan_input_directions", [0] * scanned)
    trips = tensors[0].shape[axes[0]]
    if not 0 < trips <= _MAX_TRIPS:
        raise CannotLower(f"a scan of {trips} steps")
    rows: list[list[torch.Tensor]] = [[] for _ in range(len(body.output) - len(carried))]
    for step in range(trips):
        given = list(carried)
        for tensor, axis, reverse in zip(tensors, axes, backwards, strict=True):
            given.append(Value("", torch.select(tensor, axis, trips - 1 - step if reverse else step)))
        visible = dict(scope.values)
        visible.update(zip((info.name for info in body.input), given, strict=True))
        results = _run(interpreter, body, visible, scope)
        carried = results[: len(carried)]
        for row, value in zip(rows, results[len(carried) :], strict=True):
            row.append(interpreter.resolve(value))
    out_axes = node.integers("scan_output_axes", [0] * len(rows))
    reverse_out = node.integers("scan_output_directions", [0] * len(rows))
    stacked = [
        Value("", torch.stack(row[::-1] if reverse else row, node.axis(axis, row[0].dim() + 1)))
        for row, axis, reverse in zip(rows, out_axes, reverse_out, strict=True)
    ]
    return [*carried, *stacked]


def interpreter_sequence(value: Value) -> bool:
    """Whether ``value`` is a list built while importing."""
    return value.sequence is not None
