"""Around a node: what users define for it, narrow element types among its inputs, and how messages describe them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx import AttributeProto, numpy_helper

from ....errors import ModelError, UnsupportedOperator
from .node import Lowered, Lowering, Node, Value
from .types import PACKED_DTYPES, type_name

__all__ = ["Definition", "check_packed", "describe", "from_definition", "packed_name"]

#: What a user registers for an operator: a function of torch tensors (``None`` where absent) and attributes.
Definition = Callable[..., torch.Tensor | Sequence[torch.Tensor]]
#: Only move elements, so they work on narrow types as on any other.
_KEEP_PACKED = frozenset({"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Flatten"})


def packed_name(proto: onnx.TensorProto) -> str:
    """The name of the tensor's type if it has less than 8 bits, else empty."""
    return type_name(proto.data_type) if proto.data_type in PACKED_DTYPES else ""


def check_packed(node: Node) -> str:
    """The narrow type that the node's outputs keep; UnsupportedOperator where the node would compute with one."""
    names = {index: value.packed for index, value in enumerate(node.inputs) if value is not None and value.packed}
    if not names:
        return ""
    if node.op_type in _KEEP_PACKED and 0 in names:
        return names[0]
    if node.op_type == "DequantizeLinear" or (node.op_type in ("Cast", "CastLike") and 1 not in names):
        return ""
    raise UnsupportedOperator(
        f"{node} computes with {next(iter(names.values()))}, which opweave only stores, moves and dequantises"
    )


def describe(value: Value | None) -> str:
    """A value's name, dtype and shape, for messages."""
    if value is None or value.sequence is not None:
        return "absent" if value is None else "sequence"
    return f"{value.name}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def from_definition(definition: Definition) -> Lowering:
    """A user's function of tensors and attributes in the form of a lowering."""

    def lower(node: Node) -> Lowered | Sequence[Lowered]:
        tensors = [node.optional(index) for index in range(len(node.inputs))]
        attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        try:
            inspect.signature(definition).bind(*tensors, **attributes)
        except TypeError as error:
            raise ModelError(
                f"the definition given for {node.op_type} does not take the node's inputs and attributes: {error}",
                hint=f"it is called with {len(tensors)} tensors and the attributes {sorted(attributes)}",
            ) from error
        return definition(*tensors, **attributes)

    return lower


def _plain(attribute: AttributeProto) -> Any:
    """An attribute's value as plain Python: a one-element tensor is a number, a longer one a numpy array."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        array = numpy_helper.to_array(value)
        return array.item() if array.size == 1 else array
    return list(value) if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS) else value
