"""Which node of a joint graph runs in F, I or W, and what is held between: the least bytes, by one minimum cut.

The network has two layers, one for the moment behind F and one for the moment between I and W. In each, a value that
can be had is on the side of the sink: either it is held, which costs its bytes, or it is computed again from values
that can be had. docs/formulations/pipeline-halves.md proves that a minimum cut is a cheapest choice.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners

from ....errors import InternalError, ModelError
from .halves_joint import JointGraph, PlaceKind
from .joint_costs import aliased, nbytes_of, source, tensors_of

__all__ = ["Cut", "Dependencies", "least_bytes"]

aten = torch.ops.aten
HOLD, AGAIN = 64, 1  # a byte held weighs as much as writing 64 bytes again

#: Torch's list of what is cheap to compute again has no operators that Inductor decomposes; these read their operands
#: once or twice.
ALSO_CHEAP = (
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._fused_rms_norm,
    aten._softmax,
    aten._log_softmax,
    aten._unsafe_view,
    aten.cat,
    aten.stack,
    aten.unbind,
    aten.split_with_sizes,
    aten.constant_pad_nd,
    aten.slice_backward,
    aten.select_backward,
    aten._softmax_backward_data,
)


@dataclass(frozen=True)
class Cut:
    """Values held behind F, and those held between I and W; each is a node that is computed before, or given.

    Neither has parameters and buffers that keep their values: they are there anyway.
    """

    behind_forward: tuple[fx.Node, ...]
    behind_input_gradient: tuple[fx.Node, ...]


class Dependencies:
    """What depends on what in a joint graph, and which nodes may run more than once."""

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.nodes = [node for node in joint.module.graph.nodes if node.op != "output"]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.forward = self._closure([*joint.outputs, *joint.updates.values()])
        self.input_gradient = self._closure(joint.input_gradients.values())
        self.weight_gradient = self._closure(joint.parameter_gradients.values())
        self.backward = self._behind_output_gradients()

    @cached_property
    def static(self) -> frozenset[fx.Node]:
        """Parameters, and what else keeps its value: buffers that F does not write to, and constants."""
        kinds = (PlaceKind.PARAMETER, PlaceKind.BUFFER)
        places = self.joint.places
        kept = {node for node, place in places.items() if place.kind in kinds and node not in self.joint.updates}
        return frozenset(kept | {node for node in self.nodes if node.op == "get_attr"})

    @cached_property
    def only_weight_gradient(self) -> frozenset[fx.Node]:
        """What depends on an output's gradient and no gradient of an input needs."""
        return frozenset(self.weight_gradient & self.backward - self.input_gradient)

    @cached_property
    def deferred(self) -> frozenset[fx.Node]:
        """What runs in W in any case: products of weight gradients, and what is computed from them."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            is_late = not self.is_cheap(node) or not found.isdisjoint(node.all_input_nodes)
            if node in self.only_weight_gradient and is_late:
                found.add(node)
        return frozenset(found)

    def is_cheap(self, node: fx.Node) -> bool:
        """Whether ``node`` moves little more than what it makes, draws no random numbers and writes to nothing."""
        target = node.target
        if node.op != "call_function" or target is operator.getitem:
            return node.op == "call_function"
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or is_random(node):
            return False
        return aliased(node) is not None or target.overloadpacket in _cheap() or torch.Tag.pointwise in target.tags

    def operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """The tensors that ``node`` reads, but for what keeps its value."""
        return (read for read in node.all_input_nodes if read not in self.static)

    def _closure(self, made: Iterable[fx.Node]) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        pending = list(made)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += node.all_input_nodes
        return frozenset(found)

    def _behind_output_gradients(self) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.nodes:
            place = self.joint.places.get(node)
            is_given = place is not None and place.kind is PlaceKind.OUTPUT_GRADIENT
            if is_given or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)


def least_bytes(found: Dependencies) -> Cut:
    """The cut that holds the least bytes behind F and between I and W, both weighing alike.

    An operator that is not cheap runs once. Without input gradients I does nothing: all that the backward half needs
    is held from F to W.

    Raises:
        ModelError: the backward half draws random numbers, as checkpoints with dropout do: they would be others.
    """
    network = _Network(found)
    for node in found.nodes:
        if node in found.backward:
            network.add_backward(node)
        else:
            network.add_forward(node)
    return network.solve()


class _Network:
    """The flow network: nodes are numbered, of each value one pair (computed, had) a layer; 0 is source, 1 is sink."""

    def __init__(self, found: Dependencies) -> None:
        self.found = found
        self.has_input_gradients = bool(found.joint.input_gradients)
        self.arcs: list[tuple[int, int, int | None]] = []
        self.number: dict[tuple[fx.Node, int, bool], int] = {}
        self.gradients = frozenset(found.joint.parameter_gradients.values())

    def at(self, node: fx.Node, layer: int, *, had: bool) -> int:
        """The number of "``node`` cannot be computed" (or, ``had``, "cannot be had") in a layer."""
        return self.number.setdefault((node, layer, had), len(self.number) + 2)

    def add_forward(self, node: fx.Node) -> None:
        """A node that depends on no output's gradient."""
        if node in self.found.static or not (node in self.found.input_gradient or node in self.found.weight_gradient):
            return
        _refuse_random(node, in_forward=node in self.found.forward)
        is_cheap = self.found.is_cheap(node)
        is_given = node.op == "placeholder"
        runs_later = node not in self.found.forward and not is_given
        for layer in (1, 2):
            can_run = is_cheap or (runs_later and layer == 1)
            held = 0 if is_given and layer == 1 else self._holding(node)
            self._value(node, layer, self._again(node) if can_run else None, held)
        if not is_given:
            self._reads(node, (1, 2))
        self.arcs.append((self.at(node, 1, had=True), self.at(node, 2, had=True), None))
        if node in self.gradients or node in self.found.joint.input_gradients.values():  # zeros, say
            layer = 2 if node in self.gradients and self.has_input_gradients else 1
            self.arcs.append((self.at(node, layer, had=True), 1, None))

    def add_backward(self, node: fx.Node) -> None:
        """A node that depends on an output's gradient."""
        found = self.found
        if node not in found.input_gradient and node not in found.weight_gradient:
            return
        _refuse_random(node, in_forward=False)
        if node.op == "placeholder":
            self._value(node, 2, None, self._holding(node))
        elif not self.has_input_gradients:
            self._demand(node, 1)
        elif node in found.input_gradient:
            self._demand(node, 1)
            self._value(node, 2, self._again(node) if found.is_cheap(node) else None, self._holding(node))
            self._reads(node, (2,))
        elif node in found.deferred:
            self._demand(node, 2)
        else:  # W runs it, or I, if its result is smaller than what it reads
            self._value(node, 2, 0, self._holding(node))
            self._reads(node, (2,))
            self.arcs += [(self.at(read, 1, had=True), self.at(node, 1, had=True), None) for read in self._early(node)]
            self.arcs.append((self.at(node, 1, had=True), self.at(node, 2, had=True), None))
        if node in self.gradients and node not in found.deferred and self.has_input_gradients:
            self.arcs.append((self.at(node, 2, had=True), 1, None))

    def _value(self, node: fx.Node, layer: int, again: int | None, held: int | None) -> None:
        computed, had = self.at(node, layer, had=False), self.at(node, layer, had=True)
        self.arcs.append((0, computed, again))
        self.arcs.append((computed, had, held))

    def _reads(self, node: fx.Node, layers: Iterable[int]) -> None:
        for layer in layers:
            for read in self.found.operands(node):
                if layer == 2 or read not in self.found.backward:
                    self.arcs.append((self.at(read, layer, had=True), self.at(node, layer, had=False), None))

    def _demand(self, node: fx.Node, layer: int) -> None:
        for read in self.found.operands(node):
            if layer == 1 and (read not in self.found.backward):
                self.arcs.append((self.at(read, 1, had=True), 1, None))
            elif layer == 2 and read not in self.found.deferred:
                self.arcs.append((self.at(read, 2, had=True), 1, None))

    def _early(self, node: fx.Node) -> Iterator[fx.Node]:
        """Operands of a node that I may run, but for those that I has in any case."""
        for read in self.found.operands(node):
            if read in self.found.only_weight_gradient or read not in self.found.backward:
                yield read

    def _holding(self, node: fx.Node) -> int | None:
        """What holding ``node`` costs; views and several results at once are not held, but what they are made of."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or (node.op == "call_function" and aliased(node) is not None):
            return None
        return HOLD * nbytes_of(node) + 1

    def _again(self, node: fx.Node) -> int:
        if aliased(node) is not None or source(node) is not node:
            return 0
        return AGAIN * sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(node))

    def solve(self) -> Cut:
        from ortools.graph.python.max_flow import SimpleMaxFlow

        endless = 1 + sum(cost for _, _, cost in self.arcs if cost is not None)
        flow = SimpleMaxFlow()
        for tail, head, cost in self.arcs:
            flow.add_arc_with_capacity(tail, head, endless if cost is None else cost)
        missing: set[int] = {0}
        if self.number:
            status = flow.solve(0, 1)
            if status != SimpleMaxFlow.OPTIMAL or flow.optimal_flow() >= endless:
                raise InternalError(f"a stage's graph has no cut ({status})", hint="please report this")
            missing = set(flow.get_source_side_min_cut())
        held: list[list[fx.Node]] = [[], []]
        for layer in (1, 2):
            for node in self.found.nodes:
                ends = [self.number.get((node, layer, had)) for had in (False, True)]
                if ends[0] in missing and ends[1] is not None and ends[1] not in missing:
                    held[layer - 1].append(node)
        if not self.has_input_gradients:
            held[1] = [
                *held[0],
                *(n for n, p in self.found.joint.places.items() if p.kind is PlaceKind.OUTPUT_GRADIENT),
            ]
        return Cut(tuple(held[0]), tuple(held[1]))


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` draws random numbers; attention is tagged so, but does not without dropout."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for index, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return not isinstance(given, (int, float)) or given != 0
    return True


def _refuse_random(node: fx.Node, *, in_forward: bool) -> None:
    if is_random(node) and not in_forward:
        raise ModelError(
            f"the backward half draws random numbers ({node.target}): a checkpoint around dropout would draw others",
            hint="leave out the checkpoint: what is cheap is computed again in any case",
        )


@cache
def _cheap() -> frozenset[Any]:
    listed: Iterable[Any] = partitioners.get_default_op_list().recomputable_ops
    return frozenset((*listed, *ALSO_CHEAP))
