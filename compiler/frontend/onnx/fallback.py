"""Nodes without a lowering: onnx's reference implementation where it knows them, a shape and no value where not."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import onnx
import torch
from onnx import TypeProto, helper, numpy_helper, shape_inference

from ....errors import ExecutionError, ModelError, UnsupportedOperator
from ...runtime.custom_ops import format_spec, onnx_node, opaque, parse_spec, tensor_to_numpy
from .graph import untraced
from .node import CannotLower, Lowered, Node, Value
from .reading import SourceModel
from .types import MAX_CONSTANT_BYTES, TORCH_DTYPES, onnx_type_of, shape_elements

__all__ = ["fall_back", "is_known", "planned_only", "type_proto"]

_SHAPE_CONSTANT_ELEMENTS = 4096
_REFERENCE_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")


def is_known(node: Node, model: onnx.ModelProto) -> bool:
    """Whether onnx gives the node's operator a meaning, or the model does."""
    proto = node.proto
    if any(function.domain == proto.domain and function.name == proto.op_type for function in model.functions):
        return True
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    if proto.domain not in _REFERENCE_DOMAINS or not onnx.defs.has(proto.op_type, domain):
        return False
    try:
        onnx.defs.get_schema(proto.op_type, node.opset, domain)
    except onnx.defs.SchemaError:
        return False
    return True


def type_proto(value: Value) -> TypeProto:
    """The ONNX type of ``value``."""
    return helper.make_tensor_type_proto(onnx_type_of(value.dtype), value.shape)


def _single_node_model(
    node: Node, given: Mapping[str, Value], opsets: Mapping[str, int], model: onnx.ModelProto
) -> onnx.ModelProto:
    inputs = [helper.make_value_info(name, type_proto(value)) for name, value in given.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.proto.output if name]
    graph = helper.make_graph([node.proto], "node", inputs, outputs)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    if node.proto.domain not in opsets:
        imports.append(helper.make_opsetid(node.proto.domain, node.opset))
    single = helper.make_model(graph, opset_imports=imports, ir_version=max(model.ir_version, 8))
    single.functions.extend(model.functions)
    return single


def _inferred(single: onnx.ModelProto, given: Mapping[str, Value]) -> dict[str, str]:
    """The output shapes that onnx infers for the node, given the constants that are known without an example."""
    probe = onnx.ModelProto()
    probe.CopyFrom(single)
    for name, value in given.items():
        if value.constant is not None and not value.sources and value.constant.numel() <= _SHAPE_CONSTANT_ELEMENTS:
            with untraced():
                probe.graph.initializer.append(numpy_helper.from_array(tensor_to_numpy(value.constant), name))
    try:
        probe = shape_inference.infer_shapes(probe, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    found = {}
    for info in (*probe.graph.output, *probe.graph.value_info):
        tensor = info.type.tensor_type
        if info.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
            continue
        if all(dim.WhichOneof("value") == "dim_value" for dim in tensor.shape.dim) and tensor.elem_type in TORCH_DTYPES:
            shape = tuple(dim.dim_value for dim in tensor.shape.dim)
            if all(size >= 0 for size in shape):
                found[info.name] = format_spec(shape, TORCH_DTYPES[tensor.elem_type])
    return found


def fall_back(
    node: Node, captured: Mapping[str, Value], opsets: Mapping[str, int], source: SourceModel
) -> tuple[Sequence[Lowered], Sequence[torch.Tensor | None]]:
    """Record the node as one call of ``opweave::onnx_node``; also its values for the example inputs, if they are known.

    Raises UnsupportedOperator if the shape of an output cannot be found: not inferred, not declared, no example.
    """
    given: dict[str, Value] = {}
    for name, value in zip(node.proto.input, node.inputs, strict=True):
        if value is not None:
            given[name] = value
    given.update(captured)
    if any(value.sequence is not None for value in given.values()):
        raise UnsupportedOperator(f"{node} works on sequences, which opweave does not represent")
    single = _single_node_model(node, given, opsets, source.proto)
    used = [name for name in node.proto.output if name]
    inferred = _inferred(single, given)
    declared = {name: format_spec(*spec) for name, spec in source.declared.items()}
    specs = [inferred.get(name) or declared.get(name) for name in used]
    encoded = base64.b64encode(single.SerializeToString(deterministic=True)).decode("ascii")
    examples = _example_values(node, given, encoded, len(used), specs)
    shown = [format_spec(value.shape, value.dtype) for value in examples]
    if examples and shown != [inferred.get(name) for name in used]:
        specs = list(shown)
        for value in given.values():
            node.demand(value)  # the shape was read off these values, so the graph is specialised to them
    for name, spec in zip(used, specs, strict=True):
        if spec is None:
            raise UnsupportedOperator(
                f"the shape of {name!r}, made by {node}, depends on values that are only known when the model runs",
                hint="declare it in the model (value_info), or give an example input",
            )
    complete = [spec for spec in specs if spec is not None]
    for spec in complete:
        shape_elements(parse_spec(spec)[0], f"an output of {node}")
    results = iter(onnx_node([node.resolve(value) for value in given.values()], node.op_type, encoded, complete))
    values = iter(examples)
    outputs = [next(results) if name else None for name in node.proto.output]
    return outputs, [next(values, None) if name else None for name in node.proto.output] if examples else ()


def _example_values(
    node: Node, given: Mapping[str, Value], encoded: str, count: int, specs: Sequence[str | None]
) -> list[torch.Tensor]:
    """The outputs for known inputs, run through the reference implementation while importing; empty if unknown."""
    from ...runtime.custom_ops import evaluate_reference

    constants = [value.constant for value in given.values()]
    if any(constant is None or constant.numel() > _SHAPE_CONSTANT_ELEMENTS for constant in constants):
        return []
    for spec in specs:
        if spec is not None:
            shape, dtype = parse_spec(spec)
            if shape_elements(shape, f"an output of {node}") * dtype.itemsize > MAX_CONSTANT_BYTES:
                raise ModelError(f"{node} makes a constant of more than {MAX_CONSTANT_BYTES} bytes")
    try:
        with untraced():
            values = evaluate_reference([c for c in constants if c is not None], node.op_type, encoded)
    except ExecutionError as error:
        raise UnsupportedOperator(f"{node}: {error.message}") from error
    return values if len(values) == count else []


def planned_only(node: Node, source: SourceModel) -> Sequence[Lowered]:
    """Record the node as one call of ``opweave::opaque``, with the shapes that the model declares."""
    proto = node.proto
    full_name = f"{proto.domain}::{proto.op_type}" if proto.domain else proto.op_type
    used = [name for name in proto.output if name]
    missing = [name for name in used if name not in source.declared]
    if missing:
        raise UnsupportedOperator(
            f"{node} is of an operator that onnx does not define, and the model declares no shape for {missing[0]!r}",
            hint=f"pass definitions={{{full_name!r}: function}}, a function of torch tensors; see docs/adding-an-op.md",
        )
    specs = [format_spec(*source.declared[name]) for name in used]
    try:
        tensors = node.tensors()
    except CannotLower as error:
        raise UnsupportedOperator(f"{node}: {error}") from error
    results = iter(opaque(tensors, full_name, proto.name or used[0], specs))
    return [next(results) if name else None for name in proto.output]
