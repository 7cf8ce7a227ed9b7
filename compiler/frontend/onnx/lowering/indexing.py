"""Operators that select or write elements at given indices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from ..node import Lowered, Lowering, Node
from ..types import shape_elements
from .aten import aten

__all__ = ["TABLE", "index_dimension"]


def index_dimension(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """``x`` with the elements ``index`` (int64, of any rank, negative from the end) along ``dim``."""
    return aten("index.Tensor", x, [None] * dim + [index])


def _gather(node: Node) -> Lowered:
    x = node.tensor(0)
    axis = node.axis(node.integer("axis", 0), x.dim())
    index = node.value(1)
    if node.is_constant(1) and not index.shape and -x.shape[axis] <= node.scalar(1) < x.shape[axis]:
        return torch.select(x, axis, int(node.scalar(1)))
    return index_dimension(x, axis, node.tensor(1).to(torch.int64))


def _wrapped(index: torch.Tensor, size: int) -> torch.Tensor:
    """Indices with negative ones counted from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def _gather_elements(node: Node) -> Lowered:
    x = node.tensor(0)
    axis = node.axis(node.integer("axis", 0), x.dim())
    return torch.gather(x, axis, _wrapped(node.tensor(1), x.shape[axis]))


def _gather_nd(node: Node) -> Lowered:
    x, indices, batch = node.tensor(0), node.tensor(1).to(torch.int64), node.integer("batch_dims", 0)
    depth = indices.shape[-1]
    selectors: list[torch.Tensor] = []
    for dim in range(batch):
        sizes = [1] * (indices.dim() - 1)
        sizes[dim] = x.shape[dim]
        selectors.append(node.literal(np.arange(x.shape[dim]).reshape(sizes), "batch_index"))
    selectors += [torch.select(indices, -1, position) for position in range(depth)]
    return aten("index.Tensor", x, selectors) if selectors else x.clone()


def _scatter_elements(node: Node) -> Lowered:
    x, index, updates = node.tensor(0), node.tensor(1), node.tensor(2)
    axis = node.axis(node.integer("axis", 0), x.dim())
    index = _wrapped(index, x.shape[axis])
    reduction = node.string("reduction", "none")
    if reduction == "none":
        return torch.scatter(x, axis, index, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return torch.scatter_reduce(x, axis, index, updates, names[reduction])


def _scatter_nd(node: Node) -> Lowered:
    x, indices, updates = node.tensor(0), node.tensor(1).to(torch.int64), node.tensor(2)
    reduction = node.string("reduction", "none")
    depth = indices.shape[-1]
    selectors = [torch.select(indices, -1, position) for position in range(depth)]
    if reduction in ("none", "add"):
        return aten("index_put", x, selectors, updates, reduction == "add")
    names = {"mul": "prod", "max": "amax", "min": "amin"}
    rows, width = math.prod(x.shape[:depth]), math.prod(x.shape[depth:])
    flat = torch.zeros_like(selectors[0])
    for position, selector in enumerate(selectors):
        flat = flat * x.shape[position] + _wrapped(selector, x.shape[position])
    flat = flat.reshape(-1, 1).expand(-1, width)
    result = torch.scatter_reduce(x.reshape(rows, width), 0, flat, updates.reshape(-1, width), names[reduction])
    return result.reshape(x.shape)


def _one_hot(node: Node) -> Lowered:
    indices, values = node.tensor(0), node.tensor(2)
    depth, axis = int(node.scalar(1)), node.axis(node.integer("axis", -1), indices.dim() + 1)
    shape_elements((*indices.shape, depth), str(node))
    positions = indices.to(torch.int64).unsqueeze(axis)
    positions = torch.where(positions < 0, positions + depth, positions)
    sizes = [1] * (indices.dim() + 1)
    sizes[axis] = depth
    hot = positions == node.literal(np.arange(depth).reshape(sizes), "classes")
    return torch.where(hot, torch.select(values, 0, 1), torch.select(values, 0, 0))


TABLE: Mapping[str, Lowering] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "Scatter": _scatter_elements,
    "ScatterND": _scatter_nd,
    "OneHot": _one_hot,
}
