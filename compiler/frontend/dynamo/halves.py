"""A stage's backward in two graphs: one for the gradients of its inputs (I), one for those of its weights (W).

The joint graph of forward and backward is cut where the least bytes pass, see ``halves_cut``. F hands over what I or W
need; I hands over what W needs and has not got from F. What I alone needs is free when I has run, which an eager
backward that is split cannot do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ....errors import InternalError
from .halves_cut import Cut, Dependencies, least_bytes
from .halves_joint import Decompositions, JointGraph, Place, PlaceKind, joint_graph
from .halves_rewrite import rewritten

__all__ = ["Half", "StageGraphs", "split"]


@dataclass(frozen=True)
class Half:
    """One graph, called with flat arguments, and what it takes: a place, or the name of a value that is held.

    ``gives`` are the names of the values that it hands over, its last results.
    """

    module: fx.GraphModule
    takes: tuple[Place | str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class StageGraphs:
    """F, I and W of a module on inputs of certain shapes.

    ``forward`` returns the outputs, new values of what ``updates`` names, and what it gives. ``input_gradient``
    returns gradients of the inputs in ``input_gradients``, by index among the tensors, and is ``None`` where there are
    none; ``weight_gradient`` those of the parameters in ``parameter_gradients``.

    ``differentiable`` are the outputs, by index, that have a gradient; ``output_gradients`` are like these, and
    ``examples`` like the outputs, but fake tensors.

    ``held`` says where each value that passes the end of F comes from (a place, or ``None`` for what F gives), and
    ``kept`` likewise of what passes the end of I. ``result``, ``constants`` and ``is_tensor`` are the joint graph's.
    """

    forward: Half
    input_gradient: Half | None
    weight_gradient: Half | None
    held: Mapping[str, Place | None]
    kept: Mapping[str, Place | None]
    updates: tuple[Place, ...]
    inputs: int
    input_gradients: tuple[int, ...]
    parameter_gradients: tuple[str, ...]
    differentiable: frozenset[int]
    output_gradients: Mapping[int, torch.Tensor]
    examples: tuple[torch.Tensor, ...]
    result: pytree.TreeSpec
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    @property
    def outputs(self) -> int:
        """How many tensors the module returns."""
        return sum(self.is_tensor)


def split(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    decompositions: Decompositions | None = None,
) -> StageGraphs:
    """``module`` on such arguments as three graphs; what requires a gradient is what does so now.

    Raises:
        ModelError: it cannot be traced or split; the message says why.
    """
    joint = rewritten(joint_graph(module, args, kwargs, decompositions=decompositions))
    found = Dependencies(joint)
    return _Writer(joint, found, least_bytes(found)).graphs()


class _Writer:
    """Copies nodes of the joint graph into the three."""

    def __init__(self, joint: JointGraph, found: Dependencies, cut: Cut) -> None:
        self.joint, self.found = joint, found
        self.behind_forward = frozenset(cut.behind_forward)
        self.behind_input_gradient = frozenset(cut.behind_input_gradient)
        self.runs: set[fx.Node] = set()

    def graphs(self) -> StageGraphs:
        joint = self.joint
        weight = list(joint.parameter_gradients.values())
        kept = self._taken(weight, self.behind_input_gradient)
        inputs = list(joint.input_gradients.values())
        made = [node for node in kept if node not in self.behind_forward and not self._is_output_gradient(node)]
        held = self._taken([*inputs, *made], self.behind_forward)
        passing = [node for node in kept if node in self.behind_forward]
        held = self._in_order([*(node for node in held if not self._is_output_gradient(node)), *passing])
        given = [node for node in held if node not in joint.places]
        forward = self._half([*joint.outputs, *joint.updates.values()], given, frozenset())
        input_half = self._half(inputs, made, frozenset(held)) if inputs else None
        weight_half = self._half(weight, [], frozenset(kept)) if weight else None
        return StageGraphs(
            forward,
            input_half,
            weight_half,
            {node.name: joint.places.get(node) for node in held},
            {node.name: joint.places.get(node) for node in kept},
            tuple(joint.places[node] for node in joint.updates),
            sum(place.kind is PlaceKind.INPUT for place in joint.places.values()),
            tuple(joint.input_gradients),
            tuple(joint.parameter_gradients),
            joint.differentiable,
            {p.index: n.meta["val"] for n, p in joint.places.items() if p.kind is PlaceKind.OUTPUT_GRADIENT},
            tuple(node.meta["val"] for node in joint.outputs),
            joint.result,
            joint.constants,
            joint.is_tensor,
        )

    def _is_output_gradient(self, node: fx.Node) -> bool:
        place = self.joint.places.get(node)
        return place is not None and place.kind is PlaceKind.OUTPUT_GRADIENT

    def _in_order(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return sorted(set(nodes), key=self.found.position.__getitem__)

    def _needed(self, targets: Iterable[fx.Node], available: frozenset[fx.Node]) -> list[fx.Node]:
        """What has to run, or to be given, for ``targets``; behind what is ``available`` nothing does."""
        found: set[fx.Node] = set()
        pending = list(targets)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += [] if node in available else node.all_input_nodes
        return self._in_order(found)

    def _taken(self, targets: Iterable[fx.Node], available: frozenset[fx.Node]) -> list[fx.Node]:
        """What of the ``available`` ``targets`` are computed from, and the gradients of outputs."""
        needed = self._needed(targets, available)
        return [node for node in needed if node in available or self._is_output_gradient(node)]

    def _half(self, results: list[fx.Node], gives: list[fx.Node], available: frozenset[fx.Node]) -> Half:
        needed = self._needed([*results, *gives], available)
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        takes: list[Place | str] = []
        for node in needed:
            if node in available or node.op == "placeholder":
                values[node] = graph.placeholder(node.name)
                values[node].meta = dict(node.meta)
                place = self.joint.places.get(node)
                takes.append(node.name if node in available or place is None else place)
        for node in self._late(needed, values):
            values[node] = graph.node_copy(node, values.__getitem__)
            self._count(node)
        graph.output(tuple(values[node] for node in (*results, *gives)))
        graph.lint()
        return Half(fx.GraphModule(self.joint.module, graph), tuple(takes), tuple(node.name for node in gives))

    def _late(self, needed: list[fx.Node], values: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
        """What has to run in the order of the joint graph, but forward operators of I and W where they are read."""
        is_backward = any(node in self.found.backward for node in needed)
        order: dict[fx.Node, None] = {}
        for node in needed:
            if node in values or (is_backward and node not in self.found.backward):
                continue
            pending, before = list(node.all_input_nodes), []
            while pending:
                read = pending.pop()
                if read not in values and read not in order and read not in before:
                    before.append(read)
                    pending += read.all_input_nodes
            order.update(dict.fromkeys(self._in_order(before)))
            order[node] = None
        order.update((node, None) for node in needed if node not in values)
        return list(order)

    def _count(self, node: fx.Node) -> None:
        """An operator that is not cheap may run in one graph only."""
        if node.op == "call_function" and not self.found.is_cheap(node):
            if node in self.runs:
                raise InternalError(f"{node.name} would run twice in a split stage", hint="please report this")
            self.runs.add(node)
