"""A ``GraphModule`` of ATen calls into a graph: follow it on fake tensors and write down what happens to storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode

from ....errors import ModelError
from ...graph import Graph, Role
from ..program import ImportedGraph
from .builder import GraphBuilder
from .follow import Follower
from .recorder import Recorder
from .sources import fake_input, place_weights

__all__ = ["Converted", "Literal", "convert", "from_graph_module"]


@dataclass(frozen=True)
class Literal:
    """A placeholder that is no tensor: its value is fixed in the graph."""

    value: Any


@dataclass(frozen=True)
class Converted:
    """A graph, the values of its sources, and its results: a tensor's position in ``graph.outputs``, or a literal."""

    graph: Graph
    weights: Mapping[str, torch.Tensor]
    input_names: tuple[str, ...]
    results: tuple[int | Literal, ...]
    structure: pytree.TreeSpec

    def assemble(self, outputs: Sequence[torch.Tensor]) -> list[Any]:
        """The results in order, given one tensor for each of ``graph.outputs``."""
        return [outputs[result] if isinstance(result, int) else result.value for result in self.results]


def from_graph_module(
    module: torch.fx.GraphModule,
    *,
    name: str,
    input_names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    output_names: Sequence[str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> ImportedGraph:
    """The graph of a module whose nodes are ATen calls.

    Args:
        module: its first ``len(input_names)`` placeholders are the inputs and carry an example in ``meta["val"]``; the
            others are weights. ``meta["origin"]`` of a node, if there, becomes its operator's origin.
        name: name of the graph.
        input_names: names of the graph's input tensors, in the order of the placeholders.
        weights: value of each other placeholder, by the placeholder's name.
        output_names: names of the tensors that the module returns, in order; nodes' own names where ``None``. A tensor
            that exists under another name already, such as a returned input, keeps it.
        roles: role of a weight, by the placeholder's name; ``Role.WEIGHT`` where not given.

    Raises:
        ModelError: symbolic shapes, tensors that are not plain, a value that shapes cannot be known without.
        UnsupportedOperator: a call that is no ATen operator, draws random numbers, or writes in a way unknown here.
    """
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    missing = [p for p in placeholders[len(input_names) :] if p not in weights]
    if missing or len(placeholders) < len(input_names):
        raise ModelError(f"module {name!r} has placeholders without a value: {', '.join(missing) or 'too few'}")
    inputs = dict(zip(placeholders, input_names, strict=False))
    held = {p: weights[p] for p in placeholders[len(input_names) :]}
    converted = convert(module, name, inputs, held, roles or {}, {}, output_names=output_names)

    def flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        values = dict(zip(input_names, args, strict=False)) | dict(kwargs)
        if len(args) > len(input_names) or set(values) != set(input_names):
            raise ModelError(f"model {name!r} takes the inputs {', '.join(input_names)}; got {', '.join(values)}")
        return [values[n] for n in input_names]

    def unflatten(outputs: list[torch.Tensor]) -> Any:
        return pytree.tree_unflatten(converted.assemble(outputs), converted.structure)

    return ImportedGraph(converted.graph, converted.weights, converted.input_names, flatten, unflatten)


def convert(
    module: torch.fx.GraphModule,
    name: str,
    inputs: Mapping[str, str],
    weights: Mapping[str, torch.Tensor],
    roles: Mapping[str, Role],
    literals: Mapping[str, Any],
    *,
    updated: Sequence[str] = (),
    output_names: Sequence[str] | None = None,
) -> Converted:
    """Follow ``module`` and collect its graph.

    Args:
        module: placeholders and calls.
        name: name of the graph.
        inputs: name of the input tensor for each input placeholder, in call order.
        weights: value of each weight placeholder.
        roles: role of a weight where it is not ``Role.WEIGHT``.
        literals: value of each placeholder that is no tensor.
        updated: placeholders whose new values the module returns first, before its results.
        output_names: names for the results.
    """
    builder = GraphBuilder()
    mode = FakeTensorMode()
    nodes = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    values: dict[str, Any] = dict(literals)
    names = []
    for placeholder, wanted in inputs.items():
        values[placeholder] = fake_input(mode, wanted, nodes[placeholder].meta.get("val"))
        names.append(builder.add_base(values[placeholder], wanted, Role.INPUT))
    used = {p: w for p, w in weights.items() if nodes[p].users}
    placed = place_weights(builder, mode, used, {p: roles.get(p, Role.WEIGHT) for p in used})
    values.update(placed.fakes)
    recorder = Recorder(builder, _wanted_names(module, output_names, len(updated)))
    follower = Follower(recorder, mode)
    with mode, torch.no_grad():
        returned = follower.run(module, [values.get(p) for p in nodes])
        leaves, structure = pytree.tree_flatten(returned[len(updated) :] if updated else returned)
        changes = [(values[p], new) for p, new in zip(updated, returned, strict=False)]
        outputs = recorder.finish(changes, leaves)
    results: list[int | Literal] = []
    tensors: list[str] = []
    for output, leaf in zip(outputs, leaves, strict=True):
        results.append(Literal(leaf) if output is None else len(tensors))
        tensors.extend([] if output is None else [output])
    graph = builder.finish(name, names, tensors)
    kept = {t: v for t, v in {**placed.values, **follower.constants}.items() if t in graph.buffers}
    return Converted(graph, kept, tuple(names), tuple(results), structure)


def _wanted_names(
    module: torch.fx.GraphModule, output_names: Sequence[str] | None, skipped: int
) -> dict[torch.fx.Node, str]:
    output = next(node for node in module.graph.nodes if node.op == "output")
    leaves = pytree.tree_leaves(output.args[0])[skipped:]
    wanted: dict[torch.fx.Node, str] = {}
    for leaf, name in zip(leaves, output_names or (), strict=False):
        if isinstance(leaf, torch.fx.Node) and leaf.op == "call_function":
            wanted.setdefault(leaf, name)
    return wanted
