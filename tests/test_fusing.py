"""Fused kernels in planned graphs: from ONNX files and PyTorch modules, executed, saved, loaded and explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

pytest.importorskip("triton", reason="Triton exists for Linux only")

import opweave
from opweave import fusing
from opweave.compiler.runtime.reference import run_onnxruntime
from opweave.compiler.verify import verify
from opweave.errors import OptionError, PlanError
from opweave.kernels import registry
from opweave.passes.explain import explanation_text


def gated(columns: int = 32, inner: int = 48, gate_exponent: str = "Sigmoid") -> onnx.ModelProto:
    """A gated linear unit as exporters write it: two matrix products, the gate's swish, their product."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32) / 8, name)
        for name, shape in (("gate", (columns, inner)), ("up", (columns, inner)), ("down", (inner, columns)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["g"], "gate_proj"),
        helper.make_node(gate_exponent, ["g"], ["s"], "swish"),
        helper.make_node("Mul", ["g", "s"], ["a"], "act"),
        helper.make_node("MatMul", ["x", "up"], ["u"], "up_proj"),
        helper.make_node("Mul", ["a", "u"], ["h"], "gating"),
        helper.make_node("MatMul", ["h", "down"], ["y"], "down_proj"),
    ]
    tensor = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 5, columns]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "gated", tensor[:1], tensor[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_an_onnx_model_reaches_a_kernel() -> None:
    """The operator in the plan is the launch; executed in the scratchpad it gives what onnxruntime does."""
    model = gated()
    planned = opweave.compile(model, kernels="gated_linear")
    targets = [op.target for op in planned.plan.graph.ops]
    assert "opweave.gated_linear.default" in targets
    assert len(targets) == 2
    assert verify(planned.plan).ok
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(planned(x)[0], run_onnxruntime(model, [x])[0], rtol=1e-4, atol=1e-5)


def test_an_explanation_names_the_nodes_that_a_launch_replaces() -> None:
    explanation = opweave.explain(opweave.compile(gated(), kernels="gated_linear"))
    (launch,) = explanation.launches
    assert launch.kernel == "gated_linear"
    assert all(name in launch.replaced for name in ("gate_proj", "swish", "act", "up_proj", "gating"))
    assert "fused      gated_linear instead of" in explanation_text(explanation)


def test_another_activation_is_no_match() -> None:
    planned = opweave.compile(gated(gate_exponent="Tanh"), kernels="gated_linear")
    assert not any(op.target.startswith("opweave.") for op in planned.plan.graph.ops)


class Block(nn.Module):
    """A residual addition and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum and its normalisation."""
        hidden = x + residual
        return hidden, self.norm(hidden)


def test_a_saved_plan_with_launches_is_loaded_with_its_model(tmp_path: Path) -> None:
    block, inputs = Block().eval(), (torch.randn(4, 64), torch.randn(4, 64))
    planned = opweave.compile(block, inputs, kernels="add_rms_norm")
    path = tmp_path / "plan.json"
    planned.save(path)
    loaded = opweave.load_plan(path, (block, inputs))
    for one, other in zip(loaded(*inputs), block(*inputs), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(PlanError, match="not the one"):
        opweave.load_plan(path, (nn.Linear(64, 64).eval(), (torch.randn(4, 64),)))


def test_auto_launches_what_is_predicted_to_gain_on_the_machine() -> None:
    """Planned graphs run every operator by itself, so one pass over memory beats several."""
    block, inputs = Block().eval(), (torch.randn(4096, 64), torch.randn(4096, 64))
    planned = opweave.compile(block, inputs, kernels="auto", machine="h100-sxm")
    assert [op.target for op in planned.plan.graph.ops] == ["opweave.add_rms_norm.default"]


def test_without_being_asked_no_kernel_is_launched() -> None:
    planned = opweave.compile(Block().eval(), (torch.randn(4, 64), torch.randn(4, 64)))
    assert not any(op.target.startswith("opweave.") for op in planned.plan.graph.ops)


def test_a_broken_kernel_of_another_package_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"add_rms_norm": registry._places()["add_rms_norm"], "broken": "no_such_package.kernel:KERNEL"}
    monkeypatch.setattr(registry, "_places", lambda: places)
    registry.load.cache_clear()
    with pytest.warns(UserWarning, match="kernel 'broken' is left out"):
        fusing.rules("all")
    with pytest.raises(OptionError, match="kernel 'broken' cannot be loaded"):
        fusing.rules("broken")


def test_a_machine_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="there is no triton here"):
        opweave.compile(Block().eval(), (torch.randn(4, 64), torch.randn(4, 64)), kernels="all")
    assert fusing.checked("auto") == "auto"
