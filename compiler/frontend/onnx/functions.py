"""Operators that onnx itself, or the model, defines by other operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto

from .fallback import type_proto
from .node import Node

__all__ = ["FunctionCall", "body_of", "instantiate"]


@dataclass(frozen=True)
class FunctionCall:
    """A function's body with the caller's attributes put in."""

    input: Sequence[str]
    output: Sequence[str]
    nodes: Sequence[onnx.NodeProto]


def body_of(node: Node, model: onnx.ModelProto, opsets: Mapping[str, int]) -> onnx.FunctionProto | None:
    """The function that defines the node's operator: the model's own, else onnx's; ``None`` if there is none."""
    proto = node.proto
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    functions: Sequence[onnx.FunctionProto] = model.functions
    for function in functions:
        same_domain = ("" if function.domain == "ai.onnx" else function.domain) == domain
        if same_domain and function.name == proto.op_type and function.overload == proto.overload:
            return function
    if not onnx.defs.has(proto.op_type, domain):
        return None
    version = opsets.get(domain, 1)
    try:
        schema = onnx.defs.get_schema(proto.op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    return _schema_body(schema, node, version)


def _schema_body(schema: Any, node: Node, version: int) -> onnx.FunctionProto | None:
    """``schema`` is an onnx OpSchema, whose stubs lack the functions."""
    function = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        if not versions:
            return None
        types = [b"" if value is None else type_proto(value).SerializeToString() for value in node.inputs]
        data = schema.get_context_dependent_function_with_opset_version(
            max(versions), node.proto.SerializeToString(), types
        )
    elif schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= version]
        if not versions:
            return None
        data = schema.get_function_with_opset_version(max(versions))
    else:
        return None
    if not data:
        return None
    function.ParseFromString(data)
    given = {attribute.name for attribute in function.attribute_proto}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.type:
            function.attribute_proto.append(attribute.default_value)
    return function


def instantiate(function: onnx.FunctionProto, node: Node) -> FunctionCall:
    """The body of ``function`` with references to its attributes replaced by the values of ``node``."""
    given: dict[str, AttributeProto] = {attribute.name: attribute for attribute in function.attribute_proto}
    given.update(node.attributes)
    nodes = []
    for original in function.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(original)
        _substitute(copied, given)
        nodes.append(copied)
    return FunctionCall(list(function.input), list(function.output), nodes)


def _substitute(root: onnx.NodeProto, given: Mapping[str, AttributeProto]) -> None:
    """Replace attribute references in ``root`` and all nodes of its subgraphs; a reference to nothing is dropped."""
    pending = [root]
    while pending:
        node = pending.pop()
        kept = []
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in given:
                    value = AttributeProto()
                    value.CopyFrom(given[attribute.ref_attr_name])
                    value.name = attribute.name
                    kept.append(value)
            else:
                kept.append(attribute)
        copies = []
        for attribute in kept:
            copy = AttributeProto()
            copy.CopyFrom(attribute)
            copies.append(copy)
        del node.attribute[:]
        node.attribute.extend(copies)
        for attribute in node.attribute:
            pending.extend(attribute.g.node)
            for graph in attribute.graphs:
                pending.extend(graph.node)
