"""The order of a module's calls: put as a plan has it, and frozen so that Inductor keeps it.

Inductor schedules anew what it lowers. Of a region that was split it fuses the halves' pointwise loops into one kernel,
which reads the results of two collectives: both waits come before it, and what the split has hidden is exposed again.
`freeze` says the order in the only way that Inductor must honour: as dependencies (its ``control_deps`` operator) on
what comes before, between collectives, waits and what computes for long. Pointwise work between two of these is free
to fuse with its like, so that little is lost; a fusion across them would close a cycle, which its scheduler refuses.

Whoever compiles a frozen module sets `SETTINGS` besides, so that what has no dependency stays where it is, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import flop_registry

from ....errors import PlanError
from ..collectives import is_communication, is_wait
from .effects import has_effect
from .traced import copied

__all__ = ["SETTINGS", "freeze", "is_start", "is_view", "orderings", "reorder"]

#: Inductor's options under which it moves no more than it must.
SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "reorder_for_peak_memory": False,
        "reorder_for_compute_comm_overlap": False,
        "reorder_for_locality": False,
        "aten_distributed_optimizations.enable_overlap_scheduling": False,
    }
)


def is_start(node: Node) -> bool:
    """Whether ``node`` talks to other ranks and does not merely wait: it starts a collective, or sends or receives."""
    return node.op == "call_function" and is_communication(node.target) and not is_wait(node.target)


def is_view(node: Node) -> bool:
    """Whether ``node`` computes nothing: it is a view of another's memory, or one of its results."""
    is_changed = node.op == "call_function" and (is_wait(node.target) or any(True for _ in _written(node)))
    return not is_changed and _base(node) is not node


def reorder(module: GraphModule, order: Sequence[str]) -> GraphModule:
    """A copy of ``module`` whose nodes come in ``order``.

    ``order`` names calls, each once. One that it leaves out comes directly before the first of ``order`` that needs
    it, or last; so a wait sinks to the first reader of its collective. Nodes keep their names, values and ``meta``.

    Raises:
        PlanError: a name that the module does not have or that comes twice, or an order in which a call would read what
            is not there yet, see other bytes than before, or overwrite what a collective in flight still reads; or in
            which random numbers would be drawn in another order.
    """
    module = copied(module)
    nodes = list(module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    before = orderings(nodes)
    named = _named(nodes, order)
    output = module.graph.output_node()
    done: set[Node] = {node for node in nodes if node.op == "placeholder"}
    left = [node for node in nodes if node not in named and node is not output]
    for node in (*named, *left):
        for needed in sorted(_missing(node, before, done), key=position.__getitem__):
            if needed in named and needed is not node:
                raise PlanError(
                    f"the order has {node.name!r} before {needed.name!r}, which must come first",
                    hint="an order keeps data dependencies, writes in place, and a wait behind its collective",
                )
            output.prepend(needed)
            done.add(needed)
    module.graph.lint()
    module.recompile()
    return module


def _named(nodes: Sequence[Node], order: Sequence[str]) -> Mapping[Node, None]:
    calls = {node.name: node for node in nodes if node.op not in ("placeholder", "output")}
    named: dict[Node, None] = {}
    for name in order:
        if name not in calls:
            raise PlanError(f"the order names {name!r}, which is no call of the module")
        if calls[name] in named:
            raise PlanError(f"the order names {name!r} twice")
        named[calls[name]] = None
    return named


def _missing(node: Node, before: Mapping[Node, Sequence[Node]], done: set[Node]) -> set[Node]:
    """``node`` and whatever it needs, directly or not, that has not come yet."""
    found, stack = {node} - done, [node]
    while stack:
        for other in before[stack.pop()]:
            if other not in done and other not in found:
                found.add(other)
                stack.append(other)
    return found


def orderings(nodes: Iterable[Node]) -> Mapping[Node, tuple[Node, ...]]:
    """For each node, in a module's order, those that must come before it whatever the order.

    These are what it reads; the last write to that memory and, if it writes it, all reads since; and among calls that
    draw random numbers or act outside their tensors, the one before. A wait counts as writing its collective's result
    and reading its operands, which no one may write while it is in flight. Collectives themselves may change places.
    """
    writer: dict[Node, Node] = {}
    readers: dict[Node, dict[Node, None]] = {}
    roots: dict[Node, Node] = {}
    operands: dict[Node, tuple[Node, ...]] = {}  # of collectives in flight, by the memory of their results
    effect: Node | None = None
    result: dict[Node, tuple[Node, ...]] = {}
    for node in nodes:
        before = dict.fromkeys(node.all_input_nodes)
        roots[node] = roots[_base(node)] if _base(node) is not node else node
        written = [roots[other] for other in _written(node)]
        read = [roots[other] for other in node.all_input_nodes]
        if is_start(node):
            for made in (roots[node], *written):
                operands[made] = tuple(read)
        elif is_wait(node.target):
            written.append(roots[node])
            read += operands.get(roots[node], ())
        for root in dict.fromkeys((*read, *written)):
            before.update(dict.fromkeys([writer[root]] if root in writer else []))
        for root in dict.fromkeys(written):
            before.update(readers.pop(root, {}))
            writer[root] = node
        for root in read:
            readers.setdefault(root, {})[node] = None
        if _has_effect(node):
            before.update({} if effect is None else {effect: None})
            effect = node
        before.pop(node, None)
        result[node] = tuple(before)
    return result


def _base(node: Node) -> Node:
    """What ``node`` is a view or a part of; itself if it has memory of its own."""
    if node.op != "call_function" or not node.all_input_nodes:
        return node
    first = node.all_input_nodes[0]
    if node.target is operator.getitem or is_wait(node.target):
        return first
    if isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        if any(item.alias_info is not None for item in returns) or getattr(node.target, "is_view", False):
            return first
    return node


def _written(node: Node) -> Iterator[Node]:
    """Operands that ``node`` writes."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    for number, parameter in enumerate(node.target._schema.arguments):
        value = node.args[number] if number < len(node.args) else node.kwargs.get(parameter.name)
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            items = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in items if isinstance(item, Node))


def _has_effect(node: Node) -> bool:
    if node.op != "call_function" or is_communication(node.target):
        return False
    return has_effect(str(node.target), node.args, node.kwargs)


def freeze(module: GraphModule) -> GraphModule:
    """A copy of ``module`` that Inductor runs in its order: no collective starts later, no wait comes earlier.

    Every start of a collective, and every wait, depends on those before it and on what computes for long (what
    PyTorch counts the flops of) since; a wait on all that is computed since and read behind it, too. What computes for
    long depends on the collective or wait before it. The order stays as it is, values are the same, and the module runs
    as before without Inductor, too. A module without collectives, or one that is frozen, is returned as it is.
    """
    if not any(is_start(node) for node in module.graph.nodes):
        return module
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    module = copied(module)
    _write_in_place(module.graph.nodes)
    anchors = _Anchors(module.graph.nodes)
    preserve_node_ordering(module.graph, {node: OrderedSet(before) for node, before in anchors.wanted.items()})
    module.graph.lint()
    module.recompile()
    return module


def _write_in_place(nodes: Iterable[Node]) -> None:
    """Let an all-reduce write what it reads where nothing else reads that: Inductor would, but does not see it then."""
    functional = torch.ops._c10d_functional
    for node in nodes:
        if node.target is functional.all_reduce.default:
            operand = node.args[0]
            if not isinstance(operand, Node) or not _computes(operand) or list(operand.users) != [node]:
                continue
            if operand.meta["val"].is_contiguous():
                node.target = functional.all_reduce_.default


class _Anchors:
    """What each collective, wait and long computation is made to depend on; what follows from others is left out."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.position = {node: index for index, node in enumerate(nodes)}
        self.wanted: dict[Node, list[Node]] = {}
        self.bit: dict[Node, int] = {}
        self.behind: dict[Node, int] = {}  # the anchors that each node comes after by what is said so far, as bits
        self.last: list[Node] = []  # the last collective or wait, if there was one
        self.long: list[Node] = []  # what computes for long since
        self.others: list[Node] = []  # what else computes since
        for node in self.position:
            self.behind[node] = 0
            for other in node.all_input_nodes:
                self.behind[node] |= self.behind[other] | self.bit.get(other, 0)
            if node.op == "call_function" and is_communication(node.target):
                self._communication(node)
            elif _is_long(node):
                self._depend(node, self.last)
                self.long.append(node)
            elif _computes(node):
                self.others.append(node)

    def _communication(self, node: Node) -> None:
        more = []
        if is_wait(node.target):
            more = [other for other in self.others if self._is_read_behind(other, node)]
        self._depend(node, [*self.last, *self.long], more)
        if node not in self.wanted:  # all of them are wrapped: one that is not could not be depended on
            self.wanted[node] = node.all_input_nodes[:1]
        self.last, self.long, self.others = [node], [], []

    def _depend(self, node: Node, anchors: Sequence[Node], more: Iterable[Node] = ()) -> None:
        chosen = list(more)
        for other in reversed(anchors):
            if not self.behind[node] & self.bit[other]:
                chosen.append(other)
                self.behind[node] |= self.behind[other] | self.bit[other]
        if chosen:
            self.wanted[node] = sorted(chosen, key=self.position.__getitem__)
        self.bit[node] = 1 << len(self.bit)

    def _is_read_behind(self, node: Node, wait: Node) -> bool:
        return any(self.position[user] > self.position[wait] for user in node.users)


def _is_long(node: Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return node.op == "call_function" and packet in flop_registry


def _computes(node: Node) -> bool:
    """Whether ``node`` makes a tensor of others: no view, no part, no constant."""
    is_made = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    return is_made and not is_view(node) and bool(node.all_input_nodes)
