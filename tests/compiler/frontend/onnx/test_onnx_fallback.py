"""Operators without a lowering: the reference implementation, definitions, and operators only planned."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser

from opweave.compiler.frontend.onnx import load
from opweave.compiler.runtime import custom_ops
from opweave.errors import ExecutionError, ModelError, UnsupportedOperator

from .onnx_check import Array, assert_same, declared, model_of, random, run, run_onnxruntime

UNIQUE = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Unique", ["r"], ["y"])]
REQUANT = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("RequantShift", ["r", "m", "a"], ["y"], name="q",
                                                                    div=16, signed=1, n_levels=256)]  # fmt: skip
SCALES = {"m": np.array([[3.0], [5.0]], np.float32), "a": np.array([[1.0], [-7.0]], np.float32)}


def requant_shift(
    x: torch.Tensor, mul: torch.Tensor, add: torch.Tensor, *, div: int, signed: int, n_levels: int
) -> torch.Tensor:
    """Deeploy's integer rescaling: floor((x * mul + add) / div), clipped to ``n_levels`` values."""
    low = -n_levels // 2 if signed else 0
    return torch.clamp(torch.floor((x * mul + add) / div), low, low + n_levels - 1)


def test_data_dependent_shape_needs_a_declaration_or_an_example() -> None:
    x = np.array([3, -1, 2, 3], np.float32)
    with pytest.raises(UnsupportedOperator, match=r"(?s)shape of 'y'.*depends on values.*declare"):
        load(model_of(UNIQUE, {"x": x}, ["y"]))
    imported = load(model_of(UNIQUE, {"x": x}, [declared("y", [3])]))
    assert imported.fallbacks == {"Unique": 1}
    np.testing.assert_array_equal(run(imported, {"x": x})[0], [0, 2, 3])
    by_example = load(model_of(UNIQUE, {"x": x}, ["y"]), examples={"x": torch.from_numpy(x)})
    np.testing.assert_array_equal(run(by_example, {"x": x})[0], [0, 2, 3])


def test_another_shape_than_planned_is_an_error() -> None:
    imported = load(model_of(UNIQUE, {"x": random(4)}, [declared("y", [3])]))
    with pytest.raises(ExecutionError, match=r"gave float32\[1\] where the model was planned for float32\[3\]"):
        run(imported, {"x": np.full(4, -1, np.float32)})


def test_reference_on_constants_runs_while_importing() -> None:
    """NonZero of a constant shape: its result is a weight, and later nodes may need its value."""
    nodes = [helper.make_node("NonZero", ["c"], ["i"]), helper.make_node("Expand", ["x", "i2"], ["y"])]
    nodes.insert(1, helper.make_node("Reshape", ["i", "flat"], ["i2"]))
    constants: dict[str, Array] = {"c": np.array([0, 0, 5, 0, 7], np.float32), "flat": np.array([-1], np.int64)}
    imported = load(model_of(nodes, {"x": random(1, 1)}, ["y"], constants=constants))
    assert imported.fallbacks == {"NonZero": 1}
    assert not [node for node in imported.module.graph.nodes if node.target == custom_ops.onnx_node]
    assert run(imported, {"x": random(1, 1)})[0].shape == (2, 4)


def test_strict_refuses_and_names() -> None:
    with pytest.raises(UnsupportedOperator, match="no lowering for Unique"):
        load(model_of(UNIQUE, {"x": random(4)}, [declared("y", [3])]), strict=True)


def test_reason_is_reported() -> None:
    imported = load(model_of(UNIQUE, {"x": random(4)}, [declared("y", [3])]))
    assert imported.reasons == {"Unique": "no lowering"}


def test_call_is_made_of_plain_values() -> None:
    """The graph goes to JSON: besides tensors, the call may hold only strings and lists of them."""
    imported = load(model_of(UNIQUE, {"x": random(4)}, [declared("y", [3])]))
    (call,) = [node for node in imported.module.graph.nodes if node.target == custom_ops.onnx_node]
    _, op_type, encoded, specs = call.args
    assert (op_type, type(encoded), specs) == ("Unique", str, ["float32[3]"])


def test_specs_read_back() -> None:
    for shape, dtype in [((), torch.bool), ((1, 0, 7), torch.bfloat16), ((3,), torch.uint16)]:
        assert custom_ops.parse_spec(custom_ops.format_spec(shape, dtype)) == (shape, dtype)
    with pytest.raises(ExecutionError, match="nonsense"):
        custom_ops.parse_spec("nonsense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool])
def test_numpy_round_trip(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    back = custom_ops.tensor_from_numpy(custom_ops.tensor_to_numpy(tensor))
    assert back.dtype == dtype
    assert back.to(torch.float32).equal(tensor.to(torch.float32))


def test_unknown_operator_without_shapes() -> None:
    model = model_of(REQUANT, {"x": random(2, 3)}, ["y"], constants=SCALES)
    with pytest.raises(UnsupportedOperator, match=r"(?s)RequantShift.*declares no shape for 'y'.*definitions="):
        load(model)


def test_unknown_operator_is_planned_from_declared_shapes() -> None:
    imported = load(model_of(REQUANT, {"x": random(2, 3)}, [declared("y", [2, 3])], constants=SCALES))
    assert imported.opaque == {"RequantShift": 1}
    assert imported.native == {"Relu": 1}
    with pytest.raises(ExecutionError, match=r"(?s)RequantShift \(node 'q'\) has no definition.*definitions="):
        run(imported, {"x": random(2, 3)})


@pytest.mark.parametrize("key", ["RequantShift", "::RequantShift"])
def test_definition_makes_it_native(key: str) -> None:
    x = np.array([[0, 5, 1000], [3, 40, 10000]], np.float32)
    model = model_of(REQUANT, {"x": x}, ["y"], constants=SCALES)
    imported = load(model, definitions={key: requant_shift}, strict=True)
    assert imported.native == {"Relu": 1, "RequantShift": 1}
    np.testing.assert_array_equal(run(imported, {"x": x})[0], [[0, 1, 127], [0, 12, 127]])


def test_definition_that_does_not_fit() -> None:
    model = model_of(REQUANT, {"x": random(2, 3)}, ["y"], constants=SCALES)
    with pytest.raises(ModelError, match=r"(?s)definition given for RequantShift.*3 tensors.*'div', 'n_levels'"):
        load(model, definitions={"RequantShift": lambda x: x})


def test_model_local_function_is_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "own" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) { y = own.scaled<factor = 3.0>(x) }
        <domain: "own", opset_import: ["" : 18]>
        scaled <factor>(a) => (b) { f = Constant<value_float: float = @factor>() p = Mul(a, f) b = Relu(p) }"""
    imported = load(parser.parse_model(text), strict=True)
    np.testing.assert_allclose(run(imported, {"x": random(2, 3)})[0], np.maximum(random(2, 3) * 3, 0), rtol=1e-6)
    assert {
        node.meta["origin"].split("/")[0] for node in imported.module.graph.nodes if node.op == "call_function"
    } == {"scaled"}


def test_function_of_the_standard_is_inlined() -> None:
    """MeanVarianceNormalization has a lowering; SoftmaxCrossEntropyLoss has not, and onnx defines it by others."""
    inputs = {"x": random(4, 5), "t": np.array([0, 4, 2, 1], np.int64)}
    model = model_of(
        [helper.make_node("SoftmaxCrossEntropyLoss", ["x", "t"], ["y"], reduction="mean")], inputs, ["y"], opset=13
    )
    imported = load(model, strict=True)
    assert_same(run(imported, inputs), run_onnxruntime(model, inputs))


LOOP = """<ir_version: 8, opset_import: ["" : 18]> g (float[3] x) => (float[3] y, float[4, 3] rows)
    <int64 trips = {4}, bool go = {1}>
    { y, rows = Loop(trips, go, x)
      <body = b (int64 i, bool c, float[3] v) => (bool k, float[3] w, float[3] row)
        { k = Identity(c) w = Add(v, x) row = Neg(w) }> }"""
BRANCH = """<ir_version: 8, opset_import: ["" : 18]> g (float[3] x) => (float[3] y) <bool no = {0}>
    { y = If(no) <then_branch = t () => (float[3] a) { a = Neg(x) },
                  else_branch = e () => (float[3] b) { b = Abs(x) }> }"""
OPEN_BRANCH = BRANCH.replace("(float[3] x) =>", "(float[3] x, bool no) =>").replace(" <bool no = {0}>", "")


@pytest.mark.parametrize("text", [LOOP, BRANCH], ids=["loop", "if"])
def test_decided_control_flow_is_unrolled(text: str) -> None:
    model, inputs = parser.parse_model(text), {"x": random(3)}
    imported = load(model, strict=True)
    assert_same(run(imported, inputs), run_onnxruntime(model, inputs))


@pytest.mark.parametrize("no", [True, False])
def test_open_control_flow_falls_back(no: bool) -> None:
    """The branch is chosen when the model runs, and its captured values come along."""
    model, inputs = parser.parse_model(OPEN_BRANCH), {"x": random(3), "no": np.array(no)}
    imported = load(model)
    assert imported.fallbacks == {"If": 1}
    assert_same(run(imported, inputs), run_onnxruntime(model, inputs))


def test_example_values_decide_shapes_and_are_recorded() -> None:
    """Only inputs that an operator had to know are specialised."""
    inputs = {"x": random(2, 6), "s": np.array([3, 4], np.int64)}
    model = model_of([helper.make_node("Reshape", ["x", "s"], ["y"])], inputs, ["y"])
    imported = load(model, examples={name: torch.from_numpy(value) for name, value in inputs.items()})
    assert list(imported.specialized) == ["s"]
    assert run(imported, inputs)[0].shape == (3, 4)


def test_random_operators_are_refused() -> None:
    model = model_of([helper.make_node("RandomNormalLike", ["x"], ["y"])], {"x": random(2)}, [declared("y", [2])])
    with pytest.raises(UnsupportedOperator, match="draws random numbers"):
        load(model)


def test_custom_operators_are_registered_once() -> None:
    before = torch.ops.opweave.onnx_node.default
    custom_ops._register()
    assert torch.ops.opweave.onnx_node.default is before


def test_declared_type_of_an_opaque_output() -> None:
    nodes = [helper.make_node("Thing", ["x"], ["y"], domain="vendor")]
    model = model_of(nodes, {"x": random(2)}, [declared("y", [5], TensorProto.INT8)])
    model.opset_import.append(onnx.helper.make_opsetid("vendor", 1))
    (call,) = [node for node in load(model).module.graph.nodes if node.target == custom_ops.opaque]
    assert call.args[1] == "vendor::Thing"
    assert [(tuple(v.shape), v.dtype) for v in call.meta["val"]] == [((5,), torch.int8)]


@pytest.mark.parametrize("nested", [False, True])
def test_a_node_from_a_stranger_opens_no_file(nested: bool, tmp_path: Path) -> None:
    """A plan's ONNX node may not name a file, neither in an attribute nor in a graph inside it."""
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=str(secret))
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    if nested:
        branch = helper.make_graph([node], "branch", [], [onnx.ValueInfoProto(name="y")])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model = helper.make_model(helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="y")]))
    with pytest.raises(ExecutionError, match="external file"):
        custom_ops.evaluate_reference([], "Constant", base64.b64encode(model.SerializeToString()).decode())
