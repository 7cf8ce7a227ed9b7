"""The operator graph of a module that AOTAutograd traced, for match rules to read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ....errors import ModelError, UnsupportedOperator
from ...graph import Graph, Op, OpKind, Role
from ..aten import is_random, positional, tensors_in
from ..collectives import collective_of, is_communication, is_wait, unwrapped
from ..flops import count_flops
from ..fx.builder import GraphBuilder, is_dense
from ..fx.recorder import Call, Recorder

__all__ = ["OperatorGraph", "operator_graph"]


@dataclass(frozen=True)
class OperatorGraph:
    """``graph``, and the module's nodes: those that its operators are, by operator, and one for each of its tensors.

    ``waits`` are the nodes that wait for each collective: one for each of its results, none where another module waits.
    A tensor that a collective makes has the node of its wait in ``values``: reading the start would be too early.
    ``other_communication`` names the operators that talk to other ranks and are no collective that is known.
    """

    graph: Graph
    nodes: Mapping[str, torch.fx.Node]
    values: Mapping[str, torch.fx.Node]
    waits: Mapping[str, tuple[torch.fx.Node, ...]] = field(default_factory=dict)
    other_communication: tuple[str, ...] = ()


@dataclass
class _Sized:
    """Values of nodes with numbers for symbolic sizes, on no device; what shares storage goes on doing so."""

    size_of: Callable[[Any], int]
    storages: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self.size_of(value)
        return self._tensor(value) if isinstance(value, torch.Tensor) else value

    def alias(self, value: Any, same: Any) -> None:
        """Let the tensors of ``value`` share storage with those of ``same``, of equal sizes. Raises ModelError."""
        for new, old in zip(tensors_in(value), tensors_in(same), strict=True):
            known = self.storages.get(new.untyped_storage()._cdata)
            if known is not None and known.untyped_storage()._cdata == old.untyped_storage()._cdata:
                continue
            if old.storage_offset() != 0 or [self.size_of(stride) for stride in new.stride()] != list(old.stride()):
                raise ModelError(
                    "a wait for a part of what a collective returns, or a collective into part of a tensor"
                )
            self.storages[new.untyped_storage()._cdata] = old

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        if value.layout != torch.strided or value.dtype.is_complex:
            raise ModelError(f"a tensor of {value.dtype}, {value.layout}")
        shape = [self.size_of(size) for size in value.shape]
        strides = [self.size_of(stride) for stride in value.stride()]
        offset, nbytes = self.size_of(value.storage_offset()), self.size_of(value.untyped_storage().nbytes())
        key = value.untyped_storage()._cdata
        if key not in self.storages:
            self.storages[key] = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        typed = torch.empty(0, dtype=value.dtype, device="meta")
        return typed.set_(self.storages[key].untyped_storage(), offset, shape, strides)


def operator_graph(module: torch.fx.GraphModule, size_of: Callable[[Any], int]) -> OperatorGraph:
    """The graph of ``module``, whose nodes carry their values in ``meta``; ``size_of`` gives numbers for sizes.

    A call that cannot be written down, or that writes an operand, becomes an operator without a body, which no rule
    matches; what it reads and writes is known all the same.

    A collective and its wait are one operator of kind collective, and what the wait returns is the collective's result.

    Raises:
        ModelError: a value is no plain tensor, a call returns what it was given, or a process group is not known here.
    """
    writer = _Writer(size_of)
    with unset_fake_temporarily(), torch.device("meta"):  # a mode around us would trace every layout again
        for node in module.graph.nodes:
            writer.add(node)
    graph = writer.builder.finish("operators", [], writer.returned)
    waits = {name: tuple(nodes) for name, nodes in writer.waits.items()}
    return OperatorGraph(graph, writer.nodes, writer.values, waits, tuple(writer.other_communication))


class _Writer:
    """Writes one node after the other into a graph."""

    def __init__(self, size_of: Callable[[Any], int]) -> None:
        self.builder = GraphBuilder()
        self.nodes: dict[str, torch.fx.Node] = {}
        self.values: dict[str, torch.fx.Node] = {}
        self.returned: list[str] = []
        self.waits: dict[str, list[torch.fx.Node]] = {}
        self.other_communication: list[str] = []
        self._in_flight: dict[str, str] = {}  # buffer -> the collective that wrote it last
        self._recorder = Recorder(self.builder, {})
        self._sized = _Sized(size_of)
        self._found: dict[torch.fx.Node, Any] = {}

    def add(self, node: torch.fx.Node) -> None:
        """Write down one node. Raises ModelError."""
        if node.op == "output":
            leaves = map_arg(node.args[0], self._found.__getitem__)
            self.returned = [self._recorder.name(value) for value in tensors_in(leaves)]
            return
        if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
            value = self._found[node.args[0]][node.args[1]]
        elif is_wait(node.target) and isinstance(node.args[0], torch.fx.Node):
            value = self._found[node.args[0]]
            self._sized.alias(node.meta.get("val"), value)  # traced as if it were new
            self._wait(node, value)
        else:
            value = tree_map(self._sized, node.meta.get("val"))
            if node.op == "call_function":
                value = self._call(node, value)
            else:
                self._place(node.name, tensors_in(value), Role.INPUT)
        self._found[node] = value
        if isinstance(value, torch.Tensor):
            self._recorder.remember(node, value)
            self.values.setdefault(self._recorder.name(value), node)

    def _place(self, name: str, tensors: Iterable[torch.Tensor], role: Role) -> list[str]:
        """Give each tensor, unless it lies in one that is known, a buffer: its own storage."""
        names = []
        for tensor in tensors:
            if self.builder.is_placed(tensor):
                continue
            whole = tensor
            # What a backward half is given may be several slices of one tensor.
            is_part = role is Role.INPUT and tensor.nbytes < tensor.untyped_storage().nbytes()
            if is_part or not is_dense(tensor) or tensor.storage_offset() != 0:
                count = tensor.untyped_storage().nbytes() // tensor.element_size()
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (count,), (1,))
            names.append(self.builder.add_base(whole, name, role))
        return names

    def _wait(self, node: torch.fx.Node, value: torch.Tensor) -> None:
        """A wait: who reads the tensor reads this node, no longer the one that started the collective."""
        self.values[self._recorder.name(value)] = node
        waited = self._in_flight.get(self.builder.buffer_of(value))
        if waited is not None:
            self.waits.setdefault(waited, []).append(node)

    def _call(self, node: torch.fx.Node, value: Any) -> Any:
        """Write down a call that returns ``value``; returns it as what follows sees it. Raises ModelError."""
        args, kwargs = map_arg((node.args, node.kwargs), self._found.__getitem__)
        operands = [t for t in tensors_in((args, kwargs)) if self.builder.is_placed(t)]
        written = _written(node.target, args, kwargs)
        if written and is_communication(node.target):
            value = written[0]  # traced as if it were new
            self._sized.alias(node.meta.get("val"), value)
        results = list(tensors_in(value))
        fresh = [tensor for tensor in results if not self.builder.is_placed(tensor)]
        if not fresh and not written:
            return value  # a view, or a size
        if len(fresh) < len(results) and not written:
            is_collective = is_communication(unwrapped(node.target, args, kwargs)[0])
            hint = "use functional collectives, or trace through torch.compile, which makes them so"
            raise ModelError(
                f"node {node.name!r} returns what it was given and something new", hint=hint if is_collective else ""
            )
        body, inputs = "", list(dict.fromkeys(self._recorder.name(operand) for operand in operands))
        if isinstance(node.target, torch._ops.OpOverload) and not written:
            body, inputs = self._body(Call(node.target, *positional(node.target, args, kwargs), node), inputs)
        outputs = self._place(node.name, fresh, Role.ACTIVATION)
        outputs += [self.builder.new_version(old, f"{node.name}_updated") for old in tensors_in(written)]
        is_pure = isinstance(node.target, torch._ops.OpOverload) and not is_random(node.target, args, kwargs)
        self.builder.ops.append(Op(node.name, tuple(inputs), tuple(outputs), body=body, repeatable=is_pure))
        self.nodes[node.name] = node
        if not self._communicates(node, args, kwargs, list(tensors_in(written)) or fresh):
            self._count(node, args, kwargs, results)
        return value

    def _communicates(self, node: torch.fx.Node, args: Any, kwargs: Any, results: Sequence[torch.Tensor]) -> bool:
        """Whether the last operator talks to other ranks; says so in it. Raises ModelError."""
        target, inner_args, inner_kwargs = unwrapped(node.target, args, kwargs)
        if not is_communication(target):
            return False
        collective = collective_of(target, inner_args, inner_kwargs, node.name)
        if collective is None:
            self.other_communication.append(node.name)
            self.builder.ops[-1] = replace(self.builder.ops[-1], repeatable=False)
            return True
        self._in_flight.update((self.builder.buffer_of(result), node.name) for result in results)
        self.builder.ops[-1] = replace(
            self.builder.ops[-1], kind=OpKind.COLLECTIVE, repeatable=False, collective=collective
        )
        return True

    def _body(self, call: Call, inputs: list[str]) -> tuple[str, list[str]]:
        try:
            return self._recorder.body(call)
        except UnsupportedOperator:
            return "", inputs

    def _count(self, node: torch.fx.Node, args: Any, kwargs: Any, results: Sequence[torch.Tensor]) -> None:
        if isinstance(node.target, torch._ops.OpOverload):
            try:
                flops = count_flops(node.target, args, kwargs, results)
            except (AttributeError, IndexError, TypeError, ValueError):
                return  # some formulas want results that are None here, as of gradients that nobody asked for
            self.builder.ops[-1] = replace(self.builder.ops[-1], flops=flops)


def _written(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Operands that a call of ``target`` writes, in the order of its schema."""
    if not isinstance(target, torch._ops.OpOverload):
        return []
    given = {p.name: v for p, v in zip(target._schema.arguments, args, strict=False)} | dict(kwargs)
    arguments = [p for p in target._schema.arguments if p.alias_info is not None and p.alias_info.is_write]
    return [given[p.name] for p in arguments if p.name in given]
