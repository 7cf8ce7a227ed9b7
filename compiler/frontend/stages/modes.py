"""Stages in evaluation: an exported program has its mode written into its calls, which `train` and `eval` switch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["StageModule"]

#: The operand that says whether a call trains, or drops out, and what it is in evaluation; by the name of the operator.
_SWITCHES: Mapping[str, tuple[str, Any]] = {
    "alpha_dropout": ("train", False),
    "batch_norm": ("training", False),
    "dropout": ("train", False),
    "feature_alpha_dropout": ("train", False),
    "feature_dropout": ("train", False),
    "gru": ("train", False),
    "lstm": ("train", False),
    "native_dropout": ("train", False),
    "rnn_relu": ("train", False),
    "rnn_tanh": ("train", False),
    "rrelu": ("training", False),
    "rrelu_with_noise": ("training", False),
    "scaled_dot_product_attention": ("dropout_p", 0.0),
}


class StageModule(fx.GraphModule):
    """A stage as a graph that was captured in training, and can be evaluated: ``eval`` takes out dropout, and has batch
    norms read their buffers instead of updating them.

    What a model does otherwise while it trains stays. A stage captured in evaluation stays in it.
    """

    def train(self, mode: bool = True) -> StageModule:
        """Run the graph as captured, or, where ``mode`` is false, the one for evaluation."""
        training: fx.Graph | None = self.__dict__.get("_training_graph")
        if mode and training is not None:
            self.graph = training
            del self.__dict__["_training_graph"]
        elif not mode and training is None:
            self.__dict__["_training_graph"] = self.graph
            self.graph = _evaluation(self.graph)
        super().train(mode)
        return self


def _evaluation(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph(owning_module=graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            made.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif not _counts_batches(node):
            copies[node] = made.node_copy(node, copies.__getitem__)
            _switch(copies[node])
    made.lint()
    return made


def _counts_batches(node: fx.Node) -> bool:
    """Whether ``node`` is how a batch norm in training counts its calls."""
    if node.users or node.target not in (torch.ops.aten.add_.Tensor, torch.ops.aten.copy_.default):
        return False
    counter = node.args[0]
    return isinstance(counter, fx.Node) and str(counter.target).endswith("num_batches_tracked")


def _switch(node: fx.Node) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    found = _SWITCHES.get(target._schema.name.removeprefix("aten::").rstrip("_"))
    if found is None:
        return
    name, value = found
    for place, argument in enumerate(target._schema.arguments):
        if argument.name != name:
            continue
        if place < len(node.args):
            node.args = (*node.args[:place], value, *node.args[place + 1 :])
        elif name in node.kwargs:
            node.kwargs = {**node.kwargs, name: value}
