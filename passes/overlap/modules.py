"""The overlap pass on a rank's FX module: cut, put in order, and say what became of each collective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ...compiler.graph import Graph
from ...compiler.overlap import OverlapOptions, Overlapped, lines_of
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

__all__ = ["overlapped"]

Axes = Mapping[str, int]


def overlapped(
    module: GraphModule,
    inputs: Sequence[str],
    machine: HardwareModel,
    wanted: OverlapOptions,
    *,
    algorithms: Sequence[str] = (),
    budget: Budget | None = None,
) -> Overlapped:
    """``module`` cut and in the order that is predicted to be fastest, or as it is where that saves too little.

    ``inputs`` are the placeholders along which it may be cut, the one that leads first; with none it is only put in
    another order. ``algorithms`` are those that collectives may be done by, all that the machine states where empty.

    Raises:
        Infeasible: nothing keeps the memory limit.
        OptionError: the sizes of parts that are wanted do not fit the inputs, or there is nothing to cut.
        SplitRefused: the cut that is wanted is refused.
        MachineError: the machine has no such collectives.
    """
    rank = _Rank(module, tuple(inputs), wanted)
    program = rank.whole()
    options = Overlap(margin=wanted.margin, algorithms=tuple(algorithms), memory_limit_bytes=wanted.limit_bytes)
    axes = rank.axes()
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
    return _answer(module, program, choice, machine)


@dataclass
class _Rank:
    """A rank's module, and the ways of cutting it."""

    module: GraphModule
    inputs: tuple[str, ...]
    wanted: OverlapOptions

    def whole(self) -> Alternative:
        return Alternative(_graph(self.module), program=self.module)

    def axes(self) -> Axes | None:
        """The dimension of each input that is cut; None where none can be."""
        from ..split.axes import token_axes

        for axes in token_axes(self.module, self.inputs) if self.inputs else ():
            place = axes[self.inputs[0]]
            if self.wanted.axis == "auto" or place == (0 if self.wanted.axis == "batch" else 1):
                return axes
        return None

    def points(self, program: Alternative, machine: HardwareModel, axes: Axes) -> Iterator[tuple[int, ...]]:
        if self.wanted.sizes:
            return iter((self.wanted.sizes,))
        name, place = self.inputs[0], axes[self.inputs[0]]
        value = next(node.meta["val"] for node in self.module.graph.find_nodes(op="placeholder") if node.name == name)
        return points(program.graph, int(value.shape[place]), self.wanted.parts, machine)

    def cut(self, sizes: tuple[int, ...]) -> Alternative:
        """Raises SplitRefused, OptionError as `passes/split`."""
        from ..split.split import split

        axes = self.axes()
        assert axes is not None
        made = split(self.module, axes, sizes, strict=self.wanted.strict)
        graph = _graph(made.module)
        names = {op.name for op in graph.ops}
        nodes = [node for node in made.module.graph.nodes if node.name in names]
        parts = {node.name: node.meta["opweave_part"] for node in nodes if "opweave_part" in node.meta}
        if not parts:
            raise SplitRefused(self.inputs[0], "the whole module", "no operator can be divided along it")
        joined = tuple((joined.node, f"{joined.target}: {joined.reason}") for joined in made.joined)
        origin = {node.name: node.meta["opweave_origin"] for node in nodes}
        return Alternative(graph, parts, tuple(sizes), origin, joined, made.module)


def _graph(module: GraphModule) -> Graph:
    from ...compiler.frontend.dynamo.operators import operator_graph

    return operator_graph(module, int).graph


def _answer(module: GraphModule, program: Alternative, choice: Choice, machine: HardwareModel) -> Overlapped:
    note = choice.reason or f"{len(choice.tried)} alternatives; parts of {list(choice.alternative.sizes) or 'no cut'}"
    before = to_plan(program.graph, machine, choice.before, note="as given")
    if choice.reason:
        after, result = _renoted(before, choice, note), module
    else:
        chosen = choice.alternative
        after = to_plan(chosen.graph, machine, choice.schedule, seconds=choice.seconds, note=note)
        result = _ordered(chosen.program, issue_order(after, choice.schedule, _waits(chosen.program)))
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
