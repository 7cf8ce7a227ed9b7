"""The operator graph of a module that AOTAutograd traced, for match rules to read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ....errors import ModelError, UnsupportedOperator
from ...graph import Graph, Op, Role
from ..aten import is_random, positional, tensors_in
from ..flops import count_flops
from ..fx.builder import GraphBuilder, is_dense
from ..fx.recorder import Call, Recorder

__all__ = ["OperatorGraph", "operator_graph"]


@dataclass(frozen=True)
class OperatorGraph:
    """``graph``, and the module's nodes: those that its operators are, by operator, and one for each of its tensors."""

    graph: Graph
    nodes: Mapping[str, torch.fx.Node]
    values: Mapping[str, torch.fx.Node]


@dataclass
class _Sized:
    """Values of nodes with numbers for symbolic sizes, on no device; what shares storage goes on doing so."""

    size_of: Callable[[Any], int]
    storages: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self.size_of(value)
        return self._tensor(value) if isinstance(value, torch.Tensor) else value

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

    Raises:
        ModelError: a value is no plain tensor, or a call returns what it was given.
    """
    writer = _Writer(size_of)
    with torch.device("meta"):
        for node in module.graph.nodes:
            writer.add(node)
    return OperatorGraph(writer.builder.finish("operators", [], writer.returned), writer.nodes, writer.values)


class _Writer:
    """Writes one node after the other into a graph."""

    def __init__(self, size_of: Callable[[Any], int]) -> None:
        self.builder = GraphBuilder()
        self.nodes: dict[str, torch.fx.Node] = {}
        self.values: dict[str, torch.fx.Node] = {}
        self.returned: list[str] = []
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
        else:
            value = tree_map(self._sized, node.meta.get("val"))
            if node.op == "call_function":
                self._call(node, list(tensors_in(value)))
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
            if not is_dense(tensor) or tensor.storage_offset() != 0:
                count = tensor.untyped_storage().nbytes() // tensor.element_size()
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (count,), (1,))
            names.append(self.builder.add_base(whole, name, role))
        return names

    def _call(self, node: torch.fx.Node, results: Sequence[torch.Tensor]) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), self._found.__getitem__)
        operands = [t for t in tensors_in((args, kwargs)) if self.builder.is_placed(t)]
        target = node.target
        written = []
        if isinstance(target, torch._ops.OpOverload):
            bound = zip(target._schema.arguments, args, strict=False)
            written = [v for p, v in bound if p.alias_info is not None and p.alias_info.is_write]
        fresh = [tensor for tensor in results if not self.builder.is_placed(tensor)]
        if not fresh and not written:
            return  # a view, or a size
        if len(fresh) < len(results) and not written:
            raise ModelError(f"node {node.name!r} returns what it was given and something new")
        body, inputs = "", list(dict.fromkeys(self._recorder.name(value) for value in operands))
        if isinstance(target, torch._ops.OpOverload) and not written:
            body, inputs = self._body(Call(target, *positional(target, args, kwargs), node), inputs)
        outputs = self._place(node.name, fresh, Role.ACTIVATION)
        outputs += [self.builder.new_version(old, f"{node.name}_updated") for old in tensors_in(written)]
        is_pure = isinstance(target, torch._ops.OpOverload) and not is_random(target, args, kwargs)
        self.builder.ops.append(Op(node.name, tuple(inputs), tuple(outputs), body=body, repeatable=is_pure))
        self._count(node, args, kwargs, results)
        self.nodes[node.name] = node

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
