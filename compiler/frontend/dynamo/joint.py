"""What a training step keeps, computes again or offloads: from AOTAutograd's joint graph to its two halves.

torch's ``min_cut_rematerialization_partition`` does everything but choose: our choice of saved values takes the place
of its own (``choose_saved_values_set``) in a copy of that function; so user checkpoints, random numbers, symbols,
effects and the order of the backward half are torch's business here too. Tags on nodes (``CheckpointPolicy``) would
reach the same function, but its cut may then save something else of the same size.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from ....errors import InternalError, OpweaveError
from ....hw_models.model import HardwareModel
from ...partition import Partition, PartitionProblem, SavedValue, Step
from .joint_costs import JointCosts, aliased, nbytes_of, source

__all__ = ["Choose", "Halves", "JointProblem", "joint_problem", "min_cut_with", "partition"]

#: Kept and offloaded values, by index.
Saved = tuple[frozenset[int], frozenset[int]]

#: Answers a problem, given answers to begin with; it may raise what ends the compilation, such as Infeasible.
Choose = Callable[[PartitionProblem, tuple[Saved, ...]], Partition]


@dataclass(frozen=True)
class Halves:
    """The forward and the backward graph of a training step.

    ``saved`` are the names of the values that the forward graph hands over, in the order of its outputs behind the
    first ``num_fwd_outputs``: tensors, then symbols. ``offloaded`` are positions in it: the executor copies these to
    host memory in the forward half, and back in the backward half before they are read. ``partition`` is the answer
    that the graphs realise, ``None`` if torch has chosen.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    offloaded: tuple[int, ...] = ()
    partition: Partition | None = None


@dataclass(frozen=True)
class JointProblem:
    """A problem, and the node of each of its values."""

    problem: PartitionProblem
    nodes: tuple[fx.Node, ...]

    def kept_of(self, saved: Iterable[fx.Node]) -> frozenset[int]:
        """The values that are kept when ``saved`` nodes are: those of which they are views."""
        index = {node: v for v, node in enumerate(self.nodes)}
        kept = {index[root] for node in saved if (root := _root(node)) in index}
        return frozenset(v for v in kept if self.problem.values[v].can_keep)


def partition(
    joint_module: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    num_fwd_outputs: int,
    static_lifetime_input_indices: list[int] | None = None,
    machine: HardwareModel | None = None,
    choose: Choose | None = None,
    offload: bool = False,
) -> Halves:
    """Divide a joint graph, after Inductor's passes on it, into the two graphs of a training step.

    ``choose`` answers the problem on ``machine``, torch's own cut being the first answer; with ``offload`` values may
    go to host memory. Without ``choose`` this is ``min_cut_rematerialization_partition``, unchanged. ``joint_module``
    may be divided again afterwards.

    Raises:
        OpweaveError: this torch's partitioner is not built as expected; the message names what is missing.
        InternalError: the answer contradicts itself, or the graphs are not divided as it says.
    """
    arguments: dict[str, Any] = {
        "num_fwd_outputs": num_fwd_outputs,
        "static_lifetime_input_indices": static_lifetime_input_indices,
    }
    if choose is None or machine is None:
        forward, backward = partitioners.min_cut_rematerialization_partition(joint_module, joint_inputs, **arguments)
        return Halves(forward, backward, _saved_names(forward, num_fwd_outputs))
    chosen: list[tuple[JointProblem, Partition]] = []

    def choose_saved_values_set(joint_graph: fx.Graph, node_info: Any, memory_budget: float = 1.0) -> list[fx.Node]:
        joint = joint_problem(joint_graph, node_info, num_fwd_outputs, machine, offload=offload)
        cut = partitioners.choose_saved_values_set(joint_graph, node_info, memory_budget=1)
        answer = choose(joint.problem, ((joint.kept_of(cut), frozenset()),))
        chosen.append((joint, answer))
        saved = [joint.nodes[v] for v in sorted(answer.kept | answer.offloaded)]
        symbols = [node for node in joint_graph.nodes if _is_symbol(node) and node not in node_info.tangents_closure]
        return list(dict.fromkeys((*node_info.inputs, *symbols, *saved)))

    forward, backward = min_cut_with(choose_saved_values_set)(joint_module, joint_inputs, **arguments)
    if not chosen:  # nothing in the graph needs a gradient
        return Halves(forward, backward, _saved_names(forward, num_fwd_outputs))
    return _checked(forward, backward, num_fwd_outputs, *chosen[-1])


def joint_problem(
    joint_graph: fx.Graph, node_info: Any, num_fwd_outputs: int, machine: HardwareModel, *, offload: bool
) -> JointProblem:
    """The problem of a joint graph that torch has classified into ``node_info`` (``partitioners.NodeInfo``).

    Operators that depend on no tangent and that no output of the forward half asks for run once, in either half;
    their results may be saved instead of what they are computed from. What a forward output occupies is there anyway.
    """
    leaves = _leaves(joint_graph)
    costs = JointCosts(machine, frozenset(node for node in leaves if isinstance(node, fx.Node)))
    builder = _Builder(
        costs=costs,
        required=frozenset(node_info.required_fw_nodes),
        held=frozenset(_root(node) for node in leaves[:num_fwd_outputs] if isinstance(node, fx.Node)),
        mutated=_mutated(joint_graph),
        offload=offload,
    )
    for node in joint_graph.nodes:
        if node in node_info.tangents_closure:
            builder.add_backward(node)
        elif node.op != "output":
            builder.add_forward(node)
    results = [node for node in leaves[num_fwd_outputs:] if isinstance(node, fx.Node)]
    builder.backward.append(Step("output", builder.reads(results)))
    problem = PartitionProblem(tuple(builder.steps), tuple(builder.backward), tuple(builder.values))
    return JointProblem(problem, tuple(builder.nodes))


@dataclass
class _Builder:
    """Steps and values in the order of the graph."""

    costs: JointCosts
    required: frozenset[fx.Node]
    held: frozenset[fx.Node]
    mutated: frozenset[fx.Node]
    offload: bool
    steps: list[Step] = field(default_factory=list)
    backward: list[Step] = field(default_factory=list)
    values: list[SavedValue] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    step_of: dict[fx.Node, int] = field(default_factory=dict)
    value_of: dict[fx.Node, int] = field(default_factory=dict)

    def add_backward(self, node: fx.Node) -> None:
        """A node that a tangent reaches."""
        if node.op == "call_function":
            self.backward.append(Step(node.name, self.reads(node.all_input_nodes), self.costs.step_ps(node)))

    def add_forward(self, node: fx.Node) -> None:
        """A node that the forward half can compute."""
        made = source(node)
        if node.op == "call_function" and made is node:
            self.step_of[node] = len(self.steps)
            is_required = node in self.required
            step_ps, again_ps = (self.costs.step_ps(node), self.costs.again_ps(node)) if is_required else (0, 0)
            reads = self.reads(node.all_input_nodes)
            self.steps.append(Step(node.name, reads, step_ps, again_ps, self._is_repeatable(node)))
        if isinstance(node.meta.get("val"), torch.Tensor):
            self.value_of[node] = len(self.values)
            self.values.append(self._value(node, self.step_of.get(made)))
            self.nodes.append(node)

    def reads(self, nodes: Iterable[fx.Node]) -> tuple[int, ...]:
        """The values that ``nodes`` are; of one with several results, all that are taken out of it."""
        found: dict[int, None] = {}
        for node in nodes:
            parts = [node] if node in self.value_of else [user for user in node.users if source(user) is node]
            found.update((self.value_of[part], None) for part in parts if part in self.value_of)
        return tuple(found)

    def _value(self, node: fx.Node, producer: int | None) -> SavedValue:
        if producer is None:
            return SavedValue(node.name, None, can_keep=False)
        can_keep = aliased(node) is None and not partitioners.must_recompute(source(node))
        nbytes = 0 if node in self.held else nbytes_of(node)
        save_ps = self.costs.save_ps(node)
        if not (self.offload and can_keep and nbytes):
            return SavedValue(node.name, producer, nbytes, can_keep, save_ps)
        store_ps, load_ps = self.costs.store_ps(nbytes), self.costs.load_ps(nbytes)
        return SavedValue(node.name, producer, nbytes, can_keep, save_ps, store_ps, load_ps)

    def _is_repeatable(self, node: fx.Node) -> bool:
        """Whether running ``node`` once more gives the same again and does nothing else.

        A checkpoint of the user's is honoured, random numbers included: torch lets both halves draw the same.
        Higher-order operators hold anything, and are not looked into.
        """
        if partitioners.must_recompute(node) or aliased(node) is not None:
            return True
        target = node.target
        results = (node, *(user for user in node.users if source(user) is node))
        return (
            isinstance(target, torch._ops.OpOverload)
            and all(part.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE for part in results)
            and not target._schema.is_mutable
            and not target.namespace.startswith(("_c10d", "c10d"))
            and not self.costs.is_random(node)
            and not node.is_impure(impure_random=False)
            and not str(node.meta.get("partitioner_tag", "")).startswith("must_be_in")
            and self.mutated.isdisjoint(node.all_input_nodes)
        )


def _checked(
    forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int, joint: JointProblem, answer: Partition
) -> Halves:
    """The halves, if what they share is what the answer saves."""
    names = _saved_names(forward, num_fwd_outputs)
    nodes = {joint.nodes[v].name: v for v in range(len(joint.nodes))}
    is_given = {name for name, v in nodes.items() if joint.problem.values[v].producer is None}
    shared = {name for name in names if name in nodes} - is_given
    read = set(answer.problem.demanded).union(*(answer.problem.steps[s].reads for s in answer.recount.again))
    expected = {joint.nodes[v].name for v in (answer.kept | answer.offloaded) & read}
    if shared != expected:
        listed = ", ".join(sorted(shared ^ expected)[:5])
        raise InternalError(f"torch divides the joint graph otherwise than asked: {listed}", hint="please report this")
    away = {joint.nodes[v].name for v in answer.offloaded}
    return Halves(forward, backward, names, tuple(i for i, name in enumerate(names) if name in away), answer)


def min_cut_with(choose: Callable[..., list[fx.Node]]) -> Callable[..., tuple[fx.GraphModule, fx.GraphModule]]:
    """Torch's partition function, choosing what is saved by ``choose``."""
    original = getattr(partitioners, "min_cut_rematerialization_partition", None)
    name = "choose_saved_values_set"
    if not isinstance(original, types.FunctionType) or name not in original.__code__.co_names:
        raise OpweaveError(
            f"torch {torch.__version__} does not choose saved values in {name}, called by "
            "torch._functorch.partitioners.min_cut_rematerialization_partition",
            hint="a memory limit for training works with torch 2.11 to 2.15",
        )
    names = {**vars(partitioners), name: choose}
    copy = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


def _saved_names(forward: fx.GraphModule, num_fwd_outputs: int) -> tuple[str, ...]:
    return tuple(node.name for node in _leaves(forward.graph)[num_fwd_outputs:])


def _leaves(graph: fx.Graph) -> list[Any]:
    """What a graph returns, ``None`` included."""
    return pytree.arg_tree_leaves(*graph.output_node().args)


def _root(node: fx.Node) -> fx.Node:
    """The node in whose storage ``node`` lies."""
    while (base := aliased(node)) is not None:
        node = base
    return node


def _mutated(graph: fx.Graph) -> frozenset[fx.Node]:
    """Inputs that the graph writes to: what is read of them again may be something else."""
    found: set[fx.Node] = set()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        found.update(read for read in node.all_input_nodes[:1] if read.op == "placeholder")
    return frozenset(found)


def _is_symbol(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat))
