"""Launches of fused kernels put into a traced module, in the place of the calls that they replace."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import FakeTensor

from ....errors import InternalError, ModelError
from ...fusion import Launch, Match
from ...graph import DTYPE_BYTES, Graph, Tensor
from .operators import OperatorGraph, operator_graph

__all__ = ["Rules", "launch_instead", "matched"]

_ATEN = torch.ops.aten
Rules = Callable[[Graph], Sequence[Match]]


def matched(module: torch.fx.GraphModule, rules: Rules) -> tuple[OperatorGraph, list[Match]]:
    """The graph of ``module`` with the sizes it was traced for, and what ``rules`` match in it whatever the sizes.

    Where sizes are symbols, a match must also be one for other numbers in their place: equal sizes may be equal by
    chance. Its operands must then be values that the module has. Raises ModelError.
    """
    found = operator_graph(module, _size)
    matches = list(rules(found.graph))
    values = [node.meta.get("val") for node in module.graph.nodes]
    symbols = {s for v in values if isinstance(v, torch.SymInt) for s in v.node.expr.free_symbols}
    symbols |= {
        s
        for v in values
        if isinstance(v, torch.Tensor)
        for size in v.shape
        if isinstance(size, torch.SymInt)
        for s in size.node.expr.free_symbols
    }
    if not matches or not symbols:
        return found, matches
    others = {symbol: 1009 + 2 * number for number, symbol in enumerate(sorted(symbols, key=str))}
    elsewhere = {_kind(match) for match in rules(operator_graph(module, lambda size: _size(size, others)).graph)}
    known = [m for m in matches if all(t.name in found.values for t in m.operands) and _kind(m) in elsewhere]
    return found, known


def _size(size: int | torch.SymInt, others: Mapping[sympy.Symbol, int] | None = None) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    value = size.node.expr.subs(others) if others is not None else size.node.hint if size.node.has_hint() else None
    if value is None or (others is not None and not value.is_Integer):
        raise ModelError(f"size {size} is not known")
    return int(value)


def _kind(match: Match) -> tuple[Any, ...]:
    """What a match is, without its sizes."""
    arguments = [(k, v.name if isinstance(v, Tensor) else v) for k, v in match.arguments.items()]
    return match.kernel, match.ops, match.before, tuple(arguments), tuple(t.name for t in match.outputs)


def launch_instead(
    module: torch.fx.GraphModule, found: OperatorGraph, launches: Sequence[Launch], *, functional: bool = False
) -> None:
    """Put ``launches``, found in the graph of ``module``, in the place of what they replace.

    Where all sizes are numbers, a launch writes memory that is allocated beside it, which Inductor sees and our plan
    places; where some are symbols, or where it is to be ``functional``, as autograd needs it, its operator allocates
    its own.
    """
    values_of_nodes = (node.meta.get("val") for node in module.graph.nodes)
    mode = next((value.fake_mode for value in values_of_nodes if isinstance(value, FakeTensor)), None)
    if mode is None:
        raise InternalError("a traced module has no fake tensors", hint="please report this")
    values = dict(found.values)
    with mode, torch.no_grad():
        for launch in launches:
            _Placing(module, values, launch, functional).insert()
    stable_topological_sort(module.graph)  # a launch stands behind its operands; who reads it may stand before
    module.graph.lint()
    module.graph.eliminate_dead_code()
    module.recompile()


@dataclass
class _Placing:
    """One launch, the module it goes into, and the module's values by name, which it changes."""

    module: torch.fx.GraphModule
    values: dict[str, torch.fx.Node]
    launch: Launch
    functional: bool

    def insert(self) -> None:
        """Insert the launch and let every reader of what it replaces read its results."""
        match = self.launch.match
        with self.module.graph.inserting_before(self._behind_operands()):
            arguments = {k: self._node(v) if isinstance(v, Tensor) else v for k, v in match.arguments.items()}
            made = self.launch.allocate(*[_value(item) for item in arguments.values()])
            static = all(isinstance(size, int) for tensor in made for size in (*tensor.shape, *tensor.stride()))
            writes = static and not self.functional
            results = self._writing(arguments, made) if writes else self._functional(arguments)
        for tensor, result in zip(match.outputs, results, strict=True):
            replaced = self.values.get(tensor.name)
            if replaced is not None:
                given, wanted = (_value(node) for node in (result, replaced))
                if (given.shape, given.stride(), given.dtype) != (wanted.shape, wanted.stride(), wanted.dtype):
                    raise InternalError(f"kernel {match.kernel} gives {tensor.name} another layout", hint="report this")
                replaced.replace_all_uses_with(result)
                self.values[tensor.name] = result

    def _behind_operands(self) -> torch.fx.Node:
        order = {node: number for number, node in enumerate(self.module.graph.nodes)}
        operands = [self.values.get(t.name) or self.values[t.buffer] for t in self.launch.match.operands]
        following: torch.fx.Node = max(operands, key=order.__getitem__).next
        while following.op in ("placeholder", "get_attr"):
            following = following.next
        return following

    def _node(self, tensor: Tensor) -> torch.fx.Node:
        """A node whose value is ``tensor``; a new view of its buffer where the module has none."""
        known = self.values.get(tensor.name)
        if known is not None:
            return known
        base = self.values[tensor.buffer]
        offset = tensor.offset_bytes // DTYPE_BYTES[tensor.dtype] + _value(base).storage_offset()
        return self._call(_ATEN.as_strided.default, base, list(tensor.shape), list(tensor.element_strides), offset)

    def _writing(self, arguments: dict[str, Any], made: Sequence[torch.Tensor]) -> list[torch.fx.Node]:
        outputs = {}
        for name, tensor in zip(self.launch.written, made, strict=True):
            sizes, strides = list(tensor.shape), list(tensor.stride())
            outputs[name] = self._call(
                _ATEN.empty_strided.default, sizes, strides, dtype=tensor.dtype, device=tensor.device
            )
        target = getattr(torch.ops.opweave, f"{self.launch.match.kernel}_out").default
        mutated = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        call = self._call(auto_functionalized, target, **arguments, **outputs)
        return [self._call(operator.getitem, call, 1 + mutated.index(name)) for name in self.launch.results]

    def _functional(self, arguments: dict[str, Any]) -> list[torch.fx.Node]:
        call = self._call(getattr(torch.ops.opweave, self.launch.match.kernel).default, *arguments.values())
        if len(self.launch.results) == 1:
            return [call]
        return [self._call(operator.getitem, call, position) for position in range(len(self.launch.results))]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node: torch.fx.Node = self.module.graph.call_function(target, args, kwargs)
        given = torch.fx.node.map_arg((args, kwargs), _value)
        node.meta["val"] = target(*given[0], **given[1])
        return node


def _value(item: Any) -> Any:
    return item.meta["val"] if isinstance(item, torch.fx.Node) else item
