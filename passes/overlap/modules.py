"""The overlap pass on a rank's FX module: cut, put in order, and say what became of each collective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from ...compiler.graph import Graph, Op, OpKind, Role
from ...compiler.overlap import LIBRARY, OverlapOptions, Overlapped, lines_of
from ...compiler.pipeline import Budget
from ...compiler.plan import Plan
from ...errors import OptionError, SplitRefused
from ...hw_models.model import HardwareModel
from .choice import Alternative, Choice, Overlap
from .lines import reasons_of
from .plan import issue_order, to_plan
from .points import points

if TYPE_CHECKING:
    from torch.fx import GraphModule

__all__ = ["LOSS", "NOTHING", "overlapped"]

Axes = Mapping[str, int]
NOTHING = math.nextafter(1.0, 0.0)  # the margin that nothing gains
LOSS = "the loss, which is computed elsewhere"


def overlapped(
    module: GraphModule,
    inputs: Sequence[str],
    machine: HardwareModel,
    wanted: OverlapOptions,
    *,
    forward_outputs: int | None = None,
    budget: Budget | None = None,
) -> Overlapped:
    """``module`` cut and in the order that is predicted to be fastest, or as it is where that saves too little.

    ``inputs`` are the placeholders along which it may be cut, the one that leads first; with none it is only put in
    another order, and so it is where their sizes are symbols. Of a joint graph, whose first ``forward_outputs`` results
    are those of the forward half, only the cut is applied: the backward half begins behind the loss, and each half is
    put in order by itself.

    Raises:
        Infeasible: nothing keeps the memory limit.
        OptionError: the sizes of parts that are wanted do not fit the inputs, or there is nothing to cut.
        SplitRefused: the cut that is wanted is refused.
        MachineError: the machine has no such collectives.
    """
    rank = _Rank(module, tuple(inputs), wanted, forward_outputs)
    program = rank.whole()
    options = Overlap(margin=wanted.margin, algorithms=wanted.algorithms, memory_limit_bytes=wanted.limit_bytes)
    _check_algorithms(wanted, machine)
    others = rank.other_communication()
    if others:
        choice = replace(options, margin=NOTHING).choose(program, machine, budget=budget)
        reason = f"{others[0]!r} talks to other ranks, and is no collective whose order with others is known"
        choice = replace(choice, alternative=program, schedule=choice.before, reason=reason)
        return _answer(module, program, choice, machine, is_joint=forward_outputs is not None)
    axes = rank.axes()
    if axes is None and rank.has_symbols():
        wanted = replace(wanted, sizes=())
    if wanted.sizes and axes is None:
        raise OptionError("overlap has sizes of parts, but no input can be cut", hint="leave out 'sizes'")
    choice = options.choose(
        program,
        machine,
        None if axes is None else rank.cut,
        () if axes is None else rank.points(program, machine, axes),
        forced=bool(wanted.sizes),
        budget=budget,
    )
    if axes is None and choice.reason and rank.has_symbols():
        choice = replace(choice, reason=f"sizes that are symbols are not cut, and the {choice.reason}")
    return _answer(module, program, choice, machine, is_joint=forward_outputs is not None)


def _check_algorithms(wanted: OverlapOptions, machine: HardwareModel) -> None:
    """Raises OptionError for a name that the machine does not have."""
    known = {rate.algorithm for rate in machine.fabric.rates} if machine.fabric is not None else set()
    unknown = sorted(set(wanted.algorithms) - known - set(LIBRARY))
    if unknown:
        raise OptionError(
            f"machine {machine.name!r} does no collective by {unknown[0]!r}", hint=f"it has {', '.join(sorted(known))}"
        )


@dataclass
class _Rank:
    """A rank's module, and the ways of cutting it."""

    module: GraphModule
    inputs: tuple[str, ...]
    wanted: OverlapOptions
    forward_outputs: int | None = None

    def whole(self) -> Alternative:
        """As it is given; of half of a training step that was cut as a whole, operators know their parts already."""
        graph = self.graph(self.module)
        return Alternative(graph, _parts(self.module, graph), program=self.module)

    def other_communication(self) -> tuple[str, ...]:
        """Sends, receives and the like, by name."""
        from ...compiler.frontend.dynamo.operators import operator_graph
        from ...compiler.frontend.dynamo.traced import sized_example

        return operator_graph(self.module, sized_example).other_communication

    def graph(self, module: GraphModule) -> Graph:
        import torch
        from torch.utils._pytree import arg_tree_leaves as leaves

        from ...compiler.frontend.dynamo.operators import operator_graph
        from ...compiler.frontend.dynamo.traced import sized_example

        found = operator_graph(module, sized_example)
        if self.forward_outputs is None:
            return found.graph
        returned = leaves(*module.graph.output_node().args)[: self.forward_outputs]
        count = sum(isinstance(getattr(leaf, "meta", {}).get("val"), torch.Tensor) for leaf in returned)
        tangents = [n.name for n in module.graph.find_nodes(op="placeholder") if n.name.startswith("tangents")]
        return with_loss(found.graph, found.graph.outputs[:count], tangents)

    def axes(self) -> Axes | None:
        """The dimension of each input that is cut; None where none can be."""
        from ..split.axes import token_axes

        for axes in token_axes(self.module, self.inputs) if self.inputs else ():
            place = axes[self.inputs[0]]
            if self.wanted.axis == "auto" or place == (0 if self.wanted.axis == "batch" else 1):
                return axes
        return None

    def has_symbols(self) -> bool:
        """Whether an input along which the module could be cut has a size that is a symbol."""
        values = (n.meta.get("val") for n in self.module.graph.find_nodes(op="placeholder") if n.name in self.inputs)
        return any(not isinstance(size, int) for value in values for size in getattr(value, "shape", ()))

    def points(self, program: Alternative, machine: HardwareModel, axes: Axes) -> Iterator[tuple[int, ...]]:
        name, place = self.inputs[0], axes[self.inputs[0]]
        value = next(node.meta["val"] for node in self.module.graph.find_nodes(op="placeholder") if node.name == name)
        tokens = int(value.shape[place])
        if not self.wanted.sizes:
            return points(program.graph, tokens, self.wanted.parts, machine)
        if sum(self.wanted.sizes) != tokens:
            raise OptionError(
                f"sizes of parts are {list(self.wanted.sizes)}, the sum of which is {sum(self.wanted.sizes)}; input "
                f"{name!r} has {tokens} along dimension {place}"
            )
        return iter((self.wanted.sizes,))

    def cut(self, sizes: tuple[int, ...]) -> Alternative:
        """Raises SplitRefused, OptionError as `passes/split`."""
        from ..split.split import split

        axes = self.axes()
        assert axes is not None
        made = split(self.module, axes, sizes, strict=self.wanted.strict)
        graph = self.graph(made.module)
        parts = _parts(made.module, graph)
        if not parts:
            raise SplitRefused(self.inputs[0], "the whole module", "no operator can be divided along it")
        joined = tuple((joined.node, f"{joined.target}: {joined.reason}") for joined in made.joined)
        names = {op.name for op in graph.ops}
        origin = {node.name: node.meta["opweave_origin"] for node in made.module.graph.nodes if node.name in names}
        return Alternative(graph, parts, tuple(sizes), origin, joined, made.module)


def _parts(module: GraphModule, graph: Graph) -> Mapping[str, int]:
    """The part that each operator of ``graph`` belongs to, where it belongs to one."""
    names = {op.name for op in graph.ops}
    nodes = (node for node in module.graph.nodes if node.name in names)
    return {node.name: node.meta["opweave_part"] for node in nodes if "opweave_part" in node.meta}


def with_loss(graph: Graph, results: Sequence[str], tangents: Sequence[str]) -> Graph:
    """``graph`` of a whole training step, in which ``tangents`` come to be when ``results`` are known, in no time.

    ``results`` and ``tangents`` are names of tensors. The backward half is computed behind the forward half then.
    """
    given = [name for name in tangents if name in graph.buffers]
    behind: set[int] = set()
    for index, (reads, before) in enumerate(zip(graph.reads, graph.predecessors, strict=True)):
        if not set(given).isdisjoint(reads) or not behind.isdisjoint(before):
            behind.add(index)
    forward = [op for index, op in enumerate(graph.ops) if index not in behind]
    made = {name for op in forward for name in op.outputs}
    tensors = tuple(msgspec.structs.replace(t, role=Role.GRADIENT) if t.name in given else t for t in graph.tensors)
    known = [name for name in dict.fromkeys(results) if name in made or graph.tensor[name].buffer in made]
    loss = Op(LOSS, tuple(known), tuple(given), OpKind.BOUNDARY)
    backward = (op for index, op in enumerate(graph.ops) if index in behind)
    return Graph(graph.name, tensors, (*forward, loss, *backward), graph.outputs)


def _answer(
    module: GraphModule, program: Alternative, choice: Choice, machine: HardwareModel, *, is_joint: bool
) -> Overlapped:
    note = choice.reason or f"{len(choice.tried)} alternatives; parts of {list(choice.alternative.sizes) or 'no cut'}"
    before = to_plan(program.graph, machine, choice.before, note="as given")
    if choice.reason:
        after, result = _renoted(before, choice, note), module
    else:
        chosen = choice.alternative
        after = to_plan(chosen.graph, machine, choice.schedule, seconds=choice.seconds, note=note)
        result = chosen.program
    if not choice.reason and not is_joint:
        result = _ordered(result, issue_order(after, choice.schedule, _waits(chosen.program)))
    reasons = reasons_of(choice, before, after)
    lines = tuple(lines_of(before, after, choice.alternative.origin, reasons))
    sizes, joined = choice.alternative.sizes, choice.alternative.joined
    return Overlapped(result, after, before, lines, sizes, joined, choice.reason)


def _renoted(plan: Plan, choice: Choice, note: str) -> Plan:
    """``plan`` with what deciding took."""
    last = msgspec.structs.replace(plan.passes[-1], seconds=choice.seconds, note=note)
    return msgspec.structs.replace(plan, passes=(*plan.passes[:-1], last))


def _waits(module: GraphModule) -> Mapping[str, Sequence[str]]:
    """The calls that wait for each collective, by name; through what picks one of its results."""
    from ...compiler.frontend.collectives import is_wait

    origin: dict[str, str] = {}
    waits: dict[str, list[str]] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        first = node.all_input_nodes[0].name
        if is_wait(node.target):
            waits.setdefault(origin.get(first, first), []).append(node.name)
        elif getattr(node.target, "__name__", "") == "getitem":
            origin[node.name] = origin.get(first, first)
    return waits


def _ordered(module: GraphModule, order: Sequence[str]) -> GraphModule:
    from ...compiler.frontend.dynamo.frozen import reorder

    return reorder(module, order)
