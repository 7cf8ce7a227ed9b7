"""The Python face: anything a frontend reads goes in, and what comes out can be called, saved, loaded and trusted."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import opweave
from opweave.api import source_model
from opweave.compiler.plan import Plan
from opweave.errors import ExecutionError, Infeasible, ModelError, OptionError, PlanError, VerificationError


class Branches(nn.Module):
    """Two branches over one input, joined, and a running sum that every call updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Linear(32, 64)
        self.right = nn.Linear(32, 64)
        self.out = nn.Linear(64, 8)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.calls.add_(1.0)
        joined = torch.relu(self.left(x)) + torch.tanh(self.right(x)).view(-1, 64)
        return {"logits": self.out(joined), "calls": self.calls * 1.0}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


def test_a_module_runs_as_planned(x: torch.Tensor) -> None:
    """Outputs keep the module's structure, and tensors it updates in place are updated, call after call."""
    module, twin = Branches().eval(), Branches().eval()
    model = opweave.compile(module, (x,), scratchpad="3KiB", time_limit=5)
    for _ in range(2):
        got, expected = model(x), twin(x)
        assert torch.allclose(got["logits"], expected["logits"], atol=1e-5)
        assert torch.equal(got["calls"], expected["calls"])
    assert torch.equal(module.calls, twin.calls)
    assert model.verify().ok


def test_resident_weights_take_room(x: torch.Tensor) -> None:
    module = Branches().eval()
    with pytest.raises(Infeasible) as error:
        opweave.compile(module, (x,), scratchpad="3KiB", weights="resident")
    assert error.value.required_bytes > error.value.available_bytes == 3 * 1024
    model = opweave.compile(module, (x,), scratchpad=error.value.required_bytes, weights="resident", time_limit=5)
    assert torch.allclose(model(x)["logits"], Branches().eval()(x)["logits"], atol=1e-5)
    assert not model.plan.streamed


def test_an_exported_program_goes_in(x: torch.Tensor) -> None:
    module = nn.Sequential(nn.Linear(32, 16), nn.ReLU())
    model = opweave.compile(torch.export.export(module, (x,)))
    assert torch.allclose(model(x), module(x), atol=1e-6)


def relu_model() -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Add", ["x", "y"], ["z"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_onnx_takes_and_returns_numpy() -> None:
    """Example inputs bind symbolic dimensions; numpy in, numpy out."""
    value = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    model = opweave.compile(relu_model(), [value])
    (output,) = model(value)
    assert isinstance(output, np.ndarray)
    assert np.array_equal(output, value + np.maximum(value, 0))
    with pytest.raises(ExecutionError, match="x"):
        model(value[:2])


def test_a_saved_plan_is_bound_to_its_model(tmp_path: Path) -> None:
    onnx.save(relu_model(), tmp_path / "model.onnx")
    model = opweave.compile(tmp_path / "model.onnx", dims={"n": 3})
    model.save(tmp_path / "plan.json")
    alone = opweave.load_plan(tmp_path / "plan.json")
    assert alone.plan == model.plan
    with pytest.raises(ExecutionError, match="load_plan"):
        alone(np.zeros((3, 4), np.float32))
    bound = opweave.load_plan(tmp_path / "plan.json", tmp_path / "model.onnx")
    assert np.array_equal(bound(np.ones((3, 4), np.float32))[0], np.full((3, 4), 2, np.float32))
    other = relu_model()
    other.graph.node[1].op_type = "Sub"
    with pytest.raises(PlanError, match="not the one"):
        opweave.load_plan(tmp_path / "plan.json", other)


def test_a_plan_made_from_a_device_is_refused(tmp_path: Path) -> None:
    """A plan from a stranger may say that its model is ``/dev/zero``, whose bytes never end."""
    plan = opweave.compile(relu_model(), dims={"n": 3}).plan
    source = msgspec.structs.replace(plan.source, path="/dev/zero", sha256="0")
    msgspec.structs.replace(plan, source=source).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="is not there"):
        source_model(tmp_path / "plan.json")


def test_a_plan_with_faults_is_not_loaded(tmp_path: Path) -> None:
    model = opweave.compile(relu_model(), dims={"n": 3})
    broken = msgspec.structs.replace(model.plan, instructions=model.plan.instructions[::-1])
    broken.save(tmp_path / "broken.json")
    with pytest.raises(VerificationError, match="faults"):
        opweave.load_plan(tmp_path / "broken.json")


def chain(path: Path, ops: int = 12) -> Path:
    """A plain operator graph: each operator reads the two values before it, and an early one is read at the end."""
    tensors = {"t0": 40, "t1": 24} | {f"t{i + 2}": 8 * (1 + i % 3) for i in range(ops)}
    rows: list[dict[str, Any]] = [
        {"op": "f", "in": [f"t{i}", f"t{i + 1}"], "w": [], "out": f"t{i + 2}"} for i in range(ops)
    ]
    rows[-1]["in"] = [*rows[-1]["in"], "t2"]
    content = {"name": "chain", "unit": "bytes", "weights": {}, "tensors": tensors, "ops": rows}
    path.write_text(json.dumps({**content, "outputs": [f"t{ops + 1}"]}))
    return path


def test_an_operator_graph_is_planned_but_not_executed(tmp_path: Path) -> None:
    model = opweave.compile(chain(tmp_path / "chain.json"), machine="edge-npu")
    assert model.verify().ok
    with pytest.raises(ExecutionError):
        model()


def test_fit_starts_at_the_least_and_falls(tmp_path: Path) -> None:
    path = chain(tmp_path / "chain.json")
    curve = opweave.fit(path, points=5, time_limit=10)
    assert [p.capacity_bytes for p in curve] == sorted({p.capacity_bytes for p in curve})
    traffic = [p.additional_bytes for p in curve]
    assert traffic == sorted(traffic, reverse=True)
    least = curve[0].capacity_bytes
    assert opweave.compile(path, scratchpad=least).verify().additional_bytes == traffic[0]
    with pytest.raises(Infeasible) as error:
        opweave.compile(path, scratchpad=least - 1)
    assert error.value.required_bytes == least


def test_a_stop_that_is_already_set_still_gives_a_plan(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    model = opweave.compile(chain(tmp_path / "chain.json", 40), scratchpad="208B", stop=stop)
    assert model.verify().ok


def test_the_same_input_gives_the_same_plan(tmp_path: Path) -> None:
    def plan() -> Plan:
        model = opweave.compile(chain(tmp_path / "chain.json", 40), scratchpad="208B", deterministic=True)
        return msgspec.structs.replace(model.plan, passes=())

    assert plan().to_json() == plan().to_json()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"colour": "red"}, "machine"),
        ({"time_limit": 0}, "time_limit"),
        ({"weights": "heavy"}, "streamed"),
        ({"residency": "residency/ilp(cuts=3)"}, "cuts"),
        ({"scratchpad": "1 furlong"}, "furlong"),
    ],
)
def test_bad_options_name_what_is_allowed(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        opweave.compile(relu_model(), dims={"n": 1}, **options)


def test_what_cannot_be_read_says_so(x: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="example inputs"):
        opweave.compile(nn.Linear(32, 1))
    with pytest.raises(ModelError, match="int"):
        opweave.compile(3)
    with pytest.raises(ModelError, match="n"):
        opweave.compile(relu_model())


def test_onnx_backend_runs_models_and_nodes() -> None:
    value = np.array([[-1.0, 2.0, 0.0, 3.0]], np.float32)
    backend = opweave.onnx_backend
    assert backend.supports_device("CPU")
    assert not backend.supports_device("CUDA")
    node = helper.make_node("Relu", ["x"], ["y"])
    assert np.array_equal(backend.run_node(node, [value])[0], np.maximum(value, 0))
    model = relu_model()
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    assert np.array_equal(backend.run_model(model, [value])[0], value + np.maximum(value, 0))
    prepared = backend.prepare(model)
    assert np.array_equal(prepared.run([value])[0], value + np.maximum(value, 0))
