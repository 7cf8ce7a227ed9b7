"""Lowerings against onnxruntime and onnx's own reference: old opsets above all, whose rules differ from today's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from opweave.compiler.frontend.onnx import load

from .onnx_check import Array, assert_same, model_of, random, run, run_onnxruntime

X = random(2, 3, 4, 5)
VECTOR = random(3, seed=1)
POSITIVE = np.abs(VECTOR) + 0.5
Case = tuple[int, list[onnx.NodeProto], Mapping[str, Array], Mapping[str, Array]]


def case(op: str, opset: int, inputs: Mapping[str, Array], constants: Mapping[str, Array] | None = None,
         outputs: Sequence[str] = ("y",), **attributes: Any) -> Case:  # fmt: skip
    names = [*inputs, *(constants or {})]
    return opset, [helper.make_node(op, names, list(outputs), **attributes)], inputs, constants or {}


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


BATCH_NORM = {"s": VECTOR, "b": random(3, seed=2), "m": random(3, seed=3), "v": POSITIVE}
CASES: dict[str, Case] = {
    "softmax flattens before 13": case("Softmax", 11, {"x": X}, axis=1),
    "softmax defaults to axis 1 before 13": case("Softmax", 7, {"x": X}),
    "softmax defaults to the last axis": case("Softmax", 13, {"x": X}),
    "log softmax flattens": case("LogSoftmax", 11, {"x": X}, axis=2),
    "hardmax flattens": case("Hardmax", 11, {"x": X}, axis=1),
    "squeeze axes attribute": case("Squeeze", 11, {"x": X[:, :1]}, axes=[1]),
    "squeeze all": case("Squeeze", 13, {"x": X[:1, :, :1]}),
    "unsqueeze axes attribute": case("Unsqueeze", 9, {"x": X}, axes=[0, 3]),
    "unsqueeze axes input": case("Unsqueeze", 13, {"x": X}, {"a": ints(-1, 1)}),
    "clip attributes": case("Clip", 7, {"x": X}, min=-0.5, max=0.25),
    "clip inputs": case("Clip", 13, {"x": X}, {"low": np.array(-0.5, np.float32), "high": np.array(0.25, np.float32)}),
    "slice attributes": case("Slice", 9, {"x": X}, starts=[1, -3], ends=[9, 5], axes=[1, 3]),
    "slice backwards": case("Slice", 13, {"x": X}, {"s": ints(-1, 3), "e": ints(-9, 0), "a": ints(3, 2),
                                                    "t": ints(-2, -1)}),
    "pad attributes": case("Pad", 10, {"x": X}, pads=[0, 0, 1, 2, 0, 0, 0, 3], value=1.5),
    "pad reflect": case("Pad", 13, {"x": X}, {"p": ints(0, 0, 2, 1, 0, 0, 1, 2)}, mode="reflect"),
    "pad edge": case("Pad", 13, {"x": X}, {"p": ints(0, 1, 2, 1, 1, 0, 1, 2)}, mode="edge"),
    "pad that crops": case("Pad", 13, {"x": X}, {"p": ints(0, -1, 0, 0, 0, 0, -1, 2)}),
    "upsample": case("Upsample", 9, {"x": X}, {"s": np.array([1, 1, 2, 3], np.float32)}, mode="nearest"),
    "resize opset 10": case("Resize", 10, {"x": X}, {"s": np.array([1, 1, 2, 1.5], np.float32)}, mode="linear"),
    "resize nearest": case("Resize", 13, {"x": X}, {"r": np.zeros(0, np.float32), "s": np.array([1, 1, 2, 2],
                           np.float32)}, mode="nearest"),
    "batch norm": case("BatchNormalization", 7, {"x": X}, BATCH_NORM, epsilon=1e-3),
    "batch norm opset 15": case("BatchNormalization", 15, {"x": X}, BATCH_NORM),
    "dropout opset 7": case("Dropout", 7, {"x": X}, ratio=0.7),
    "dropout mask": case("Dropout", 13, {"x": X}, outputs=("y", "mask")),
    "reduce sum attribute": case("ReduceSum", 11, {"x": X}, axes=[1, -1], keepdims=0),
    "reduce mean input": case("ReduceMean", 18, {"x": X}, {"a": ints(2)}),
    "reduce nothing": case("ReduceSum", 13, {"x": X}, {"a": ints()}, noop_with_empty_axes=1),
    "smallest": case("TopK", 11, {"x": X}, {"k": ints(2)}, outputs=("v", "i"), axis=1, largest=0),
    "asymmetric convolution": case("Conv", 11, {"x": X}, {"w": random(6, 3, 2, 3)}, pads=[0, 1, 1, 2], strides=[2, 1]),
    "depthwise convolution": case("Conv", 11, {"x": X}, {"w": random(6, 1, 3, 3), "b": random(6)}, group=3,
                                  auto_pad="SAME_LOWER", dilations=[1, 1]),
    "one-dimensional convolution": case("Conv", 11, {"x": X[0]}, {"w": random(2, 4, 3)}, pads=[1, 1]),
    "transposed convolution": case("ConvTranspose", 11, {"x": X}, {"w": random(3, 2, 3, 3)}, strides=[2, 2],
                                   pads=[1, 0, 0, 1], output_padding=[1, 0]),
    "max pool ceil": case("MaxPool", 12, {"x": X}, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
    "max pool same": case("MaxPool", 8, {"x": X}, kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    "average pool asymmetric": case("AveragePool", 11, {"x": X}, kernel_shape=[3, 3], pads=[0, 1, 2, 1]),
    "average pool counts padding": case("AveragePool", 11, {"x": X}, kernel_shape=[3, 3], pads=[0, 1, 2, 1],
                                        count_include_pad=1),
    "lp pool": case("LpPool", 11, {"x": X}, kernel_shape=[2, 2], p=3),
    "lrn": case("LRN", 13, {"x": X}, size=3, alpha=0.5, beta=0.6, bias=2.0),
    "gemm": case("Gemm", 13, {"x": random(4, 3)}, {"w": random(5, 4), "c": random(5)}, transA=1, transB=1, alpha=0.5,
                 beta=2.0),
    "layer norm": case("LayerNormalization", 17, {"x": X}, {"s": random(4, 5), "b": random(4, 5)}, axis=2),
    "instance norm": case("InstanceNormalization", 7, {"x": X}, {"s": VECTOR, "b": VECTOR}),
    "prelu per channel": case("PRelu", 9, {"x": X}, {"s": VECTOR.reshape(3, 1, 1)}),
    "gather negative": case("Gather", 13, {"x": X}, {"i": np.array([[-1, 0], [1, -2]], np.int64)}, axis=2),
    "gather scalar": case("Gather", 13, {"x": X}, {"i": np.array(-1, np.int64)}, axis=1),
    "split sizes": case("Split", 13, {"x": X}, {"s": ints(1, 4)}, outputs=("a", "b"), axis=3),
    "split attribute": case("Split", 11, {"x": X}, outputs=("a", "b"), axis=2, split=[3, 1]),
    "flatten": case("Flatten", 13, {"x": X}, axis=-1),
    "reshape copies zeros": case("Reshape", 13, {"x": X}, {"s": ints(0, -1, 2)}),
    "depth to space": case("DepthToSpace", 13, {"x": random(1, 8, 2, 3)}, blocksize=2, mode="DCR"),
    "cumulative sum": case("CumSum", 14, {"x": X}, {"a": np.array(1, np.int32)}, exclusive=1, reverse=1),
    "integer division truncates": case("Div", 14, {"a": np.array([-7, 7, -8], np.int32), "b": np.array([2, -2, 3],
                                       np.int32)}),
    "float remainder": case("Mod", 13, {"a": X, "b": random(2, 3, 4, 5, seed=9)}, fmod=1),
    "one hot": case("OneHot", 11, {"i": np.array([1, -1, 9], np.int64)}, {"d": np.array(4, np.int64), "v": np.array(
                    [-1, 2], np.float32)}, axis=0),
    "scatter": case("ScatterElements", 13, {"x": X}, {"i": np.array([[[[1]]]], np.int64), "u": np.ones((1, 1, 1, 1),
                    np.float32)}, axis=-1),
    "quantize per channel": case("QuantizeLinear", 13, {"x": X}, {"s": POSITIVE * 0.1, "z": np.array([3, 128, 250],
                                 np.uint8)}, axis=1),
    "lstm": case("LSTM", 14, {"x": random(5, 2, 3)}, {"w": random(2, 16, 3), "r": random(2, 16, 4), "b": random(2, 32)},
                 outputs=("y", "h", "c"), hidden_size=4, direction="bidirectional"),
    "gru": case("GRU", 14, {"x": random(5, 2, 3)}, {"w": random(1, 12, 3), "r": random(1, 12, 4), "b": random(1, 24)},
                outputs=("y", "h"), hidden_size=4, linear_before_reset=1, direction="reverse"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_onnxruntime(name: str) -> None:
    opset, nodes, inputs, constants = CASES[name]
    model = model_of(nodes, inputs, list(nodes[0].output), constants=constants, opset=opset)
    imported = load(model)
    assert not imported.fallbacks
    assert_same(run(imported, inputs), run_onnxruntime(model, inputs))


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=SHAPES, data=st.data())
def test_slices_of_any_bounds(shape: list[int], data: st.DataObject) -> None:
    """Bounds far outside, empty results, negative steps: as numpy does it."""
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    bound = st.integers(-6, 6)
    start, end, step = data.draw(bound), data.draw(bound), data.draw(bound.filter(bool))
    x = random(*shape)
    constants = {"s": ints(start), "e": ints(end), "a": ints(axis), "t": ints(step)}
    model = model_of([helper.make_node("Slice", ["x", *constants], ["y"])], {"x": x}, ["y"], constants=constants)
    selector = [slice(None)] * len(shape)
    selector[axis] = slice(start, end, step)
    # Python and ONNX differ where a negative end means "before the first": ONNX clamps it
    size = shape[axis]
    if step < 0 and end < -size:
        selector[axis] = slice(start, None, step)
    np.testing.assert_array_equal(run(load(model), {"x": x})[0], x[tuple(selector)])


@settings(max_examples=25, deadline=None)
@given(left=SHAPES, data=st.data())
def test_broadcasting(left: list[int], data: st.DataObject) -> None:
    right = [data.draw(st.sampled_from([1, size])) for size in left][data.draw(st.integers(0, len(left) - 1)) :]
    a, b = random(*left), random(*right, seed=1)
    model = model_of([helper.make_node("Sub", ["a", "b"], ["y"])], {"a": a, "b": b}, ["y"])
    np.testing.assert_array_equal(run(load(model), {"a": a, "b": b})[0], a - b)


def test_weights_computed_from_constants_are_folded() -> None:
    """A transposed, dequantised weight is one weight of the graph, and the graph holds only the product."""
    weight = np.arange(12, dtype=np.int8).reshape(3, 4)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    model = model_of(nodes, {"x": random(2, 4)}, ["y"], constants={"w": weight, "s": np.array(0.5, np.float32)})
    imported = load(model)
    assert imported.folded == {"DequantizeLinear": 1, "Transpose": 1}
    assert [tuple(value.shape) for value in imported.weights.values()] == [(4, 3)]
    np.testing.assert_allclose(run(imported, {"x": random(2, 4)})[0], random(2, 4) @ (weight.T * 0.5), rtol=1e-6)


def test_shape_computations_are_folded() -> None:
    """What exporters write around Reshape: Shape, Gather, Concat; all of it is known when shapes are."""
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[2, 3, 4] x) => (float[2, 12] y)
        <int64 zero = {0}, int64[1] axis = {0}, int64[1] rest = {-1}>
        { s = Shape(x) b = Gather(s, zero) u = Unsqueeze(b, axis) t = Concat<axis = 0>(u, rest) y = Reshape(x, t) }"""
    imported = load(onnx.parser.parse_model(text))
    targets = [str(node.target) for node in imported.module.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.view.default"]
    assert not imported.weights
