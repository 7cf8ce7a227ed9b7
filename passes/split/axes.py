"""Which dimensions of which inputs could carry the tokens: a guess by extents, that a split checks.

A wrong guess costs speed and never correctness: what cannot be divided is joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule

from ...errors import OptionError

__all__ = ["token_axes"]


def token_axes(module: GraphModule, candidates: Sequence[str]) -> tuple[Mapping[str, int], ...]:
    """Choices for ``axes`` of ``split``, the most promising first: along the batch, then along the sequence.

    ``candidates`` are the placeholders that are no parameters, the one that leads first: token ids or hidden states,
    then what comes along with them (positions, masks, tangents). Each choice cuts the leading one along its first
    dimension, or its second if it has more than one (hidden states: three), and the others where they have the same
    extent: at the same dimension if that fits, else at the first that does. Those that have it nowhere are left away;
    the split slices them where they meet tokens.

    Raises:
        OptionError: a candidate is no placeholder that is a tensor.
    """
    shapes = [_shape(module, name) for name in candidates]
    choices: list[Mapping[str, int]] = []
    if not shapes:
        return ()
    for dim in range(_carriers(module, candidates[0])):
        extent = shapes[0][dim]
        if extent < 2:
            continue
        found = {name: _place(shape, dim, extent) for name, shape in zip(candidates, shapes, strict=True)}
        choices.append({name: place for name, place in found.items() if place is not None})
    return tuple(choices)


def _place(shape: Sequence[int], dim: int, extent: int) -> int | None:
    """The dimension of ``shape`` that has ``extent``: ``dim`` if it does, else the first."""
    if dim < len(shape) and shape[dim] == extent:
        return dim
    return next((place for place, own in enumerate(shape) if own == extent), None)


def _carriers(module: GraphModule, name: str) -> int:
    """How many leading dimensions may carry tokens: both of ids, all but the last of hidden states; at most two."""
    value = _value(module, name)
    features = value.dim() > 1 and value.dtype.is_floating_point
    return min(value.dim() - features, 2)


def _shape(module: GraphModule, name: str) -> tuple[int, ...]:
    return tuple(extent if isinstance(extent, int) else -1 for extent in _value(module, name).shape)


def _value(module: GraphModule, name: str) -> torch.Tensor:
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name == name and isinstance(value, torch.Tensor):
            return value
    raise OptionError(f"there is no tensor {name!r} among the module's placeholders")
