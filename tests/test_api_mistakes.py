"""The Python interface in clumsy hands: wrong types, moved files, unwritable places, names of outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from opweave import api
from opweave.errors import ExecutionError, MachineError, OptionError, PlanError
from opweave.hw_models.model import LARGEST_MEMORY_BYTES
from opweave.hw_models.registry import load as hardware


def unary_model(path: Path, operators: tuple[str, ...]) -> Path:
    """One operator for each of the outputs y0, y1, ..., all of one input x of shape (1, 4), saved to ``path``."""
    nodes = [helper.make_node(operator, ["x"], [f"y{i}"]) for i, operator in enumerate(operators)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", *(n.output[0] for n in nodes))]
    graph = helper.make_graph(nodes, "unary", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scratchpad": 1.5}, "scratchpad"),
        ({"scratchpad": True}, "scratchpad"),
        ({"time_limit": "30"}, "time_limit"),
        ({"order": 3}, "order"),
    ],
)
def test_options_of_the_wrong_type_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        api.compile(torch.nn.ReLU(), (torch.ones(2),), **options)


def test_one_tensor_is_no_sequence_of_inputs() -> None:
    """Iterating over the tensor would pass its rows as arguments."""
    with pytest.raises(OptionError, match=r"\(x,\)"):
        api.compile(torch.nn.ReLU(), torch.ones(2, 2))  # type: ignore[arg-type]  # the mistake under test


def test_arrays_may_be_keywords_and_nested() -> None:
    class Sum(torch.nn.Module):
        def forward(self, pair: list[torch.Tensor], *, bias: torch.Tensor) -> torch.Tensor:
            return pair[0] + pair[1] + bias

    ones = torch.ones(3)
    model = api.compile(Sum(), {"pair": [ones, ones], "bias": ones})
    array = np.ones(3, np.float32)
    result = model(pair=[array, array], bias=array)
    assert isinstance(result, np.ndarray)
    assert result.tolist() == [3, 3, 3]


def test_outputs_that_are_one_value_keep_their_names(tmp_path: Path) -> None:
    """In the graph, both identities are the input itself; their results must not end up under one name."""
    model = api.compile(unary_model(tmp_path / "m.onnx", ("Identity", "Relu", "Identity")))
    assert model.output_names == ("y0", "y1", "y2")


def test_a_model_is_found_beside_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    api.compile(unary_model(Path("m.onnx"), ("Relu",))).save("plan.json")
    monkeypatch.chdir(tmp_path)
    assert api.source_model("made/plan.json") == str(Path("made") / "m.onnx")
    unary_model(Path("m.onnx"), ("Abs",))  # another model of the same name, where the path happens to lead
    assert api.source_model("made/plan.json") == str(Path("made") / "m.onnx")
    unary_model(Path("made/m.onnx"), ("Neg",))
    with pytest.raises(PlanError, match="changed"):
        api.source_model("made/plan.json")


def test_an_unwritable_plan_is_an_option_error(tmp_path: Path) -> None:
    model = api.compile(unary_model(tmp_path / "m.onnx", ("Relu",)))
    with pytest.raises(OptionError, match="directory"):
        model.save(tmp_path)
    with pytest.raises(OptionError, match="cannot write plan"):
        model.report(tmp_path / "m.onnx")


def test_values_no_tensor_holds_are_refused_by_name(tmp_path: Path) -> None:
    model = api.compile(unary_model(tmp_path / "m.onnx", ("Relu",)))
    with pytest.raises(ExecutionError, match="type"):
        model.named_inputs({"x": np.array([["2026-01-01"] * 4], "M8[s]")})


def test_memories_beyond_64_bits_are_refused() -> None:
    machine = hardware("edge-npu")
    assert machine.with_scratchpad(LARGEST_MEMORY_BYTES)
    with pytest.raises(MachineError, match=str(LARGEST_MEMORY_BYTES)):
        machine.with_scratchpad(LARGEST_MEMORY_BYTES + 1)
