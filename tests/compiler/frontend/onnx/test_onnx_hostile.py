"""Models that are malformed, too large or written to do harm end in one clear error, before memory is taken."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser

from opweave.compiler.frontend.onnx import load
from opweave.errors import ModelError, OptionError, UnsupportedOperator

from .onnx_check import Array, declared, model_of, random, run

HEAD = '<ir_version: 8, opset_import: ["" : 18]> '


def parsed(text: str) -> onnx.ModelProto:
    return parser.parse_model(HEAD + text)


GRAPHS = {
    "cycle": ("g (float[2] x) => (float[2] y) { a = Add(x, y) y = Relu(a) }", "cyclic"),
    "missing value": ("g (float[2] x) => (float[2] y) { y = Add(x, nothing) }", "uses 'nothing', which no node makes"),
    "second assignment": ("g (float[2] x) => (float[2] y) { y = Relu(x) y = Abs(x) }", "makes 'y' a second time"),
    "output from nowhere": ("g (float[2] x) => (float[2] z) { y = Relu(x) }", "output 'z' is made by no node"),
    "shapes do not fit": ("g (float[2] x, float[3] z) => (float[2] y) { y = Add(x, z) }", r"Add.*x: float32\[2\]"),
    "axis outside": ("g (float[2] x) => (float[2] y) { y = Softmax<axis = 5>(x) }", "axis 5 is outside"),
    "attribute of another type": (
        'g (float[2] x) => (float[2] y) { y = Softmax<axis = "a">(x) }',
        "STRING, expected INT",
    ),
    "attribute missing": ("g (float[2] x) => (float[2] y) { y = Concat(x, x) }", "lacks its attribute 'axis'"),
    "input missing": ("g (float[2] x) => (float[2] y) { y = Add(x) }", "lacks its input 1"),
    "negative size": ("g (float[-5] x) => (float[2] y) { y = Relu(x) }", "a size is negative"),
    "absurd input": ("g (float[1099511627776, 1099511627776] x) => (float[2] y) { y = Relu(x) }", r"2\*\*40 elements"),
    "unbound dimension": ("g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }", r"(?s)'n'.*--dim n=VALUE"),
    "strings": ("g (string[2] x) => (string[2] y) { y = Identity(x) }", "'x' has element type STRING"),
    "sequence": ("g (seq(float[2]) x) => (float[2] y) { y = SequenceAt(x, i) }", "'x' is of kind sequence"),
}


@pytest.mark.parametrize(("text", "words"), GRAPHS.values(), ids=GRAPHS.keys())
def test_bad_graphs(text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load(parsed(text))


INT: dict[str, Array] = {"huge": np.array([2**25, 2**25], np.int64), "one": np.array([1], np.float32)}
BOMBS = {
    "ConstantOfShape": [helper.make_node("ConstantOfShape", ["huge"], ["big"])],
    "Expand": [helper.make_node("Expand", ["one", "huge"], ["big"])],
    "Tile": [helper.make_node("Unsqueeze", ["one", "zero"], ["row"]),
             helper.make_node("Tile", ["row", "huge"], ["big"])],
    "Range": [helper.make_node("Range", ["start", "end", "step"], ["big"])],
    "outer product": [
        helper.make_node("Range", ["start", "million", "step"], ["line"]),
        helper.make_node("Reshape", ["line", "column_shape"], ["column"]),
        helper.make_node("Mul", ["line", "column"], ["big"]),
    ],
    "EyeLike": [helper.make_node("ConstantOfShape", ["million_shape"], ["line"]), helper.make_node("OneHot",
                ["line_index", "end", "off_on"], ["big"])],
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_would_not_fit_in_memory(name: str) -> None:
    """Refused by their shape: the test would be killed if one of them were allocated."""
    constants: dict[str, Array] = {
        **INT,
        "zero": np.array([0], np.int64),
        "start": np.array(0, np.int64),
        "end": np.array(2**45, np.int64),
        "step": np.array(1, np.int64),
        "million": np.array(2**20, np.int64),
        "million_shape": np.array([2**20], np.int64),
        "column_shape": np.array([-1, 1], np.int64),
        "line_index": np.array([0, 1], np.int64),
        "off_on": np.array([0, 1], np.float32),
    }
    nodes = [*BOMBS[name], helper.make_node("Shape", ["big"], ["y"])]
    model = model_of(nodes, {"x": random(2)}, ["y"], constants=constants)
    with pytest.raises(ModelError, match=r"bytes|elements"):
        load(model)


def test_many_large_constants_take_no_memory_until_used() -> None:
    """Each is within the limit for one, all together are not; none is used."""
    nodes = [helper.make_node("ConstantOfShape", ["s"], [f"c{index}"]) for index in range(50)]
    nodes.append(helper.make_node("Relu", ["x"], ["y"]))
    imported = load(model_of(nodes, {"x": random(2)}, ["y"], constants={"s": np.array([2**20, 2**10], np.int64)}))
    assert imported.folded == {"ConstantOfShape": 50}
    assert not imported.weights


def test_names_that_are_not_text() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"], name="@@@@")], {"x": random(2)}, ["y"])
    broken = onnx.load_model_from_string(model.SerializeToString().replace(b"@@@@", b"@\xff\xfe@"))
    with pytest.raises(ModelError, match="not valid UTF-8"):
        load(broken)


def test_traced_tensors_have_a_limit_too() -> None:
    sizes = np.array([2**21, 2**21, 2], np.int64)
    model = model_of([helper.make_node("Expand", ["x", "s"], ["y"])], {"x": random(2)}, ["y"], constants={"s": sizes})
    with pytest.raises(ModelError, match="elements"):
        load(model)


def test_initializer_that_stores_less_than_it_says() -> None:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], {"x": random(2)}, ["y"], constants={"w": random(2)})
    model.graph.initializer[0].dims[0] = 2**39
    with pytest.raises(ModelError, match="initializer 'w' has shape"):
        load(model)


@pytest.mark.parametrize("kept", [0, 10, 300])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    model = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])], {"x": random(9)}, ["y"], constants={"w": random(99, 1)}
    )
    path = tmp_path / "cut.onnx"
    path.write_bytes(model.SerializeToString()[:kept])
    with pytest.raises(ModelError):
        load(path)


def test_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("not a model at all, just some text that is long enough to be parsed as one" * 10)
    with pytest.raises(ModelError, match="not a readable ONNX model"):
        load(path)
    with pytest.raises(ModelError, match="no file"):
        load(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match=r"not a readable|no file"):
        load(tmp_path)


@pytest.mark.parametrize(("opset", "words"), [(6, "supported are 7"), (9999, "update the onnx package")])
def test_opsets_outside_the_range(opset: int, words: str) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": random(2)}, ["y"])
    model.opset_import[0].version = opset
    with pytest.raises(ModelError, match=words):
        load(model)


def test_unknown_dimension_lists_the_known() -> None:
    model = parsed("g (float[n, m] x) => (float[n, m] y) { y = Relu(x) }")
    with pytest.raises(OptionError, match=r"(?s)'batch'.*m, n"):
        load(model, dims={"batch": 1})
    assert load(model, dims={"n": 2, "m": 3}).input_specs[0].shape == (2, 3)
    with pytest.raises(OptionError, match="at least 0"):
        load(model, dims={"n": -2, "m": 3})


def test_examples_bind_dimensions_and_must_agree() -> None:
    model = parsed("g (float[n, 3] x, float[n] z) => (float[n, 3] y) { y = Relu(x) }")
    examples = {"x": torch.zeros(2, 3)}
    assert [spec.shape for spec in load(model, examples=examples).input_specs] == [(2, 3), (2,)]
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 3, 1)):
        with pytest.raises(OptionError, match=r"example for input 'x' has shape .* the model takes"):
            load(model, examples={"x": wrong})
    with pytest.raises(OptionError, match=r"'z' has shape \[5\], the model takes \[2\]"):
        load(model, examples={**examples, "z": torch.zeros(5)})
    with pytest.raises(OptionError, match=r"the model takes \[7, 3\]"):
        load(model, examples=examples, dims={"n": 7})
    with pytest.raises(OptionError, match=r"float64, expected torch.float32"):
        load(model, examples={"x": torch.zeros(2, 3, dtype=torch.float64)})
    with pytest.raises(OptionError, match="no input 'w'"):
        load(model, examples={"w": torch.zeros(2)})


def test_dimension_without_a_name() -> None:
    model = parsed("g (float[?, 3] x) => (float[?, 3] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match=r"--dim x\[0\]=VALUE"):
        load(model)
    assert load(model, dims={"x[0]": 4}).input_specs[0].shape == (4, 3)


def test_unsorted_graph_is_sorted() -> None:
    """Exporters are known that write nodes out of order; onnxruntime accepts it, and so does opweave."""
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu(a) a = Neg(x) }")
    x = np.array([-1, 2], np.float32)
    np.testing.assert_array_equal(run(load(model), {"x": x})[0], [1, 0])


def test_deep_graph_does_not_recurse() -> None:
    names = ["x", *(f"v{index}" for index in range(3000))]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]
    imported = load(model_of(nodes, {"x": random(2)}, [names[-1]]))
    assert imported.native["Relu"] == 3000


def test_recursive_function_ends() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "own" : 1]>
        g (float[2] x) => (float[2] y) { y = own.loop(x) }
        <domain: "own", opset_import: ["" : 18, "own" : 1]> loop (a) => (b) { b = own.loop(a) }"""
    with pytest.raises(ModelError, match="nested more than"):
        load(parser.parse_model(text))


def test_duplicate_initializers_and_sparse_ones() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    twice = model_of(nodes, {"x": random(2)}, ["y"], constants={"w": random(2)})
    twice.graph.initializer.append(numpy_helper.from_array(random(2), "w"))
    with pytest.raises(ModelError, match="initializer 'w' is declared twice"):
        load(twice)
    sparse = model_of(nodes, {"x": random(2), "w": random(2)}, ["y"])
    sparse.graph.sparse_initializer.add()
    with pytest.raises(UnsupportedOperator, match="sparse"):
        load(sparse)


def test_narrow_types_are_read_and_dequantised_only() -> None:
    """4-bit weights are common and welcome; computing with them is refused, not done in 8 bits behind one's back."""
    weight = helper.make_tensor("w", TensorProto.INT4, [4], [1, -2, 3, -8])
    scale = np.array(0.5, np.float32)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("Mul", ["d", "x"], ["y"])]
    model = model_of(nodes, {"x": np.ones(4, np.float32)}, ["y"], constants={"s": scale}, opset=21)
    model.graph.initializer.append(weight)
    np.testing.assert_array_equal(run(load(model), {"x": np.ones(4, np.float32)})[0], [0.5, -1, 1.5, -4])
    bad = model_of([helper.make_node("CastLike", ["x", "w"], ["y"])], {"x": random(4)}, ["y"], opset=21)
    bad.graph.initializer.append(weight)
    with pytest.raises(UnsupportedOperator, match="INT4"):
        load(bad)


def test_declared_output_type_is_not_trusted_over_the_computation() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": random(2)}, [declared("y", [7, 7])])
    assert run(load(model), {"x": random(2)})[0].shape == (2,)
