"""Nodes of a split module: each with its value under the fake mode, where it comes from and its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from ...errors import ModelError, SplitRefused

__all__ = ["Making", "Maker", "alike", "fake_mode_of", "fresh_value", "prune"]

#: What a node of the given module says of its own tensors alone.
_OWN = frozenset({"val", "tensor_meta", "example_value", "eager_input_vals", "opweave_part", "opweave_origin"})


def fake_mode_of(module: GraphModule) -> FakeTensorMode:
    """The fake mode of the module's first fake tensor; a new one where there is none."""
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and isinstance(value.fake_mode, FakeTensorMode):
            return value.fake_mode
    return FakeTensorMode()


def fresh_value(node: Node, mode: FakeTensorMode) -> Any:
    """The value of a placeholder or attribute, of the fake mode ``mode``.

    Raises:
        ModelError: the node says nothing of its value.
        SplitRefused: a size is symbolic.
    """
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = _attribute(node)
    if value is None and node.op == "placeholder" and "val" not in node.meta:
        raise ModelError(f"placeholder {node.name!r} has no value in its metadata", hint="trace with fake tensors")
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
        raise SplitRefused(
            node.name, node.op, "its size is not known", hint="capture the module with static shapes (dynamic=False)"
        )
    if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is mode):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _attribute(node: Node) -> Any:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def alike(one: Any, other: Any) -> bool:
    """Whether an operator returns the same kind of value for either: one object, or tensors of one shape and layout."""
    if one is other:
        return True
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return _form(one) == _form(other)


def _form(value: torch.Tensor) -> tuple[Any, ...]:
    return (*value.shape, *value.stride(), value.storage_offset(), value.dtype, value.device)


@dataclass(frozen=True)
class Making:
    """Where new nodes belong: the node of the given module they stand for, their part if any, and their name."""

    origin: Node
    part: int | None
    name: str

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of such a node, less its value."""
        meta = {key: value for key, value in self.origin.meta.items() if key not in _OWN}
        meta["opweave_origin"] = self.origin.name
        if self.part is not None:
            meta["opweave_part"] = self.part
        return meta


@dataclass(frozen=True)
class Maker:
    """Makes nodes of ``graph`` for ``making``; one that only repeats a node of the given module keeps its value."""

    graph: Graph
    mode: FakeTensorMode
    making: Making

    def make(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
        """A call of ``target``. Raises SplitRefused where it does not take the arguments."""
        try:
            return self._node(target, args, kwargs, self._run(target, args, kwargs))
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
            origin = self.making.origin
            raise SplitRefused(
                origin.name, str(origin.target), f"{target} does not run on a part: {str(error).splitlines()[0]}"
            ) from error

    def attempt(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node | None:
        """The same; None where the operator does not take the arguments."""
        try:
            value = self._run(target, args, kwargs)
        except (RuntimeError, ValueError):
            return None
        return self._node(target, args, kwargs, value)

    def repeat(self, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> Node:
        """The origin's own call, whose value is known."""
        return self._node(self.making.origin.target, args, kwargs, value)

    def _run(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = torch.fx.map_arg((tuple(args), dict(kwargs)), lambda node: node.meta["val"])
        with self.mode, torch.no_grad():
            return target(*given[0], **given[1])

    def _node(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> Node:
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), self.making.name)
        node.meta = {**self.making.meta, "val": value}
        return node


def prune(graph: Graph) -> None:
    """Removes nodes that nobody reads, but for those that act outside their results."""
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if not (node.is_impure() or "c10d" in str(node.target)):
            graph.erase_node(node)
