"""Shared by the ONNX tests: building small models, and running them in eager torch and in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from opweave.compiler.frontend.onnx import ImportedModel
from opweave.compiler.runtime.custom_ops import tensor_from_numpy, tensor_to_numpy

Array = np.ndarray[Any, Any]


def value_info(name: str, array: Array) -> onnx.ValueInfoProto:
    """The type of ``array`` under ``name``."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str | onnx.ValueInfoProto],
    *,
    constants: Mapping[str, Array] | None = None,
    opset: int = 20,
    **kwargs: Any,
) -> onnx.ModelProto:
    """A model of ``nodes`` with inputs like the given arrays; outputs by name alone have no declared shape."""
    infos = [onnx.ValueInfoProto(name=out) if isinstance(out, str) else out for out in outputs]
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes), "test", [value_info(name, array) for name, array in inputs.items()], infos, initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **kwargs)


def declared(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """A declared output."""
    return helper.make_tensor_value_info(name, kind, shape)


def run(imported: ImportedModel, inputs: Mapping[str, Array]) -> list[Array]:
    """The outputs of an imported model in eager torch."""
    values = [tensor_from_numpy(inputs[name]) for name in imported.input_names]
    with torch.no_grad():
        return [tensor_to_numpy(output) for output in imported.module(*values, *imported.weights.values())]


def run_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """The outputs of onnxruntime on the CPU; skips the test where it is not installed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, dict(inputs))]


def assert_same(found: Sequence[Array], expected: Sequence[Array], tolerance: float = 1e-4) -> None:
    """Equal shapes and dtypes, and values to ``tolerance`` relative to each output's largest element."""
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        scale = max(float(np.abs(right.astype(np.float64)).max(initial=0.0)), 1e-30)
        np.testing.assert_allclose(left.astype(np.float64), right.astype(np.float64), rtol=0, atol=tolerance * scale)


def random(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
