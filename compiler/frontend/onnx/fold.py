"""Folding: what can be computed from constants alone is computed once, while importing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ....errors import ModelError
from ...runtime.custom_ops import tensor_from_numpy, tensor_to_numpy
from .graph import untraced
from .node import CannotLower, Literal, Lowered, Lowering, Node, Value
from .types import MAX_CONSTANT_BYTES, shape_elements

__all__ = ["check_outputs", "fold", "known"]

#: These make their own size check, or make nothing larger than what they are given.
_SAFE = frozenset({"ConstantOfShape", "Identity", "Transpose", "Unsqueeze", "Squeeze", "Reshape", "Cast", "Shape"})


def known(value: Value) -> torch.Tensor:
    """The constant of ``value``; CannotLower where it has none."""
    if value.constant is None:
        raise CannotLower(f"{value.name!r} is only known when the model runs")
    return value.constant


def as_sequence(results: Lowered | Sequence[Lowered]) -> tuple[Lowered, ...]:
    """A lowering's result as a tuple, one entry an output."""
    if results is None or isinstance(results, torch.Tensor | np.ndarray):
        return (results,)
    return tuple(results)


def check_outputs(node: Node, results: Sequence[Lowered], limit_bytes: int | None = None) -> None:
    """ModelError if an output is absurdly large, or larger than ``limit_bytes``."""
    for index, result in enumerate(results):
        if result is None:
            continue
        elements = shape_elements(tuple(int(size) for size in result.shape), f"output {index} of {node}")
        if limit_bytes is not None and elements * result.dtype.itemsize > limit_bytes:
            raise ModelError(f"output {index} of {node} is a constant of shape {list(result.shape)}, "
                             f"more than the {limit_bytes} bytes that one constant may have")  # fmt: skip


def _fake_run(node: Node, lowering: Lowering) -> None:
    """Compute only the shapes, so that a constant that would not fit in memory is refused before it is made."""
    mode = FakeTensorMode()

    def resolve(value: Value) -> torch.Tensor:
        return mode.from_tensor(known(value))

    def literal(array: Literal, name: str) -> torch.Tensor:
        del name
        with untraced():
            constant = tensor_from_numpy(array)
        return mode.from_tensor(constant)

    with mode:
        results = as_sequence(lowering(replace(node, resolve=resolve, demand=demand_known, literal=literal)))
    check_outputs(node, results, MAX_CONSTANT_BYTES)


def demand_known(value: Value) -> Literal:
    """The constant of ``value`` as an array."""
    with untraced():
        return tensor_to_numpy(known(value))


def fold(node: Node, lowering: Lowering) -> tuple[torch.Tensor | None, ...]:
    """The node's outputs as real tensors; all its inputs are constants.

    Raises CannotLower where the lowering does not cover the node, ModelError where a result would exceed 8 GiB.
    """
    with untraced():
        if node.op_type not in _SAFE:
            _fake_run(node, lowering)

        def literal(array: Literal, name: str) -> torch.Tensor:
            del name
            return tensor_from_numpy(array)

        results = as_sequence(lowering(replace(node, resolve=known, demand=demand_known, literal=literal)))
        check_outputs(node, results, MAX_CONSTANT_BYTES)
        return tuple(result if isinstance(result, torch.Tensor | None) else tensor_from_numpy(result)
                     for result in results)  # fmt: skip
