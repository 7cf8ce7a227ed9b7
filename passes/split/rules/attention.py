"""Fused attention: queries, keys and values are [batch, heads, sequence, features].

Along the batch or the heads, parts have nothing to do with each other. Along the sequence, causal attention of part i
is over the keys of parts 0 .. i. Kernels align a causal mask with the first query and the first key, so a part behind
the first runs two: one over all keys of earlier parts, without a mask, and one over its own, causal. Each returns the
logarithm of the sum of its exponentials, which says what share of the softmax it saw; so the two merge exactly
("online softmax", Milakov and Gimelshein 2018, arXiv 1805.02867; as in FlashAttention, arXiv 2205.14135, algorithm 1).

Backward, a block of queries against a block of keys needs only the result and the logarithm of the whole row, so the
same two blocks give a part's gradients; the gradients of its keys are summed over the parts behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Result
from ._attention import (
    BATCH,
    HEADS,
    KERNELS,
    MIXED,
    PADDING,
    SEQUENCE,
    Kernel,
    before,
    independent,
    mask_rows,
    never,
    not_triangular,
    shape_of,
)
from ._operands import first_cut

__all__ = ["RULES"]

aten = torch.ops.aten


def _forward(kernel: Kernel) -> Callable[[Call], Outcome]:
    """The rule of an operator that attends."""

    def divide(call: Call) -> Outcome:
        if refused := never(call, kernel):
            return refused
        along = first_cut(call, ("query", "key", "value"))
        if along is None:
            return Refused("attention whose mask alone is cut")
        if along.dim in (BATCH, HEADS):
            needs = independent(call, kernel, along, ("query", "key", "value"))
            if needs is None:
                return Refused(MIXED)
            return Divided(_results(call, kernel, _query_state(call, along)), call.states(**needs))
        return _forward_sequence(call, kernel, along)

    return divide


def _query_state(call: Call, along: Along) -> Along:
    """``along`` with the scale that the queries have: keys and values may have fewer heads."""
    return call.division.along(shape_of(call, "query"), along.dim, along.blocks) or along


def _results(call: Call, kernel: Kernel, along: Along) -> Result:
    """States of what a forward operator returns; lengths, seeds and offsets matter to dropout alone."""
    return (along, along, *[WHOLE] * (kernel.outputs - 2))


def _forward_sequence(call: Call, kernel: Kernel, along: Along) -> Outcome:
    """Queries cut along the sequence, or features cut, which is refused."""
    query = call.operand("query")
    if along.dim != SEQUENCE or query is None:
        return Refused("attention cut along its features")
    if not isinstance(query.state, Along):
        return Refused("attention whose keys alone are cut")
    if _padded(call, kernel):
        return Refused(f"logarithms of {query.shape[SEQUENCE]} rows, which are no multiple of {PADDING}")
    result = _results(call, kernel, query.state)
    if _dropped(call, kernel):
        result = (query.state, *[WHOLE] * (kernel.outputs - 1))
    if not call.arguments["is_causal"]:
        needs = {"key": WHOLE, "value": WHOLE} | mask_rows(call, kernel, query.state)
        reason = "every query attends to all keys"
        return Divided(result, call.states(**needs), emit=_block(kernel), reason=reason)
    if refused := not_triangular(call, query.state):
        return refused
    return Divided(result, call.states(key=query.state, value=query.state), emit=_causal(kernel))


def _dropped(call: Call, kernel: Kernel) -> bool:
    """Whether the operator returns an empty tensor in place of logarithms."""
    return kernel.logarithms == "padded" and not call.arguments["compute_log_sumexp"]


def _padded(call: Call, kernel: Kernel) -> bool:
    """Whether the logarithms of the whole are longer than its rows, so that those of parts do not join to them."""
    rows = shape_of(call, "query")[SEQUENCE]
    return kernel.logarithms == "padded" and not _dropped(call, kernel) and rows % PADDING != 0


def _block(kernel: Kernel) -> Callable[[Part], tuple[Node, ...]]:
    """A part's queries against all keys."""

    def emit(part: Part) -> tuple[Node, ...]:
        return _unpadded(part, kernel, part.again())

    return emit


def _causal(kernel: Kernel) -> Callable[[Part], tuple[Node, ...]]:
    """A part's queries against the keys of earlier parts, and against its own."""

    def emit(part: Part) -> tuple[Node, ...]:
        given = dict(kernel.partial or {}) if part.division.count > 1 else {}
        own = _unpadded(part, kernel, part.again(**given))
        if part.index:
            key, value = before(part, "key"), before(part, "value")
            earlier = _unpadded(part, kernel, part.again(**given, key=key, value=value, is_causal=False))
            own = (*_merged(part, kernel, own, earlier), *own[2:])
        if _dropped(part.call, kernel):
            own = (own[0], part.make(aten.slice.Tensor, own[1], SEQUENCE, 0, 0), *own[2:])
        return own

    return emit


def _unpadded(part: Part, kernel: Kernel, call: Node) -> tuple[Node, ...]:
    """The results of a call; logarithms without padding."""
    items = [part.make(operator.getitem, call, index) for index in range(kernel.outputs)]
    if kernel.lengths:
        items[4:6] = part.call.value[4:6]
    if kernel.logarithms == "padded" and items[1].meta["val"].shape[-1]:
        rows = items[0].meta["val"].shape[SEQUENCE]
        items[1] = part.make(aten.slice.Tensor, items[1], SEQUENCE, 0, rows)
    return tuple(items)


def _merged(part: Part, kernel: Kernel, own: tuple[Node, ...], earlier: tuple[Node, ...]) -> tuple[Node, Node]:
    """Result and logarithms of a softmax over two sets of keys.

    With logarithms a and b, the shares are exp(a) / (exp(a) + exp(b)) = sigmoid(a - b) and the rest; both are in the
    precision of the logarithms.
    """
    make = part.make
    difference = make(aten.sub.Tensor, earlier[1], own[1])
    share = make(aten.sigmoid.default, difference)
    if kernel.logarithms != "column":
        share = make(aten.unsqueeze.default, share, -1)
    kind, precise = own[0].meta["val"].dtype, own[1].meta["val"].dtype
    first, second = (
        node if kind == precise else make(aten._to_copy.default, node, dtype=precise) for node in (earlier[0], own[0])
    )
    gap = make(aten.sub.Tensor, first, second)
    mixed = make(aten.add.Tensor, second, make(aten.mul.Tensor, gap, share))
    if kind != precise:
        mixed = make(aten._to_copy.default, mixed, dtype=kind)
    smaller = make(aten.exp.default, make(aten.neg.default, make(aten.abs.default, difference)))
    rest = make(aten.log1p.default, smaller)
    return mixed, make(aten.add.Tensor, make(aten.maximum.default, earlier[1], own[1]), rest)


# --- before it is known which kernel attends -------------------------------------------------------------------

_COMPOSITE = Kernel(1, "attn_mask")


def _composite(call: Call) -> Outcome:
    """``scaled_dot_product_attention``, which returns no logarithms: a part has a mask in place of two blocks."""
    if refused := never(call, _COMPOSITE):
        return refused
    along = first_cut(call, ("query", "key", "value"))
    if along is None:
        return Refused("attention whose mask alone is cut")
    if along.dim in (BATCH, HEADS):
        needs = independent(call, _COMPOSITE, along, ("query", "key", "value"))
        return Refused(MIXED) if needs is None else Divided(_query_state(call, along), call.states(**needs))
    query = call.operand("query")
    if along.dim != SEQUENCE or query is None or query.along is None:
        return Refused(MIXED)
    if call.arguments["is_causal"]:
        refused = not_triangular(call, query.along)
        states = call.states(key=query.along, value=query.along)
        return refused or Divided(query.along, states, emit=_under_a_mask)
    needs = {"key": WHOLE, "value": WHOLE, **mask_rows(call, _COMPOSITE, query.along)}
    return Divided(query.along, call.states(**needs), reason="every query attends to all keys")


def _under_a_mask(part: Part) -> Node:
    """A part's queries against the keys up to its own, of which row r sees those up to the part's r-th."""
    if part.index == 0:
        return part.again()
    key, value = before(part, "key", own=True), before(part, "value", own=True)
    rows, keys = part.operand(0).meta["val"].shape[SEQUENCE], key.meta["val"].shape[SEQUENCE]
    device = key.meta["val"].device
    every = part.make(aten.ones.default, [rows, keys], dtype=torch.bool, device=device)
    mask = part.make(aten.tril.default, every, keys - rows)
    return part.again(key=key, value=value, attn_mask=mask, is_causal=False)


RULES: dict[str, Rule] = {
    **{f"aten::{name}": Rule(_forward(kernel), seeded=True) for name, kernel in KERNELS.items()},
    "aten::scaled_dot_product_attention": Rule(_composite, seeded=True),
}
