"""Which calls are worth a cut between them: products, convolutions, attention, lookups in a table of weights."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..flops import count_flops

__all__ = ["is_heavy"]

_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "einsum", "bilinear"})
_OTHERS = ("embedding", "scaled_dot_product", "conv", "lstm", "gru", "rnn_", "grouped_mm", "flex_attention")


def is_heavy(node: fx.Node) -> bool:
    """Whether most of a model's time is in calls such as ``node``; products of two vectors are not."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.partition("::")[2].strip("_")
    if name not in _PRODUCTS:
        return name.startswith(_OTHERS)
    out = node.meta.get("val")
    if not isinstance(out, torch.Tensor):
        return True
    args, kwargs = pytree.tree_map(_value, (node.args, node.kwargs))
    return count_flops(node.target, args, kwargs, [out]) > 2 * math.prod(out.shape)


def _value(leaf: object) -> object:
    return leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
