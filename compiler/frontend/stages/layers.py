"""Layers of a program: their graphs for F, I and W, and the bytes that pass between these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from ....errors import ModelError
from ..dynamo.halves import Half, StageGraphs
from ..dynamo.halves import split as split_backward
from ..dynamo.halves_joint import Place, PlaceKind
from ..dynamo.joint_costs import nbytes_of
from .capture import Program, attribute
from .cuts import Cut, Tie, ties
from .heavy import is_heavy
from .split import LayerModule, layers_between

__all__ = ["Layer", "layers"]


@dataclass(frozen=True)
class Layer:
    """One layer, with the graphs of its F, I and W; ``None`` for a half that has nothing to do.

    ``until_input_gradient_bytes`` are held from F to I alone, ``until_weight_gradient_bytes`` from F to W, and
    ``between_gradients_bytes`` from I to W. ``parameters`` are those that no layer before has, by name, and
    ``buffers`` likewise; ``shared`` names what other layers have too. Layers with the same ``graphs`` object are alike.
    """

    name: str
    graphs: StageGraphs
    until_input_gradient_bytes: int
    until_weight_gradient_bytes: int
    between_gradients_bytes: int
    parameters: Mapping[str, torch.nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    shared: tuple[str, ...]

    @property
    def halves(self) -> tuple[fx.GraphModule | None, fx.GraphModule | None, fx.GraphModule | None]:
        """Graphs of F, I and W."""
        back = self.graphs.input_gradient, self.graphs.weight_gradient
        first, second = (None if half is None else half.module for half in back)
        return self.graphs.forward.module, first, second


def layers(program: Program, cuts: Sequence[Cut]) -> tuple[Layer, ...]:
    """The layers between ``cuts``; those that are alike are traced once.

    What every stage repeats for itself, such as a mask, is in no layer: neither its time nor its bytes.

    Raises:
        ModelError: a layer cannot be differentiated.
    """
    modules = layers_between(program, cuts)
    names = _names(modules)
    known: dict[object, StageGraphs] = {}
    saved = []
    for name, layer in zip(names, modules, strict=True):
        key = _likeness(program, layer)
        if key not in known:
            known[key] = _graphs(program, layer, name)
        saved.append((known[key], _Saved.of(known[key], layer)))
    tied = ties(program)
    first_uses = {id(attribute(program.module, node)): index for index, node in _attributes(modules)}
    return tuple(
        _layer(program, index, name, module, graphs, own, [one for _, one in saved], tied, first_uses)
        for index, (name, module, (graphs, own)) in enumerate(zip(names, modules, saved, strict=True))
    )


@dataclass(frozen=True)
class _Saved:
    """Bytes that a layer holds: by itself, as ``(until I, until W, I to W)``; and of values that pass cuts, by name,
    ``(bytes, whether until W)``: given to it, or its results.
    """

    own: tuple[int, int, int]
    given: Mapping[str, tuple[int, bool]]
    results: Mapping[str, tuple[int, bool]]

    @classmethod
    def of(cls, graphs: StageGraphs, layer: LayerModule) -> _Saved:
        sizes = _sizes(graphs)
        returned = graphs.forward.module.graph.output_node().args[0]
        assert isinstance(returned, tuple)
        result_of = {node.name: place for place, node in reversed(list(enumerate(returned[: graphs.outputs])))}
        given, results, own = {}, {}, [0, 0, 0]
        for name, place in graphs.held.items():
            until_weight = name in graphs.kept
            if place is not None and place.kind is PlaceKind.INPUT:
                if place.index < layer.crossing:
                    given[layer.given[place.index].name] = sizes[name], until_weight
            elif name in result_of:
                results[layer.wanted[result_of[name]].name] = sizes[name], until_weight
            elif not _is_static(place):
                own[until_weight] += sizes[name]
        own[2] = sum(
            sizes[name] for name, place in graphs.kept.items() if name not in graphs.held and not _is_static(place)
        )
        return cls((own[0], own[1], own[2]), given, results)


def _is_static(place: Place | None) -> bool:
    return place is not None and place.kind in (PlaceKind.PARAMETER, PlaceKind.BUFFER)


def _sizes(graphs: StageGraphs) -> dict[str, int]:
    """Bytes of every value that one graph hands to another, or that they are given."""
    halves: list[Half | None] = [graphs.forward, graphs.input_gradient, graphs.weight_gradient]
    nodes = [node for half in halves if half is not None for node in half.module.graph.nodes]
    return {node.name: nbytes_of(node) for node in nodes}


def _layer(
    program: Program,
    index: int,
    name: str,
    module: LayerModule,
    graphs: StageGraphs,
    own: _Saved,
    all_saved: Sequence[_Saved],
    tied: Sequence[Tie],
    first_uses: Mapping[int, int],
) -> Layer:
    until = [own.own[0], own.own[1]]
    elsewhere = {given for place, other in enumerate(all_saved) if place != index for given in other.given}
    for value, (nbytes, until_weight) in (*own.given.items(), *own.results.items()):
        if value in own.given or value not in elsewhere:  # else the layer that it is given to counts it
            until[until_weight] += nbytes
    parameters, buffers = {}, {}
    for path, parameter in module.module.named_parameters():
        if first_uses[id(parameter)] == index:
            parameters[path] = parameter
    for path, buffer in module.module.named_buffers():
        if first_uses.get(id(buffer)) == index:
            buffers[path] = buffer
    reads = {node for node in module.body for node in node.all_input_nodes}
    targets = {str(node.target) for node in reads if node.op == "get_attr"}
    shared = tuple(tie.name for tie in tied if targets & {tie.name, *tie.others})
    return Layer(name, graphs, until[0], until[1], own.own[2], parameters, buffers, shared)


def _attributes(modules: Sequence[LayerModule]) -> Iterator[tuple[int, fx.Node]]:
    """Attributes that layers read, the last layer first."""
    for index, layer in reversed(list(enumerate(modules))):
        for node in layer.body:
            yield from ((index, read) for read in node.all_input_nodes if read.op == "get_attr")


def _graphs(program: Program, layer: LayerModule, name: str) -> StageGraphs:
    tensors = (*layer.module.parameters(), *layer.module.buffers())
    mode = next((value.fake_mode for value in tensors if isinstance(value, FakeTensor)), None)
    with mode or FakeTensorMode(allow_non_fake_inputs=True):  # one mode for all that is fake
        values = [_like(node.meta["val"], node in program.differentiable) for node in layer.given]
    try:
        return split_backward(layer.module, values)
    except ModelError as error:
        raise ModelError(f"layer {name!r} of {program.name}: {error.message}", hint=error.hint) from error


def _like(value: torch.Tensor, has_gradient: bool) -> torch.Tensor:
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device, requires_grad=has_gradient
    )


def _likeness(program: Program, layer: LayerModule) -> object:
    """Equal for layers that compute the same of tensors that are alike, with parameters of their own."""
    index: dict[fx.Node, int] = {}
    lines: list[object] = []
    for node in layer.module.graph.nodes:
        index[node] = len(index)
        arguments = pytree.tree_map_only(fx.Node, lambda read: f"%{index[read]}", (node.args, node.kwargs))
        if node.op == "get_attr":
            lines.append(_look(attribute(layer.module, node), len(lines)))
        elif node.op == "placeholder":
            lines.append(_look(node.meta.get("val"), None))
        else:
            lines.append((node.op, str(node.target), repr(arguments)))
    needs = tuple(node in program.differentiable for node in layer.given)
    return (*lines, needs, layer.crossing)


def _look(value: Any, otherwise: object) -> object:
    if isinstance(value, torch.Tensor):
        is_parameter = isinstance(value, torch.nn.Parameter)
        return str(value.dtype), tuple(value.shape), tuple(value.stride()), value.requires_grad, is_parameter
    return "graph", otherwise


def _names(modules: Sequence[LayerModule]) -> tuple[str, ...]:
    """The submodule that all products of a layer are in, numbered where several layers are in one."""
    found = []
    for layer in modules:
        heavy = [node for node in layer.body if is_heavy(node)] or list(layer.body)
        paths = [_path(node) for node in heavy]
        same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path.split(".") for path in paths), strict=False))
        found.append(".".join(parts[0] for parts in same) or paths[0] or heavy[0].name)
    total, seen = Counter(found), Counter[str]()
    names = []
    for name in found:
        seen[name] += 1
        names.append(f"{name} ({seen[name]})" if total[name] > 1 else name)
    return tuple(names)


def _path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""
