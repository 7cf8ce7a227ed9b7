"""What the documentation shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from opweave.compiler.frontend.onnx import load

from .onnx_check import Array, model_of, run

PAGE = Path(__file__).parents[4] / "docs/adding-an-op.md"


def definitions() -> dict[str, Any]:
    """The functions of the page's first example."""
    code = re.search(r"```python\n(import torch.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    return names


def test_documented_requant_shift() -> None:
    """Negative sums round down, levels are clipped, and a sum of 2**30 loses no digit."""
    x = np.array([[5.0, -5.0, 2.0**30 + 64, 300.0, -300.0]], np.float32)
    constants: dict[str, Array] = {"m": np.array([1.0], np.float32), "a": np.array([0.0], np.float32)}
    node = helper.make_node("RequantShift", ["x", "m", "a"], ["y"], div=2, n_levels_out=256, signed=1)
    model = model_of([node], {"x": x}, ["y"], constants=constants)
    imported = load(model, definitions={"RequantShift": definitions()["requant_shift"]}, strict=True)
    np.testing.assert_array_equal(run(imported, {"x": x})[0], [[2, -3, 127, 127, -128]])


def test_documented_rms_norm() -> None:
    x = np.array([[3.0, 4.0]], np.float32)
    node = helper.make_node("RMSNorm", ["x", "w"], ["y"])
    model = model_of([node], {"x": x}, ["y"], constants={"w": np.array([1.0, 2.0], np.float32)})
    imported = load(model, definitions={"RMSNorm": definitions()["rms_norm"]}, strict=True)
    np.testing.assert_allclose(run(imported, {"x": x})[0], x / np.sqrt(12.5) * [1, 2], rtol=1e-5)
