"""The two operators that ATen does not have: onnx's reference implementation, and operators only planned.

``opweave::onnx_node(Tensor[] inputs, str op_type, str node, str[] outputs) -> Tensor[]`` runs one ONNX node through
``onnx.reference``. ``opweave::opaque(Tensor[] inputs, str op_type, str name, str[] outputs) -> Tensor[]`` stands for an
operator whose semantics nobody gave: it has shapes and no values. Their arguments besides tensors are plain strings, so
that graphs that hold them can be written to JSON: ``node`` is a single-node ModelProto, serialised and in base64, and
``outputs`` gives each output as ``dtype[size,size,...]``, for example ``float32[1,64,56,56]``.

Importing this module registers both; importing it again does nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ...errors import ExecutionError

__all__ = [
    "evaluate_reference",
    "format_spec",
    "onnx_node",
    "opaque",
    "parse_spec",
    "tensor_from_numpy",
    "tensor_to_numpy",
]

_BIT_TWINS = {
    "bfloat16": (torch.bfloat16, torch.int16, np.int16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.uint8, np.uint8),
    "float8_e4m3fnuz": (torch.float8_e4m3fnuz, torch.uint8, np.uint8),
    "float8_e5m2": (torch.float8_e5m2, torch.uint8, np.uint8),
    "float8_e5m2fnuz": (torch.float8_e5m2fnuz, torch.uint8, np.uint8),
}
#: Element types that torch does not compute with, and the wider ones that hold their values exactly.
_CONTAINERS = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8, "float4_e2m1fn": np.float32}
_TWIN_NAMES = {twin[0]: name for name, twin in _BIT_TWINS.items()}


def tensor_from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A contiguous tensor with the array's values and shape; bfloat16 and float8 come as ml_dtypes arrays.

    Types of less than 8 bits (int4, uint4, int2, uint2, float4) are widened to the next type that holds their values.
    """
    shape = array.shape
    array = np.ascontiguousarray(array).reshape(shape)
    if array.dtype.name in _CONTAINERS:
        array = array.astype(_CONTAINERS[array.dtype.name])
    twin = _BIT_TWINS.get(array.dtype.name)
    if twin is not None:
        return torch.from_numpy(array.view(twin[2]).copy()).view(twin[0])
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array if array.flags.writeable and array.flags.owndata else array.copy())


def tensor_to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values as a numpy array; bfloat16 and float8 become ml_dtypes arrays."""
    tensor = tensor.detach().cpu().contiguous()
    name = _TWIN_NAMES.get(tensor.dtype)
    if name is None:
        return np.asarray(tensor.resolve_conj().resolve_neg().numpy())
    import ml_dtypes

    return np.asarray(tensor.view(_BIT_TWINS[name][1]).numpy().view(np.dtype(getattr(ml_dtypes, name))))


def format_spec(shape: Sequence[int], dtype: torch.dtype) -> str:
    """``dtype[size,size,...]``, the form in which the custom operators carry the shapes of their outputs."""
    return f"{str(dtype).removeprefix('torch.')}[{','.join(str(int(size)) for size in shape)}]"


def parse_spec(spec: str) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype that ``format_spec`` wrote."""
    name, _, sizes = spec.removesuffix("]").partition("[")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ExecutionError(f"{spec!r} is not the form dtype[size,size,...] of an operator's output")
    return tuple(int(size) for size in sizes.split(",") if size), dtype


@lru_cache(maxsize=4096)
def _evaluator(node: str) -> Any:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_model_from_string(base64.b64decode(node))
    if _names_a_file(model):
        # A plan may come from a stranger: the reference implementation would open whatever path the node names.
        raise ExecutionError("an ONNX node holds a tensor that lies in an external file; plans carry no file names")
    return ReferenceEvaluator(model)


def _names_a_file(message: Any) -> bool:
    """Whether a protobuf message, or one inside it, is a tensor with external data."""
    if message.DESCRIPTOR.name == "TensorProto":
        return bool(message.external_data) or message.data_location != 0
    parts = (value for field, value in message.ListFields() if field.message_type is not None)
    return any(_names_a_file(part) for value in parts for part in ([value] if hasattr(value, "ListFields") else value))


def evaluate_reference(inputs: Sequence[torch.Tensor], op_type: str, node: str) -> list[torch.Tensor]:
    """The outputs of the single-node model ``node`` (base64), computed by ``onnx.reference``.

    Raises ExecutionError where the reference implementation fails or gives something that is not a tensor.
    """
    evaluator = _evaluator(node)
    names = evaluator.input_names
    if len(names) != len(inputs):
        raise ExecutionError(f"{op_type} takes {len(names)} tensors, was given {len(inputs)}")
    feeds = {name: tensor_to_numpy(value).copy() for name, value in zip(names, inputs, strict=True)}
    try:
        with np.errstate(all="ignore"):
            return [tensor_from_numpy(np.asarray(value)) for value in evaluator.run(None, feeds)]
    except Exception as error:
        raise ExecutionError(f"onnx's reference implementation of {op_type} failed: {error}") from error


def _run_reference(
    inputs: Sequence[torch.Tensor], op_type: str, node: str, outputs: Sequence[str]
) -> list[torch.Tensor]:
    results = evaluate_reference(inputs, op_type, node)
    for result, spec in zip(results, outputs, strict=True):
        if parse_spec(spec) != (tuple(result.shape), result.dtype):
            got = format_spec(result.shape, result.dtype)
            raise ExecutionError(
                f"{op_type} gave {got} where the model was planned for {spec}",
                hint="the operator's output shape depends on its values; import the model again for these inputs",
            )
    return results


def _no_semantics(
    inputs: Sequence[torch.Tensor], op_type: str, name: str, outputs: Sequence[str]
) -> list[torch.Tensor]:
    raise ExecutionError(
        f"operator {op_type} (node {name!r}) has no definition: it can be planned, not executed",
        hint=f"pass definitions={{{op_type!r}: function}}, a function of torch tensors; see docs/adding-an-op.md",
    )


def _empty_outputs(
    inputs: Sequence[torch.Tensor], op_type: str, node: str, outputs: Sequence[str]
) -> list[torch.Tensor]:
    del inputs, op_type, node
    return [torch.empty(shape, dtype=dtype) for shape, dtype in map(parse_spec, outputs)]


def _register() -> None:
    """Define both operators once; a second import of this module under another name finds them already there."""
    signatures = {
        "onnx_node": ("(Tensor[] inputs, str op_type, str node, str[] outputs) -> Tensor[]", _run_reference),
        "opaque": ("(Tensor[] inputs, str op_type, str name, str[] outputs) -> Tensor[]", _no_semantics),
    }
    for name, (signature, implementation) in signatures.items():
        if hasattr(torch.ops.opweave, name):
            continue
        qualified = f"opweave::{name}"
        torch.library.define(qualified, signature)
        torch.library.impl(qualified, "CompositeExplicitAutograd")(implementation)
        torch.library.register_fake(qualified)(_empty_outputs)


_register()
#: The operators themselves, for matching on ``node.target``.
onnx_node = torch.ops.opweave.onnx_node.default
opaque = torch.ops.opweave.opaque.default
