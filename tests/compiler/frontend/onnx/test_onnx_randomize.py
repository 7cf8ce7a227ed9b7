"""Random weights: the same whatever the order, only where a weight is, and valid ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from opweave.compiler.frontend.onnx import load, randomize_weights

from .onnx_check import Array, model_of, random

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def weights_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def three_ways() -> onnx.ModelProto:
    """All-equal weights as an initializer, a Constant and a ConstantOfShape; and one that gives a shape's values."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["w1"]),
        helper.make_node("Constant", [], ["w2"], value=numpy_helper.from_array(np.ones((4, 4), np.float32))),
        helper.make_node(
            "ConstantOfShape", ["two"], ["fill"], value=numpy_helper.from_array(np.array([2.0], np.float32))
        ),
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["b"]),
        helper.make_node("MatMul", ["b", "w3"], ["c"]),
        helper.make_node("Resize", ["c", "", "fill"], ["y"], mode="nearest"),
    ]
    constants: dict[str, Array] = {
        "shape": np.array([4, 4], np.int64),
        "two": np.array([2], np.int64),
        "w3": np.zeros((4, 4), np.float32),
    }
    return model_of(nodes, {"x": random(2, 4)}, ["y"], constants=constants)


def test_every_form_of_weight_is_replaced_and_shapes_are_not() -> None:
    result = randomize_weights(three_ways(), 1)
    weights = weights_of(result)
    for name in ("w1", "w2", "w3"):
        assert len(np.unique(weights[name])) == 16
    assert [node.output[0] for node in result.graph.node if node.op_type == "ConstantOfShape"] == ["fill"]
    assert load(result).module.graph.find_nodes(op="output", target="output")[0].args[0][0].meta["val"].shape == (4, 8)


def test_the_original_is_untouched_and_seeds_count() -> None:
    model = three_ways()
    before = model.SerializeToString()
    first, again, other = (weights_of(randomize_weights(model, seed))["w1"] for seed in (1, 1, 2))
    assert model.SerializeToString() == before
    assert (first == again).all()
    assert not (first == other).any()


def test_order_of_initializers_does_not_matter() -> None:
    model = three_ways()
    turned = onnx.ModelProto()
    turned.CopyFrom(model)
    kept = [numpy_helper.from_array(numpy_helper.to_array(t), t.name) for t in reversed(model.graph.initializer)]
    del turned.graph.initializer[:]
    turned.graph.initializer.extend(kept)
    first, second = (weights_of(randomize_weights(m, 1)) for m in (model, turned))
    assert all((first[name] == second[name]).all() for name in ("w1", "w2", "w3"))


def test_varied_weights_stay() -> None:
    weight = random(4, 4)
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": random(2, 4)}, ["y"], constants={"w": weight}
    )
    assert (weights_of(randomize_weights(model, 1))["w"] == weight).all()


def test_light_network_stays_valid_and_its_variances_positive() -> None:
    original = onnx.load(LIGHT / "light_resnet50.onnx")
    result = randomize_weights(original, 0)
    onnx.checker.check_model(result)
    weights = weights_of(result)
    norms = [node for node in result.graph.node if node.op_type == "BatchNormalization"]
    stored = weights_of(original)  # small ones are stored as trained
    replaced = [node.input[4] for node in norms if node.input[4] not in stored]
    assert len(replaced) > 40
    assert all(weights[name].min() >= 0.5 for name in replaced)
    assert not any(node.op_type == "ConstantOfShape" for node in result.graph.node)
