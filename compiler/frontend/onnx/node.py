"""What a lowering sees: one ONNX node with typed attributes; its inputs are tensors, known constants, or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto

from ....errors import ModelError

__all__ = ["CannotLower", "Literal", "Lowered", "Lowering", "Node", "Value"]

#: A compile-time constant as a lowering returns it (Shape, Size): numpy, so that tracing never sees it.
Literal = np.ndarray[Any, Any]
#: What a lowering returns for one output; ``None`` for an optional output that the node does not use.
Lowered = torch.Tensor | Literal | None


class CannotLower(Exception):
    """The lowering does not cover this use of the operator; the node falls back to the reference implementation."""


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One ONNX value while importing.

    ``traced`` is the fake tensor recorded in the graph, ``constant`` the value where it is known. A value known only
    because an example input was given carries the names of those inputs in ``sources``.
    """

    name: str
    traced: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    sources: frozenset[str] = frozenset()
    #: The name of an element type of less than 8 bits that the tensor holds in a wider one; empty for all others.
    packed: str = ""
    #: Values of a list built while importing (SequenceConstruct and its kin); never part of the graph.
    sequence: tuple[Value, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's sizes."""
        return tuple(self._any().shape)

    @property
    def dtype(self) -> torch.dtype:
        """The value's element type."""
        return self._any().dtype

    def _any(self) -> torch.Tensor:
        tensor = self.traced if self.traced is not None else self.constant
        if tensor is None:
            raise CannotLower(f"{self.name!r} is a sequence")
        return tensor


@dataclass(frozen=True, eq=False)
class Node:
    """One ONNX node, ready to be lowered.

    ``opset`` is the version of the operator set that gives the node its meaning. ``resolve`` turns a value into the
    tensor to compute with, ``demand`` into its constant, ``literal`` an array into a tensor of the graph.
    """

    proto: onnx.NodeProto
    opset: int
    inputs: tuple[Value | None, ...]
    resolve: Callable[[Value], torch.Tensor] = field(repr=False)
    demand: Callable[[Value], Literal] = field(repr=False)
    literal: Callable[[Literal, str], torch.Tensor] = field(repr=False)
    attributes: Mapping[str, AttributeProto] = field(repr=False)

    @property
    def op_type(self) -> str:
        """The operator's name."""
        return self.proto.op_type

    def __str__(self) -> str:
        name = self.proto.name or next((output for output in self.proto.output if output), "")
        return f"node {name!r} ({self.proto.op_type})"

    def has(self, index: int) -> bool:
        """Whether optional input ``index`` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def wants(self, index: int) -> bool:
        """Whether optional output ``index`` is used."""
        return index < len(self.proto.output) and self.proto.output[index] != ""

    def value(self, index: int) -> Value:
        """Input ``index``; ModelError if it is missing."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise ModelError(f"{self} lacks its input {index}")
        return value

    def tensor(self, index: int) -> torch.Tensor:
        """Input ``index`` as a tensor to compute with."""
        return self.resolve(self.value(index))

    def tensors(self) -> list[torch.Tensor]:
        """All inputs that are given, as tensors."""
        return [self.resolve(value) for value in self.inputs if value is not None]

    def optional(self, index: int) -> torch.Tensor | None:
        """Input ``index`` as a tensor, ``None`` if absent."""
        return self.tensor(index) if self.has(index) else None

    def is_constant(self, index: int) -> bool:
        """Whether input ``index`` is known without relying on an example input."""
        value = self.value(index)
        return value.constant is not None and not value.sources

    def constant(self, index: int) -> Literal:
        """The known value of input ``index``; CannotLower if it is only known when the model runs."""
        return self.demand(self.value(index))

    def int_list(self, index: int) -> list[int]:
        """The known value of input ``index`` as a list of int."""
        return [int(item) for item in self.constant(index).reshape(-1).tolist()]

    def float_list(self, index: int) -> list[float]:
        """The known value of input ``index`` as a list of float."""
        return [float(item) for item in self.constant(index).reshape(-1).tolist()]

    def scalar(self, index: int) -> Any:
        """The known value of one-element input ``index`` as a Python number."""
        constant = self.constant(index)
        if constant.size != 1:
            raise ModelError(f"{self} expects one element in input {index}, was given shape {list(constant.shape)}")
        return constant.reshape(()).item()

    def integer(self, name: str, default: int | None = None) -> int:
        """Attribute ``name`` of type INT; without a default it is required."""
        return int(self._attribute(name, AttributeProto.INT, "i", default))

    def flag(self, name: str, default: bool = False) -> bool:
        """Attribute ``name`` of type INT read as a truth value."""
        return bool(self.integer(name, int(default)))

    def number(self, name: str, default: float | None = None) -> float:
        """Attribute ``name`` of type FLOAT; without a default it is required."""
        return float(self._attribute(name, AttributeProto.FLOAT, "f", default))

    def string(self, name: str, default: str | None = None) -> str:
        """Attribute ``name`` of type STRING; without a default it is required."""
        found = self._attribute(name, AttributeProto.STRING, "s", default)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Attribute ``name`` of type INTS; without a default it is required."""
        return [int(item) for item in self._attribute(name, AttributeProto.INTS, "ints", default)]

    def numbers(self, name: str, default: Sequence[float] | None = None) -> list[float]:
        """Attribute ``name`` of type FLOATS; without a default it is required."""
        return [float(item) for item in self._attribute(name, AttributeProto.FLOATS, "floats", default)]

    def given(self, name: str) -> bool:
        """Whether attribute ``name`` is given."""
        return name in self.attributes

    def _attribute(self, name: str, kind: int, slot: str, default: Any) -> Any:
        attribute = self.attributes.get(name)
        if attribute is None:
            if default is None:
                raise ModelError(f"{self} lacks its attribute {name!r}")
            return default
        if attribute.type != kind:
            expected = AttributeProto.AttributeType.Name(kind)
            found = AttributeProto.AttributeType.Name(attribute.type)
            raise ModelError(f"{self}: attribute {name!r} is {found}, expected {expected}")
        return getattr(attribute, slot)

    def axis(self, axis: int, rank: int) -> int:
        """``axis`` counted from the front; ModelError if it is outside a tensor of ``rank`` dimensions."""
        if not -rank <= axis < max(rank, 1):
            raise ModelError(f"{self}: axis {axis} is outside the {rank} dimensions of its input")
        return axis + rank if axis < 0 else axis


#: A lowering computes a node's outputs with torch functions, on traced or on real tensors alike.
Lowering = Callable[[Node], Lowered | Sequence[Lowered]]
