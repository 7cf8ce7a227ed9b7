"""GraphModules of ATen calls, as the ONNX importer hands them over."""

from __future__ import annotations

from operator import getitem
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.fx import from_exported, from_graph_module
from opweave.compiler.graph import Role
from opweave.compiler.runtime.custom_ops import format_spec
from tests.compiler.frontend.eager_check import interpret


def trace() -> torch.fx.GraphModule:
    def forward(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = torch.nn.functional.linear(x, w).relu()
        first, second = hidden.chunk(2, 1)
        return first + y, second, x, torch.var_mean(hidden, 1)[1]

    return make_fx(forward, tracing_mode="fake")(torch.empty(2, 3), torch.empty(2, 2), torch.empty(4, 3))


def test_names_order_and_roles() -> None:
    weight = torch.randn(4, 3)
    imported = from_graph_module(
        trace(),
        name="net",
        input_names=["in/a", "in:b"],
        weights={"w_1": weight},
        output_names=["sum", "second", "same", "mean"],
    )
    graph = imported.graph
    assert graph.name == "net"
    assert imported.input_names == ("in/a", "in:b")
    assert graph.outputs[::3] == ("sum", "mean")
    assert graph.outputs[2] == "in/a"
    assert graph.tensor["w_1"].role is Role.WEIGHT
    assert graph.tensor[graph.outputs[1]].buffer == "relu"
    x, y = torch.randn(2, 3), torch.randn(2, 2)
    result, _ = interpret(imported, (x,), {"in:b": y})
    hidden = (x @ weight.t()).relu()
    torch.testing.assert_close(tuple(result), (hidden[:, :2] + y, hidden[:, 2:], x, hidden.mean(1)))


def test_roles_can_be_given() -> None:
    roles = {"w_1": Role.OPTIMIZER_STATE}
    imported = from_graph_module(
        trace(), name="net", input_names=["a", "b"], weights={"w_1": torch.ones(4, 3)}, roles=roles
    )
    assert imported.graph.tensor["w_1"].role is Role.OPTIMIZER_STATE
    assert list(imported.weights) == ["w_1"]


def test_tensors_that_the_module_holds_are_constants() -> None:
    held = torch.arange(3.0)
    module = make_fx(lambda x: x * held + held)(torch.empty(2, 3))
    imported = from_graph_module(module, name="net", input_names=["x"], weights={})
    (constant,) = (t for t in imported.graph.buffers.values() if t.role is Role.CONSTANT)
    assert torch.equal(imported.weights[constant.name], held)
    x = torch.randn(2, 3)
    assert torch.equal(interpret(imported, (x,))[0], x * held + held)


def test_in_place_calls_need_no_functionalisation() -> None:
    module = make_fx(lambda x: x.add_(1).t().mul_(x.t()))(torch.empty(2, 3))
    imported = from_graph_module(module, name="net", input_names=["x"], weights={})
    x = torch.randn(2, 3)
    result, updated = interpret(imported, (x,))
    assert torch.equal(updated["x"], (x + 1) * (x + 1))
    assert torch.equal(result, updated["x"].t())


def test_custom_operators_return_lists() -> None:
    """The operator that stands for one ONNX node takes and returns lists of tensors."""
    specs = [format_spec((2, 3), torch.float32), format_spec((5,), torch.int64)]
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    call = graph.call_function(torch.ops.opweave.opaque.default, ([x, x], "Two", "node_7", specs))
    call.meta["origin"] = "node_7"
    second = graph.call_function(torch.ops.aten.select.int, (graph.call_function(getitem, (call, 1)), 0, 3))
    graph.output((second, graph.call_function(torch.ops.aten.relu.default, (graph.call_function(getitem, (call, 0)),))))
    imported = from_graph_module(
        torch.fx.GraphModule(nn.Module(), graph), name="net", input_names=["x"], weights={}, output_names=["a", "b"]
    )
    op, relu = imported.graph.ops
    assert op.body == f"opweave.opaque.default([%0, %0], 'Two', 'node_7', ['{specs[0]}', '{specs[1]}'])"
    assert (op.inputs, len(op.outputs), op.origin) == (("x",), 2, "node_7")
    assert relu.inputs == op.outputs[:1]
    assert imported.graph.tensor["a"].buffer == op.outputs[1]
    assert imported.graph.tensor["a"].offset_bytes == 24
    assert imported.graph.outputs == ("a", "b")


def test_arguments_given_by_name_are_understood() -> None:
    graph = torch.fx.Graph()
    x, mean, variance = (graph.placeholder(name) for name in ("x", "mean", "variance"))
    x.meta["val"] = torch.empty(5, 3)
    options: dict[str, Any] = {"weight": None, "bias": None, "running_mean": mean, "running_var": variance}
    options |= {"training": True, "momentum": 0.5, "eps": 0.0, "cudnn_enabled": False}
    normalised = graph.call_function(torch.ops.aten.batch_norm.default, (x,), options)
    graph.call_function(torch.ops.aten.add_.Tensor, (), {"other": 1, "self": mean, "alpha": 2})
    graph.output(normalised)
    imported = from_graph_module(
        torch.fx.GraphModule(nn.Module(), graph),
        name="net",
        input_names=["x"],
        weights={"mean": torch.zeros(3), "variance": torch.ones(3)},
    )
    value = torch.randn(5, 3)
    result, updated = interpret(imported, (value,))
    torch.testing.assert_close(updated["mean"], value.mean(0) / 2 + 2)
    torch.testing.assert_close(result, (value - value.mean(0)) / value.std(0, correction=0))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's use of its own deprecated class
def test_results_that_nobody_uses_do_not_take_room() -> None:
    """Decomposed pooling and normalisation return indices and statistics too; only what is used is computed."""
    module = torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.LayerNorm([4, 4]))
    x = torch.randn(1, 2, 8, 8)
    program = torch.export.export(module, (x,)).run_decompositions()
    graph = from_exported(program).graph
    assert [(op.target, len(op.outputs)) for op in graph.ops] == [
        ("aten.max_pool2d.default", 1),
        ("aten.layer_norm.default", 1),
    ]
    pooled = torch.export.export(torch.nn.MaxPool2d(2, return_indices=True), (x,)).run_decompositions()
    assert [len(op.outputs) for op in from_exported(pooled).graph.ops] == [2]
