"""Gradients of fused attention: a block of queries against a block of keys, given the whole rows' logarithms."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..rule import Call, Divided, Outcome, Part, Refused, Rule
from ..state import WHOLE, Along, Partial, Result, State
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
)
from ._operands import first_cut, packed

__all__ = ["RULES"]

aten = torch.ops.aten


def _backward(kernel: Kernel) -> Callable[[Call], Outcome]:
    """The rule of an operator that gives the gradients of queries, keys and values."""
    rows = (kernel.grad_out, "query", "out", "logsumexp")

    def divide(call: Call) -> Outcome:
        if refused := never(call, kernel):
            return refused
        if kernel.mask and call.operand(kernel.mask) is not None and _wants_mask(call):
            return Refused("the gradient of an attention mask")
        along = first_cut(call, (*rows, "key", "value"))
        if along is None:
            return Refused("attention whose mask alone is cut")
        if along.dim in (BATCH, HEADS):
            needs = independent(call, kernel, along, (*rows, "key", "value"))
            if needs is None:
                return Refused(MIXED)
            return Divided(_gradients(call, needs["query"], needs["key"], needs["value"]), call.states(**needs))
        return _backward_sequence(call, kernel, along, rows)

    return divide


def _wants_mask(call: Call) -> bool:
    """Whether the gradient of the mask is asked for."""
    wanted = call.arguments.get("grad_input_mask")
    return bool(wanted[3]) if wanted else False


def _gradients(call: Call, query: State, key: State, value: State) -> Result:
    """States of the gradients; None, which stands for that of the mask, is Whole."""
    return (query, key, value, *[WHOLE] * (len(call.value) - 3))


def _backward_sequence(call: Call, kernel: Kernel, along: Along, rows: tuple[str, ...]) -> Outcome:
    """Gradients of queries cut along the sequence."""
    query = call.operand("query")
    if along.dim != SEQUENCE or query is None:
        return Refused("attention cut along its features")
    state = query.along or along
    if any(operand is None or operand.state not in (state, WHOLE) for operand in map(call.operand, rows)):
        return Refused(MIXED)
    if kernel.logarithms == "padded" and query.shape[SEQUENCE] % PADDING:
        return Refused(f"logarithms of {query.shape[SEQUENCE]} rows, which are no multiple of {PADDING}")
    needs: dict[str, State] = dict.fromkeys(rows, state)
    if not call.arguments["is_causal"]:
        needs |= {"key": WHOLE, "value": WHOLE, **mask_rows(call, kernel, state)}
        result = _gradients(call, state, Partial(), Partial())
        reason = "every query attends to all keys"
        return Divided(result, call.states(**needs), emit=_backward_block(kernel), reason=reason)
    if refused := not_triangular(call, state):
        return refused
    needs |= {"key": state, "value": state}
    result = _gradients(call, state, state, state)
    return Divided(result, call.states(**needs), emit=_backward_causal(kernel), last_first=True)


def _logarithms(part: Part, kernel: Kernel) -> dict[str, Any]:
    """The logarithms as the operator wants them: without gaps; padded with infinities, as its forward half does."""
    if kernel.logarithms == "strided":
        return {}
    node = packed(part, "logsumexp")
    missing = -node.meta["val"].shape[-1] % PADDING if kernel.logarithms == "padded" else 0
    padded = part.make(aten.constant_pad_nd.default, node, [0, missing], torch.inf) if missing else node
    return {"logsumexp": padded}


def _operand(part: Part, name: str) -> Node:
    """The part's node of an operand."""
    place = part.call.at(name)
    assert place is not None
    return part.operand(place)


def _lengths(kernel: Kernel, query: Node, key: Node) -> dict[str, int]:
    """The greatest lengths of queries and keys, where the operator asks for them."""
    if not kernel.lengths:
        return {}
    return {"max_q": query.meta["val"].shape[SEQUENCE], "max_k": key.meta["val"].shape[SEQUENCE]}


def _three(part: Part, kernel: Kernel, given: dict[str, Any]) -> tuple[Node, ...]:
    """Gradients of one block; those of the mask are none."""
    query, key = _operand(part, "query"), given.get("key", _operand(part, "key"))
    call = part.again(**given, **_logarithms(part, kernel), **_lengths(kernel, query, key))
    return tuple(part.make(operator.getitem, call, index) for index in range(len(part.call.value)))


def _backward_block(kernel: Kernel) -> Callable[[Part], tuple[Node, ...]]:
    """Gradients of a part's queries, and what they add to those of all keys."""
    return lambda part: _three(part, kernel, {})


def _backward_causal(kernel: Kernel) -> Callable[[Part], tuple[Node, ...]]:
    """Gradients of a part, from the last part to the first.

    Behind its results a part returns what it and the parts behind it add to the gradients of earlier keys and values,
    so that the gradients of the last part wait for nothing else.
    """

    def emit(part: Part) -> tuple[Node, ...]:
        query, *own = _three(part, kernel, {})
        given: dict[str, Any] = {"is_causal": False}
        rest: list[Node] = []
        if part.index:
            given |= {"key": before(part, "key"), "value": before(part, "value")}
            more, *rest = _three(part, kernel, given)[:3]
            query = part.make(aten.add.Tensor, query, more)
        carried = part.earlier[-1][-2:] if part.earlier else ()  # type: ignore[index]
        if carried:
            start, end = part.division.bounds(_key_state(part), part.index)
            added = [part.make(aten.slice.Tensor, node, SEQUENCE, start, end) for node in carried]
            own[:2] = [part.make(aten.add.Tensor, *pair) for pair in zip(own, added, strict=False)]
            kept = [part.make(aten.slice.Tensor, node, SEQUENCE, 0, start) for node in carried] if start else []
            rest = [part.make(aten.add.Tensor, *pair) for pair in zip(rest, kept, strict=True)]
        return (query, *own, *rest)

    return emit


def _key_state(part: Part) -> Along:
    """How keys and values are cut."""
    key = part.call.operand("key")
    assert key is not None
    along = part.division.along(key.shape, SEQUENCE)
    assert along is not None
    return along


RULES: dict[str, Rule] = {
    f"aten::{name}_backward": Rule(_backward(kernel), seeded=True) for name, kernel in KERNELS.items()
}
