"""The real networks that the onnx package carries, with random weights, against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from opweave.compiler.frontend.onnx import load, randomize_weights
from opweave.errors import ModelError

from .onnx_check import Array, assert_same, random, run, run_onnxruntime

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
NAMES = ("squeezenet", "shufflenet", "resnet50", "densenet121", "inception_v1", "inception_v2")
LARGE = ("bvlc_alexnet", "zfnet512", "vgg19")  # fully connected layers of hundreds of megabytes


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_equals_onnxruntime(name: str) -> None:
    model = randomize_weights(onnx.load(LIGHT / f"light_{name}.onnx"), seed=3)
    imported = load(model)
    assert not imported.fallbacks
    assert not imported.opaque
    inputs = {spec.name: random(*spec.shape) for spec in imported.input_specs}
    found = run(imported, inputs)
    assert float(found[0].std()) > 1e-5, "weights whose effect nobody sees prove nothing"
    assert_same(found, run_onnxruntime(model, inputs))


def test_nodes_are_aten_with_shapes_and_origins() -> None:
    imported = load(LIGHT / "light_squeezenet.onnx")
    calls = [node for node in imported.module.graph.nodes if node.op == "call_function"]
    assert all(str(node.target).startswith("aten.") or "getitem" in str(node.target) for node in calls)
    assert all("val" in node.meta and node.meta["origin"] for node in calls)
    convolutions = [node for node in calls if "convolution" in str(node.target)]
    assert len(convolutions) == imported.native["Conv"] == 26
    placeholders = [node.name for node in imported.module.graph.nodes if node.op == "placeholder"]
    assert placeholders[1:] == list(imported.weights)


def test_weights_are_placeholders_and_light_weights_are_folded() -> None:
    """ConstantOfShape subgraphs become weights, each made once, and unused ones are dropped."""
    imported = load(LIGHT / "light_squeezenet.onnx")
    assert imported.folded["ConstantOfShape"] == 39
    assert len(imported.weights) == 52
    assert not any(node.op == "get_attr" for node in imported.module.graph.nodes)


def test_import_is_deterministic() -> None:
    first, second = (load(LIGHT / "light_squeezenet.onnx") for _ in range(2))
    assert str(first.module.graph) == str(second.module.graph)


def test_fill_seed_is_randomize_weights() -> None:
    path = LIGHT / "light_squeezenet.onnx"
    filled, randomized = load(path, fill_seed=5), load(randomize_weights(onnx.load(path), 5))
    assert all(bool((filled.weights[name] == value).all()) for name, value in randomized.weights.items())


def external_model(folder: Path) -> tuple[Path, Array]:
    """A model with one weight in an external file."""
    weight = random(4, 3)
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[2, 4] x) => (float[2, 3] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save_model(
        model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True
    )
    return folder / "m.onnx", weight


def test_reads_external_data(tmp_path: Path) -> None:
    path, weight = external_model(tmp_path)
    x = random(2, 4, seed=1)
    np.testing.assert_allclose(run(load(path), {"x": x})[0], x @ weight, rtol=1e-5)


def rewrite_location(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "sub/../../w.bin", "absent.bin", "", "sub"])
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    path, _ = external_model(folder)
    (tmp_path / "w.bin").write_bytes((folder / "w.bin").read_bytes())
    rewrite_location(path, location)
    with pytest.raises(ModelError, match="initializer 'w'"):
        load(path)


def test_external_data_does_not_follow_links_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path, _ = external_model(folder)
    (folder / "w.bin").rename(tmp_path / "secret")
    (folder / "w.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


def test_external_data_that_is_too_short(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path)
    (tmp_path / "w.bin").write_bytes(b"\0" * 10)
    with pytest.raises(ModelError, match="which has 10"):
        load(path)
