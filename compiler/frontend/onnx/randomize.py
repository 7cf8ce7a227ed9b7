"""Random weights in place of all-equal ones, which hide every mistake in the order of elements."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from ....errors import ModelError
from .types import MAX_CONSTANT_BYTES, array_from_proto, shape_elements

__all__ = ["randomize_weights"]

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Operators that hand a weight on in another shape, so that its role is the role of what they make.
_PASS_ON = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity", "Flatten", "Cast"})
#: Variance of a matrix's entries times its fan-in. A classifier's is small, or its softmax would hide all differences.
_GAINS = {"matrix": 2.0, "linear matrix": 1.0, "classifier matrix": 0.0025}
_MAX_RANK = 64
_RECTIFIERS = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "Gelu", "HardSwish", "Elu", "Selu"})
#: (operator, input) to what the weight is; only weights with a role here are replaced.
_ROLES: Mapping[tuple[str, int], str] = {
    ("Conv", 1): "matrix", ("ConvTranspose", 1): "matrix", ("Gemm", 1): "matrix", ("Gemm", 0): "matrix",
    ("MatMul", 0): "matrix", ("MatMul", 1): "matrix", ("Gather", 0): "matrix", ("RNN", 1): "matrix",
    ("RNN", 2): "matrix", ("GRU", 1): "matrix", ("GRU", 2): "matrix", ("LSTM", 1): "matrix", ("LSTM", 2): "matrix",
    ("Conv", 2): "bias", ("ConvTranspose", 2): "bias", ("Gemm", 2): "bias", ("RNN", 3): "bias", ("GRU", 3): "bias",
    ("LSTM", 3): "bias", ("Add", 0): "bias", ("Add", 1): "bias", ("Sub", 1): "bias", ("Sum", 0): "bias",
    ("Sum", 1): "bias", ("BatchNormalization", 1): "scale", ("BatchNormalization", 2): "bias",
    ("BatchNormalization", 3): "bias", ("BatchNormalization", 4): "scale", ("InstanceNormalization", 1): "scale",
    ("InstanceNormalization", 2): "bias", ("LayerNormalization", 1): "scale", ("LayerNormalization", 2): "bias",
    ("GroupNormalization", 1): "scale", ("GroupNormalization", 2): "bias", ("RMSNormalization", 1): "scale",
    ("RMSNorm", 1): "scale", ("Mul", 0): "scale", ("Mul", 1): "scale", ("Div", 1): "scale", ("PRelu", 1): "scale",
}  # fmt: skip


def randomize_weights(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """A copy of ``model`` in which every all-equal floating-point weight of more than one element is random.

    Weights may be initializers, Constant nodes or ConstantOfShape nodes; all become initializers. A tensor counts as a
    weight by what uses it. Kernels and matrices get N(0, 2 / fan_in) before a rectifier and N(0, 1 / fan_in)
    elsewhere, less before a softmax; scales and variances U(0.5, 1.5); biases and means N(0, 0.1). The branches of
    residual sums are scaled down. Each tensor has its own stream, from ``seed`` and its name, so the order of nodes
    does not matter. Everything else, such as tensors that give a shape, is left alone. Raises ModelError beyond the
    2 GiB that an ONNX file may have.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    roles, damping = _roles(graph), _damping(graph)
    overridable = {info.name for info in graph.input}
    replaced: dict[str, TensorProto] = {}
    for name, shape, data_type in _all_equal(graph):
        if name in roles and name not in replaced:
            role, matrix_of = roles[name]
            replaced[name] = _random_tensor(name, shape, data_type, role, matrix_of, damping.get(name, 1.0), seed)
    if sum(len(tensor.raw_data) for tensor in replaced.values()) > 2**31 - 2**24:
        raise ModelError("the model with random weights would exceed the 2 GiB that one ONNX file may have")
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    nodes = [node for node in graph.node if not (len(node.output) == 1 and node.output[0] in replaced)]
    nodes_copy, kept_copy = _copies(nodes, onnx.NodeProto), _copies(kept, TensorProto)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes_copy)
    graph.initializer.extend(kept_copy)
    for tensor in replaced.values():
        graph.initializer.append(tensor)
        if result.ir_version < 4 and tensor.name not in overridable:  # older files list every initializer as an input
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return result


def _copies(messages: list, kind: type) -> list:  # type: ignore[type-arg]
    copies = []
    for message in messages:
        copy = kind()
        copy.CopyFrom(message)
        copies.append(copy)
    return copies


def _roles(graph: onnx.GraphProto) -> dict[str, tuple[str, str]]:
    """For each value with a role: the role, and the operator that gives it."""
    roles: dict[str, tuple[str, str]] = {}
    unclear: set[str] = set()
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in reversed(graph.node):
        for index, name in enumerate(node.input):
            role = _ROLES.get((node.op_type, index))
            if node.op_type in _PASS_ON and index == 0 and node.output[0] in roles:
                roles.setdefault(name, roles[node.output[0]])
            elif role is not None:
                transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
                operator = node.op_type + ("^T" if transposed else "")
                if role == "matrix" and any(user.op_type == "Softmax" for user in users.get(node.output[0], [])):
                    role = "classifier matrix"
                elif role == "matrix" and not _reaches(node.output[0], users):
                    role = "linear matrix"
                roles.setdefault(name, (role, operator))
            else:
                unclear.add(name)  # some other use, where the value may matter
    return {name: role for name, role in roles.items() if name not in unclear}


def _reaches(name: str, users: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """Whether a rectifier follows, possibly after a normalisation: it halves the variance, and gain 2 restores it."""
    for _ in range(4):
        following = users.get(name, [])
        if any(node.op_type in _RECTIFIERS for node in following):
            return True
        through = [
            node for node in following if node.op_type in ("BatchNormalization", "Mul", "Add", "Reshape", "Concat")
        ]
        if not through:
            return False
        name = through[0].output[0]
    return False


def _damping(graph: onnx.GraphProto) -> dict[str, float]:
    """Factors below one for the last weights of residual branches, so that sums of many branches stay of order one.

    Each sum of two computed values gets one branch scaled by 1 / sqrt(number of such sums), as in Fixup
    (Zhang, Dauphin and Ma, 2019), so the variance of the whole grows by a constant factor, not two to the depth.
    """
    maker = {name: node for node in graph.node for name in node.output}
    branches = [
        makers
        for node in graph.node
        if node.op_type in ("Add", "Sum")
        and len(makers := [maker[name] for name in node.input if name in maker]) == len(node.input) > 1
        and not any(other.op_type in (*_PASS_ON, "ConstantOfShape", "Constant") for other in makers)
    ]
    factor = 1.0 / math.sqrt(max(1, len(branches)))
    damped: dict[str, float] = {}
    for makers in branches:
        for node in makers:
            last = {"Conv": node.input[1:3], "Gemm": node.input[1:3], "BatchNormalization": node.input[1:3]}
            if node.op_type in last:
                damped.update((name, factor) for name in last[node.op_type])
                break
    return damped


def _is_flat(array: np.ndarray) -> bool:
    return array.size > 1 and bool(np.all(array == array.reshape(-1)[0]))


def _all_equal(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and type of each floating-point tensor of more than one element, all equal."""
    constants = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant":
            constants += [(node.output[0], a.t) for a in node.attribute if a.type == AttributeProto.TENSOR]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in constants:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.data_type not in (*_FLOATS, TensorProto.INT64):
            continue
        array = array_from_proto(tensor, f"tensor {name!r}")
        if tensor.data_type == TensorProto.INT64:
            shapes[name] = tuple(int(size) for size in array.reshape(-1)) if array.size <= _MAX_RANK else ()
        elif _is_flat(array):
            yield name, tuple(tensor.dims), tensor.data_type
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input and node.input[0] in shapes:
            data_type = next((a.t.data_type for a in node.attribute if a.name == "value"), TensorProto.FLOAT)
            shape = shapes[node.input[0]]
            if data_type in _FLOATS and shape_elements(shape, f"node {node.name!r}") > 1:
                yield node.output[0], shape, int(data_type)


def _fan_in(shape: tuple[int, ...], operator: str) -> int:
    if operator in ("Conv", "RNN", "GRU", "LSTM"):
        return math.prod(shape[2:] if operator != "Conv" else shape[1:])
    if operator == "ConvTranspose":
        return shape[0] * math.prod(shape[2:])
    if operator in ("Gemm^T", "Gather"):
        return shape[-1]
    return shape[-2] if len(shape) > 1 else shape[0]


def _random_tensor(
    name: str, shape: tuple[int, ...], data_type: int, role: str, operator: str, factor: float, seed: int
) -> TensorProto:
    if shape_elements(shape, f"weight {name!r}") * 4 > MAX_CONSTANT_BYTES:
        raise ModelError(f"weight {name!r} of shape {list(shape)} is larger than {MAX_CONSTANT_BYTES} bytes")
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    if role == "scale":
        values = generator.random(shape, np.float32) + np.float32(0.5)
    else:
        deviation = 0.1 if role == "bias" else math.sqrt(_GAINS[role] / max(1, _fan_in(shape, operator)))
        values = generator.standard_normal(shape, np.float32)
        values *= np.float32(deviation)
    values *= np.float32(factor)
    values = values.astype(helper.tensor_dtype_to_np_dtype(data_type), copy=False)
    return numpy_helper.from_array(values, name)
