"""What differs between the fused attention operators, and what their rules have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..rule import Call, Part, Refused
from ..state import WHOLE, Along, State

__all__ = [
    "BATCH",
    "HEADS",
    "KERNELS",
    "Kernel",
    "MIXED",
    "PADDING",
    "SEQUENCE",
    "before",
    "independent",
    "mask_rows",
    "never",
    "not_triangular",
    "shape_of",
]

aten = torch.ops.aten

BATCH, HEADS, SEQUENCE = 0, 1, 2
MIXED = "attention in which queries and keys are not cut alike"


@dataclass(frozen=True)
class Kernel:
    """What differs between the operators: names of arguments, places of results, shape of the logarithms.

    ``logarithms`` is "rows" [batch, heads, queries], "strided" (the same, which may have gaps in memory), "column" (the
    same with a last dimension of 1), or "padded" (rows up to a multiple of 32, with infinities). ``partial`` are
    arguments for a block among others.
    """

    outputs: int
    mask: str | None = None
    logarithms: str = "rows"
    lengths: bool = False
    partial: Mapping[str, Any] | None = None
    grad_out: str = "grad_out"


KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": Kernel(2, "attn_mask", "strided"),
    "_scaled_dot_product_flash_attention": Kernel(9, None, lengths=True),
    "_scaled_dot_product_efficient_attention": Kernel(
        4, "attn_bias", "padded", partial={"compute_log_sumexp": True}, grad_out="grad_out_"
    ),
    "_scaled_dot_product_cudnn_attention": Kernel(
        9, "attn_bias", "column", lengths=True, partial={"compute_log_sumexp": True}
    ),
    "_scaled_dot_product_fused_attention_overrideable": Kernel(9, "attn_bias", lengths=True),
}
PADDING = 32


def never(call: Call, kernel: Kernel) -> Refused | None:
    """What no cut of this call can be right for."""
    if call.arguments["dropout_p"]:
        return Refused("attention with dropout draws its numbers for the whole tensor")
    if call.arguments.get("return_debug_mask"):
        return Refused("attention that returns its probabilities")
    if any(len(shape_of(call, name)) != 4 for name in ("query", "key", "value")):
        return Refused("attention on other than four dimensions")
    if call.arguments["is_causal"] and kernel.mask and call.operand(kernel.mask) is not None:
        return Refused("attention with a mask and causal besides")
    return None


def shape_of(call: Call, name: str) -> tuple[int, ...]:
    """The shape of an argument that is a tensor."""
    operand = call.operand(name)
    return operand.shape if operand is not None else ()


def independent(call: Call, kernel: Kernel, along: Along, names: tuple[str, ...]) -> dict[str, State] | None:
    """States of the operands for parts of the batch or of the heads; None where they do not divide alike."""
    needs: dict[str, State] = {}
    blocks = along.blocks
    for name in names:
        cut = call.division.along(shape_of(call, name), along.dim, blocks)
        operand = call.operand(name)
        if cut is None or operand is None or operand.state not in (cut, WHOLE):
            return None
        needs[name] = cut
    mask = call.operand(kernel.mask) if kernel.mask else None
    if mask is not None:
        needs[mask.name] = _mask_state(call, kernel, along)
        if mask.state not in (needs[mask.name], WHOLE):
            return None
    return needs


def _mask_state(call: Call, kernel: Kernel, along: Along) -> State:
    """How the mask, which broadcasts to [batch, heads, queries, keys], is needed by queries cut as ``along``."""
    shape = shape_of(call, kernel.mask or "")
    dim = along.dim - (4 - len(shape))
    if dim < 0 or shape[dim] == 1:
        return WHOLE
    return call.division.along(shape, dim, along.blocks) or along.at(dim)


def mask_rows(call: Call, kernel: Kernel, along: Along) -> dict[str, State]:
    """The mask's rows go with the queries."""
    if kernel.mask is None or call.operand(kernel.mask) is None:
        return {}
    return {kernel.mask: _mask_state(call, kernel, along)}


def not_triangular(call: Call, along: Along) -> Refused | None:
    """Why causal attention cannot be cut into a block over earlier keys and one over its own."""
    if along.blocks != 1:
        return Refused("causal attention over tokens that do not lie together")
    length = shape_of(call, "query")[SEQUENCE]
    for name in ("key", "value"):
        operand = call.operand(name)
        if operand is None or operand.shape[SEQUENCE] != length or operand.state not in (along, WHOLE):
            return Refused(MIXED)
    return None


def before(part: Part, name: str, own: bool = False) -> Node:
    """What the parts before this one, and with ``own`` this one, hold of an operand, along the sequence."""
    place = part.call.at(name)
    assert place is not None
    nodes = [part.operand(place, j) for j in range(part.index + own)]
    return nodes[0] if len(nodes) == 1 else part.make(aten.cat.default, nodes, SEQUENCE)
