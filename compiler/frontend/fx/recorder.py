"""Writes operators down: which tensors a call reads, where its results go, and what they are called."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...graph import Role
from ...runtime.calls import format_call
from ..aten import replace_tensors, tensors_in
from ..collectives import collective_of
from ..flops import count_flops
from .builder import GraphBuilder, is_dense

__all__ = ["Call", "Recorder"]

_CLONE = torch.ops.aten.clone.default


class Call:
    """One ATen call on fake tensors, and the node it comes from (``None`` for a copy that the frontend adds)."""

    def __init__(
        self,
        target: torch._ops.OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        node: torch.fx.Node | None = None,
    ) -> None:
        self.target = target
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.node = node

    @property
    def origin(self) -> str:
        """The model's own name for the call: ``meta["origin"]``, or the path of the module that makes it."""
        meta = self.node.meta if self.node is not None else {}
        if "origin" in meta:
            return str(meta["origin"])
        modules = list((meta.get("nn_module_stack") or {}).values())
        return str(modules[-1][0]) if modules else ""


class Recorder:
    """Appends operators to a builder. ``wanted`` renames the results of nodes."""

    def __init__(self, builder: GraphBuilder, wanted: Mapping[torch.fx.Node, str]) -> None:
        self.builder = builder
        self._wanted = wanted
        self._labels: dict[int, str] = {}  # id of a fake -> the node that made it, to name views by
        self._alive: list[torch.Tensor] = []  # keeps those ids from being taken again

    def label(self, node: torch.fx.Node) -> str:
        """What the result of ``node`` is to be called."""
        return self._wanted.get(node, node.name)

    def remember(self, node: torch.fx.Node, value: Any) -> None:
        """Let views among the results of ``node`` be named after it."""
        if isinstance(value, torch.Tensor) and id(value) not in self._labels:
            self._labels[id(value)] = self.label(node)
            self._alive.append(value)

    def name(self, value: torch.Tensor) -> str:
        """Name of the tensor that reads ``value`` as it is now."""
        return self.builder.tensor_of(value, self._labels.get(id(value), "view"))

    def create(self, call: Call, result: Any, label: str) -> Any:
        """Append the operator that makes ``result``, each tensor in a buffer of its own; returns it as it is stored.

        Results keep their strides where these have no gaps. Others, and those that share storage with something else,
        are stored row-major, and what follows sees them so.
        """
        stored = self._stored(result)
        tensors = list(tensors_in(stored))
        labels = self._result_labels(call.node, stored, label)
        body, operands = self.body(call)
        names = [self.builder.add_base(t, n, Role.ACTIVATION) for t, n in zip(tensors, labels, strict=True)]
        self._append(call, label, body, operands, names, tensors)
        return stored

    def write(self, call: Call, old: torch.Tensor, label: str) -> None:
        """Append the operator whose result is written over ``old``."""
        body, operands = self.body(call)  # before the new version has a name: it reads the old one
        self._append(call, label, body, operands, [self.builder.new_version(old, label)], [old])

    def create_and_write(
        self, call: Call, result: Sequence[torch.Tensor], olds: Sequence[torch.Tensor], label: str
    ) -> None:
        """Append an operator whose last results are written over ``olds``; the others are its own."""
        body, operands = self.body(call)
        fresh = result[: len(result) - len(olds)]
        labels = [label, *(f"{label}_{position}" for position in range(1, len(fresh)))]
        names = [self.builder.add_base(t, n, Role.ACTIVATION) for t, n in zip(fresh, labels, strict=True)]
        versions = [self.builder.new_version(old, f"{self.name(old)}_updated") for old in olds]
        self._append(call, label, body, operands, [*names, *versions], result)

    def finish(self, updates: Sequence[tuple[torch.Tensor, torch.Tensor]], leaves: Sequence[Any]) -> list[str | None]:
        """Write updated sources last and name the results, ``None`` for those that are no tensors.

        A result or new value that lies in a source about to be overwritten is copied first.
        """
        written = {self.builder.buffer_of(old) for old, new in updates if old is not new}
        safe = [(old, self._safe(new, written)) for old, new in updates if old is not new]
        results = [self._safe(leaf, written) for leaf in leaves]
        for old, new in safe:
            self.write(Call(_CLONE, (new,)), old, f"{self.name(old)}_updated")
        return [self.name(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in results]

    def _safe(self, value: Any, written: set[str]) -> Any:
        if not isinstance(value, torch.Tensor) or self.builder.buffer_of(value) not in written:
            return value
        return self.create(Call(_CLONE, (value,)), _CLONE(value), f"{self.name(value)}_before")

    def _stored(self, result: Any) -> Any:
        tensors = list(tensors_in(result))
        storages = [t.untyped_storage()._cdata for t in tensors]

        def stored(value: torch.Tensor) -> torch.Tensor:
            alone = storages.count(value.untyped_storage()._cdata) == 1 and not self.builder.is_placed(value)
            return value if alone and is_dense(value) else torch.empty(value.shape, dtype=value.dtype)

        return replace_tensors(result, stored)

    def _result_labels(self, node: torch.fx.Node | None, result: Any, label: str) -> list[str]:
        """A name for each tensor of a result: the wanted one of the node that picks it out, or its position."""
        picked = {u.args[1]: u for u in node.users if u.target is operator.getitem} if node is not None else {}
        if isinstance(result, torch.Tensor):
            return [self._wanted.get(picked[0], label) if 0 in picked else label]
        labels: list[str] = []
        for position, item in enumerate(result):
            base = f"{label}_{position}" if position else label
            base = self._wanted.get(picked[position], base) if position in picked else base
            count = len(list(tensors_in(item)))
            labels.extend([base] if isinstance(item, torch.Tensor) else [f"{base}_{i}" for i in range(count)])
        return labels

    def body(self, call: Call) -> tuple[str, list[str]]:
        """The call as text, and the names of the operands it refers to."""
        operands = list(dict.fromkeys(self.name(value) for value in tensors_in((call.args, call.kwargs))))
        index = {name: position for position, name in enumerate(operands)}

        def index_of(value: Any) -> int | None:
            return index[self.name(value)] if isinstance(value, torch.Tensor) else None

        return format_call(str(call.target), call.args, call.kwargs, index_of), operands

    def _append(
        self,
        call: Call,
        label: str,
        body: str,
        operands: Sequence[str],
        names: Sequence[str],
        results: Sequence[torch.Tensor],
    ) -> None:
        flops = count_flops(call.target, call.args, call.kwargs, results)
        collective = collective_of(call.target, call.args, call.kwargs, label)
        self.builder.add_op(label, operands, names, flops=flops, body=body, origin=call.origin, collective=collective)
