"""What cannot be planned ends in one error that names the node, and says what would help."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from opweave.compiler.frontend.fx import from_exported, from_graph_module, from_module
from opweave.errors import ModelError, UnsupportedOperator
from tests.compiler.frontend.eager_check import Lambda

UNSUPPORTED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "random": (lambda m, x: x + torch.rand(4), "node 'rand' calls aten.rand.default", "inputs"),
    "training dropout": (lambda m, x: nn.functional.dropout(x, 0.5), "node 'dropout'", r"eval\(\)"),
    "random in place": (lambda m, x: nn.functional.dropout(x + 1, 0.5, True, True), "node 'dropout_'", r"eval\(\)"),
    "control flow": (
        lambda m, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
        "node 'cond' is the higher-order operator cond",
        "exported",
    ),
    "resize": (lambda m, x: (x + 1).resize_(2, 2), "node 'resize_'", "functional form"),
    "hidden write": (nn.InstanceNorm1d(4, track_running_stats=True), "node 'instance_norm'", r"eval\(\)"),
}


@pytest.mark.parametrize(("model", "words", "hint"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_operators_without_a_lowering_are_named(model: Any, words: str, hint: str) -> None:
    module = model if isinstance(model, nn.Module) else Lambda(model)
    with pytest.raises(UnsupportedOperator, match=f"(?s){words}.*hint: .*{hint}"):
        from_module(module, (torch.randn(2, 4, 4),))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "nonzero": (lambda m, x: x.nonzero(), r"node 'nonzero' .* depends on values .*hint: .*fixed shapes"),
    "item": (lambda m, x: x * x.sum().item(), r"node 'item' .* depends on values"),
    "mask": (lambda m, x: x[x > 0], r"node 'index' .* depends on values"),
    "sparse": (lambda m, x: x[0].to_sparse() @ x[1].mT, r"node 'to_sparse' .*sparse_coo.*hint: .*dense"),
    "conjugate": (lambda m, x: torch.view_as_complex(x.reshape(4, 2, 2)).conj() * 2, r"'_conj' .*hint: .*resolve_conj"),
    "branch on a value": (lambda m, x: x if x.sum() > 0 else -x, r"torch.export cannot trace model 'Lambda'"),
    "wrong shapes": (lambda m, x: x @ torch.ones(3), r"torch.export cannot trace model 'Lambda'"),
}


@pytest.mark.parametrize(("function", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_values_and_layouts_that_cannot_be_planned_are_named(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){words}"):
        from_module(Lambda(function), (torch.randn(2, 2, 4),))


def test_symbolic_dimensions_are_named() -> None:
    batch = {0: Dim("batch", min=1, max=9)}
    program = torch.export.export(nn.ReLU(), (torch.randn(2, 3),), dynamic_shapes={"input": batch})
    with pytest.raises(ModelError, match=r"(?s)dimension 0 of input 'input' is symbolic.*hint: .*dynamic_shapes"):
        from_exported(program)


def test_sparse_weights_are_refused() -> None:
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta["val"] = torch.empty(4)
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, weight)))
    with pytest.raises(ModelError, match=r"weight 'weight' is not a plain strided tensor"):
        from_graph_module(
            torch.fx.GraphModule(nn.Module(), graph),
            name="sparse",
            input_names=["x"],
            weights={"weight": torch.ones(4).to_sparse()},
        )


def build(calls: Callable[[torch.fx.Graph, torch.fx.Node], Any]) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    graph.output(calls(graph, x))
    return torch.fx.GraphModule(nn.Sequential(nn.ReLU()), graph)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (lambda g, x: g.call_module("0", (x,)), "is a call_module of 0"),
        (lambda g, x: g.call_method("relu", (x,)), "is a call_method of relu"),
        (lambda g, x: g.call_function(torch.relu, (x,)), "is a call_function of .*relu"),
        (lambda g, x: g.call_function(operator.add, (x, 1)), "is a call_function of .*add"),
        (lambda g, x: g.call_function(torch.ops.aten.mm.default, (x, x)), "'mm_default' calls aten.mm.*torch rejects"),
    ],
)
def test_modules_that_are_no_aten_graphs_are_refused(calls: Callable[..., Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        from_graph_module(build(calls), name="graph", input_names=["x"], weights={})


def test_placeholders_without_a_value_are_named() -> None:
    with pytest.raises(ModelError, match="placeholders without a value: x"):
        from_graph_module(build(lambda g, x: x), name="graph", input_names=[], weights={})
    with pytest.raises(ModelError, match="placeholders"):
        from_graph_module(build(lambda g, x: x), name="graph", input_names=["x", "y"], weights={})


def test_inputs_without_an_example_are_named() -> None:
    module = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(ModelError, match=r"(?s)input 'x' has no example.*hint: .*meta"):
        from_graph_module(module, name="graph", input_names=["x"], weights={})


def test_calls_of_another_structure_are_refused() -> None:
    model = Lambda(lambda m, x, *, scale, more: x * scale + more["a"])
    imported = from_module(model, (torch.ones(2),), {"scale": 2, "more": {"a": torch.ones(2)}})
    assert imported.flatten is not None
    x, more = torch.ones(2), {"a": torch.zeros(2)}
    assert imported.flatten((x,), {"more": more, "scale": 2}) == [x, more["a"]]
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x,), {"scale": 3, "more": more}, "argument .*scale.* is 3, but the model was imported with 2"),
        ((x,), {"scale": x, "more": more}, "imported with 2"),
        ((3,), {"scale": 2, "more": more}, "is a int; a tensor was imported"),
        ((x, x), {"scale": 2, "more": more}, "structure"),
        ((x,), {"scale": 2}, "structure"),
        ((x,), {"scale": 2, "more": more, "extra": 1}, "structure"),
    ]
    for args, kwargs, words in wrong:
        with pytest.raises(ModelError, match=f"(?s){words}"):
            imported.flatten(args, kwargs)
