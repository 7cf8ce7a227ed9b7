"""The onnx Backend interface, and onnx's own operator cases through it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from benchmarks import conformance
from onnx import helper

from opweave.compiler.frontend.onnx import ImportedModel
from opweave.compiler.frontend.onnx.backend import Executable, OpweaveBackend, run_eagerly
from opweave.errors import OptionError, UnsupportedOperator

from .onnx_check import model_of, random

RELU = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": random(2, 3)}, ["y"])


def test_prepare_and_run() -> None:
    prepared = OpweaveBackend.prepare(RELU)
    x = random(2, 3)
    for inputs in ([x], x, {"x": x}):
        np.testing.assert_array_equal(prepared.run(inputs)[0], np.maximum(x, 0))
    np.testing.assert_array_equal(OpweaveBackend.run_model(RELU, [x])[0], np.maximum(x, 0))


def test_run_node() -> None:
    node = helper.make_node("Add", ["a", "b"], ["y"])
    (total,) = OpweaveBackend.run_node(node, [random(3), random(3)])
    np.testing.assert_array_equal(total, random(3) * 2)


def test_devices() -> None:
    assert OpweaveBackend.supports_device("CPU")
    assert not OpweaveBackend.supports_device("CUDA:0")
    with pytest.raises(OptionError, match="CUDA"):
        OpweaveBackend.prepare(RELU, "CUDA")


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(OptionError, match=r"2 inputs given, the model takes 1: x"):
        OpweaveBackend.run_model(RELU, [random(2, 3)] * 2)
    with pytest.raises(OptionError, match="'x' is not given"):
        OpweaveBackend.run_model(RELU, {"z": random(2, 3)})


def test_values_that_decide_shapes_are_imported_again() -> None:
    """Same shapes of inputs, another target shape: a stale plan would give the old one."""
    x, sizes = random(2, 6), [np.array(shape, np.int64) for shape in ([3, 4], [4, 3], [12, 1])]
    model = model_of([helper.make_node("Reshape", ["x", "s"], ["y"])], {"x": x, "s": sizes[0]}, ["y"])
    prepared = OpweaveBackend.prepare(model)
    for size in sizes:
        assert prepared.run([x, size])[0].shape == tuple(size)
    imported = prepared.imported
    prepared.run([x + 1, sizes[-1]])
    assert prepared.imported is imported, "nothing that matters changed"


def test_values_that_decide_how_many_results_there_are() -> None:
    """NonZero finds another number of elements in other values of the same shape."""
    model = model_of([helper.make_node("NonZero", ["x"], ["y"])], {"x": random(4)}, ["y"])
    prepared = OpweaveBackend.prepare(model)
    for values in ([0, 1, 0, 2], [0, 0, 0, 3], [1, 1, 1, 1]):
        x = np.array(values, np.float32)
        np.testing.assert_array_equal(prepared.run([x])[0], np.array(np.nonzero(x)))


def test_planner_is_used() -> None:
    seen: list[ImportedModel] = []

    def planner(imported: ImportedModel) -> Executable:
        seen.append(imported)
        return run_eagerly(imported)

    OpweaveBackend.run_model(RELU, [random(2, 3)], planner=planner)
    assert seen[0].native == {"Relu": 1}


def test_sequences_are_declined() -> None:
    info = helper.make_tensor_sequence_value_info("s", 1, [2])
    model = model_of([helper.make_node("SequenceLength", ["s"], ["y"])], {}, ["y"])
    model.graph.input.append(info)
    with pytest.raises(UnsupportedOperator, match="'s' is of kind sequence"):
        OpweaveBackend.run_model(model, [[random(2)]])


def test_conformance_of_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of onnx's cases; `make conformance` runs all."""
    pattern = "conv|pool|gemm|matmul|softmax_|reshape|slice|_pad|resize_up|lstm|gru|gather|quantize|_to_"
    assert conformance.main(["--filter", pattern, "--without-onnxruntime"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(r"conformance: (\d+) passed \((\d+) native\), 0 failed, (\d+) unsupported of (\d+)", last)
    assert found is not None
    passed, native, _, total = map(int, found.groups())
    assert total > 300
    assert passed >= native >= 0.85 * total


def test_a_wrong_answer_is_a_failure() -> None:
    """The runner itself: a provider that is wrong in value, dtype or shape must not pass."""
    (case,) = conformance.collect("^test_relu$", None)

    def wrong(change: Any) -> conformance.Runner:
        def run(model: Any, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[str]]:
            outputs, used = conformance.with_opweave(model, inputs)
            return [change(outputs[0])], used

        return run

    changes = [lambda y: y + 0.01, lambda y: y.astype(np.float64), lambda y: y[None], lambda y: np.full_like(y, np.nan)]
    assert [conformance.judge(case, "opweave", wrong(c)).verdict for c in changes] == [conformance.FAILED] * 4
    assert conformance.judge(case, "opweave", wrong(lambda y: y)).verdict == conformance.NATIVE
