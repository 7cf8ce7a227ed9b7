"""Launches of fused kernels put into a traced module, in the place of the calls that they replace."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ....errors import ExecutionError, InternalError, ModelError
from ...fusion import Called, Match, is_row_major
from ...graph import DTYPE_BYTES, Graph, Tensor
from .operators import OperatorGraph, operator_graph

__all__ = ["Rules", "launch_instead", "matched", "write_beside"]

log = logging.getLogger("opweave.backend")
_ATEN = torch.ops.aten
Rules = Callable[[Graph], Sequence[Match]]


def matched(module: torch.fx.GraphModule, rules: Rules) -> tuple[OperatorGraph, list[Match]]:
    """The graph of ``module`` with the sizes it was traced for, and what ``rules`` match in it whatever the sizes.

    Where sizes are symbols, a match must also be one for other numbers in their place: equal sizes may be equal by
    chance. Its operands must then be values that the module has. Raises ModelError.
    """
    found = operator_graph(module, _size)
    matches = [m for m in rules(found.graph) if all(_reachable(found, tensor) for tensor in m.operands)]
    values = [node.meta.get("val") for node in module.graph.nodes]
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    sizes += values
    symbols = {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
    if not matches or not symbols:
        return found, matches
    others = {symbol: 1009 + 2 * number for number, symbol in enumerate(sorted(symbols, key=str))}
    elsewhere = {_kind(match) for match in rules(operator_graph(module, lambda size: _size(size, others)).graph)}
    known = [m for m in matches if all(t.name in found.values for t in m.operands) and _kind(m) in elsewhere]
    return found, known


def _size(size: Any, others: Mapping[sympy.Symbol, int] | None = None) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    value = size.node.expr.subs(others) if others is not None else size.node.hint if size.node.has_hint() else None
    if value is None or (others is not None and not value.is_Integer):
        raise ModelError(f"size {size} is not known")
    return int(value)


def _reachable(found: OperatorGraph, tensor: Tensor) -> bool:
    """Whether a node is this tensor, or all of its buffer; no node is the whole storage of a strided input."""
    return tensor.name in found.values or tensor.buffer in found.values


def _kind(match: Match) -> tuple[Any, ...]:
    """What a match is, without its sizes."""
    arguments = [(k, v.name if isinstance(v, Tensor) else v) for k, v in match.arguments.items()]
    return match.kernel, match.ops, match.before, tuple(arguments), tuple(t.name for t in match.outputs)


def launch_instead(
    module: torch.fx.GraphModule, found: OperatorGraph, matches: Sequence[Match]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Put calls of ``opweave::<kernel>`` in the place of what ``matches``, found in ``module``, replace.

    Returns the kernels launched, each with the names of the calls that it replaces. A launch that its kernel refuses,
    as for operands on two devices, which no graph shows, is left out, and logged.
    """
    values = dict(found.values)
    launched = []
    with _mode_of(module), torch.no_grad():
        for match in matches:
            try:
                _Placing(module, values, match).insert()
            except ExecutionError as error:
                log.warning("%s is not launched: %s", match.kernel, error.message)
            else:
                launched.append((match.kernel, match.ops))
    stable_topological_sort(module.graph)  # a launch stands behind its operands; who reads it may stand before
    module.graph.lint()
    module.graph.eliminate_dead_code()
    module.recompile()
    return tuple(launched)


def write_beside(module: torch.fx.GraphModule, called: Callable[[str], Called | None]) -> None:
    """Let each call of a functional ``opweave::<kernel>`` write memory that is allocated beside it.

    Inductor sees the allocations, and our plan places them; the functional operator would allocate for itself, as it
    does where sizes are symbols. ``called`` says how a kernel is called, ``None`` of what is none.
    """
    nodes = [node for node in module.graph.nodes if getattr(node.target, "namespace", "") == "opweave"]
    kernels = {node: called(node.target._opname) for node in nodes}
    if not any(kernels.values()):
        return
    with _mode_of(module), torch.no_grad():
        for node, kernel in kernels.items():
            if kernel is not None:
                _write(module, node, kernel)
    module.graph.lint()
    module.recompile()


def _write(module: torch.fx.GraphModule, node: torch.fx.Node, kernel: Called) -> None:
    defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
    arguments = {**defaults, **dict(zip(kernel.inputs, node.args, strict=False)), **node.kwargs}
    arguments = {name: arguments[name] for name in kernel.inputs}
    made = kernel.allocate(*torch.fx.node.map_arg(tuple(arguments.values()), _value))
    if not all(isinstance(size, int) for tensor in made for size in (*tensor.shape, *tensor.stride())):
        return
    with module.graph.inserting_before(node):
        outputs = {}
        for name, tensor in zip(kernel.written, made, strict=True):
            layout = {"dtype": tensor.dtype, "device": tensor.device}
            sizes, strides = list(tensor.shape), list(tensor.stride())
            outputs[name] = _call(module, _ATEN.empty_strided.default, sizes, strides, **layout)
        target = getattr(torch.ops.opweave, f"{kernel.kernel}_out").default
        mutated = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        written = _call(module, auto_functionalized, target, **arguments, **outputs)
        results = [_call(module, operator.getitem, written, 1 + mutated.index(name)) for name in kernel.results]
    if len(results) == 1:
        node.replace_all_uses_with(results[0])
    for user in list(node.users):  # each picks a result out
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(node)


@dataclass
class _Placing:
    """One launch, the module it goes into, and the module's values by name, which it changes."""

    module: torch.fx.GraphModule
    values: dict[str, torch.fx.Node]
    match: Match

    def insert(self) -> None:
        """Insert the launch and let every reader of what it replaces read its results."""
        match = self.match
        with self.module.graph.inserting_before(self._behind_operands()):
            arguments = [self._node(v) if isinstance(v, Tensor) else v for v in match.arguments.values()]
            call = _call(self.module, getattr(torch.ops.opweave, match.kernel).default, *arguments)
            results = [call]
            if len(match.outputs) > 1:
                results = [_call(self.module, operator.getitem, call, i) for i in range(len(match.outputs))]
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
        operands = [self.values.get(t.name) or self.values[t.buffer] for t in self.match.operands]
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
        value, shape, strides = _value(base), list(tensor.shape), list(tensor.element_strides)
        if tensor.offset_bytes == 0 and tensor.dtype == str(value.dtype).removeprefix("torch."):
            # Views that autograd knows how to differentiate cheaply, unlike arbitrary strides.
            if (shape, strides) == ([*value.shape][::-1], [*value.stride()][::-1]):
                return _call(self.module, _ATEN.permute.default, base, list(range(len(shape)))[::-1])
            if is_row_major(tensor) and value.is_contiguous() and math.prod(shape) == value.numel():
                return _call(self.module, _ATEN.view.default, base, shape)
        offset = tensor.offset_bytes // DTYPE_BYTES[tensor.dtype] + value.storage_offset()
        return _call(self.module, _ATEN.as_strided.default, base, shape, strides, offset)


def _call(module: torch.fx.GraphModule, called: Any, /, *args: Any, **kwargs: Any) -> torch.fx.Node:
    node: torch.fx.Node = module.graph.call_function(called, args, kwargs)
    given = torch.fx.node.map_arg((args, kwargs), _value)
    node.meta["val"] = called(*given[0], **given[1])
    return node


def _value(item: Any) -> Any:
    return item.meta["val"] if isinstance(item, torch.fx.Node) else item


def _mode_of(module: torch.fx.GraphModule) -> FakeTensorMode:
    values = (node.meta.get("val") for node in module.graph.nodes)
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None:
        raise InternalError("a traced module has no fake tensors", hint="please report this")
    return mode
