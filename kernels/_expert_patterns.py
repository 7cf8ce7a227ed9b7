"""Finds the parts of a mixture of experts in a graph, as models spell them around ``torch._grouped_mm``.

Spellings without it cannot be matched: a loop over experts has sizes that only the values of a tensor say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace

from ..compiler.graph import DTYPE_BYTES, Op, Tensor
from ._experts import MOST_EXPERTS
from ._match import CASTS, Walk, any_tensor, call, either, is_row_major, literal, number, reshaped

__all__ = ["GroupedProduct", "Routing", "gathered", "grouped_product", "inverted", "is_order", "routings", "tokens"]

_FLOATS = ("float32", "float16", "bfloat16")
_CAST_NAMES = tuple(target.split(".")[1] for target in CASTS)


@dataclass(frozen=True)
class GroupedProduct:
    """``torch._grouped_mm(x, weight, ends)``, or some of its columns, with ``weight`` cut to these."""

    x: Tensor
    weight: Tensor
    ends: Tensor


def grouped_product(walk: Walk, tensor: Tensor) -> GroupedProduct | None:
    """What ``tensor`` is the result of, if that is a grouped product, of any two operands."""
    base = walk.graph.buffers.get(tensor.buffer)
    made = None if base is None else walk.writer(tensor if tensor.name == base.name else _view(base))
    if base is None or made is None or made[0].target != "aten._grouped_mm.default":
        return None
    arguments, keywords = walk.arguments(made[0])
    given = dict(zip(("x", "weight", "offs", "bias", "out_dtype"), arguments, strict=False)) | keywords
    x, weight, ends = given.pop("x"), given.pop("mat2", None) or given.pop("weight", None), given.pop("offs", None)
    if not isinstance(weight, Tensor) or not isinstance(ends, Tensor) or any(v is not None for v in given.values()):
        return None
    same = x.dtype == weight.dtype == base.dtype and base.dtype in _FLOATS
    if not same or ends.dtype != "int32" or not 0 < ends.shape[0] <= MOST_EXPERTS or not is_row_major(ends):
        return None
    if (tensor.shape, tensor.element_strides, tensor.offset_bytes) == (base.shape, base.element_strides, 0):
        return GroupedProduct(x, weight, ends)
    return _columns(GroupedProduct(x, weight, ends), tensor, base)


def _view(tensor: Tensor) -> Tensor:
    """The tensor under no name: what wrote it is known only if that is all that ever did."""
    return replace(tensor, name="")


def _name(op: Op) -> str:
    """``mul`` of ``aten.mul.Tensor``, empty for other namespaces."""
    namespace, _, rest = op.target.partition(".")
    return rest.partition(".")[0] if namespace == "aten" else ""


def _columns(product: GroupedProduct, tensor: Tensor, base: Tensor) -> GroupedProduct | None:
    """The product that gives ``tensor``, if these are neighbouring columns of ``base``."""
    weight, size = product.weight, DTYPE_BYTES[base.dtype]
    if len(tensor.shape) != 2 or len(weight.shape) != 3 or tensor.dtype != base.dtype:
        return None
    (rows, columns), first = tensor.shape, tensor.offset_bytes // size
    if rows != base.shape[0] or tensor.element_strides != base.element_strides or base.element_strides[-1] != 1:
        return None
    if tensor.offset_bytes % size or not 0 <= first <= first + columns <= base.shape[1]:
        return None
    cut = replace(
        weight,
        name="",
        shape=(*weight.shape[:2], columns),
        strides=weight.element_strides,
        offset_bytes=weight.offset_bytes + first * weight.element_strides[2] * size,
    )
    return GroupedProduct(product.x, cut, product.ends)


def gathered(walk: Walk, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(source, index)`` where ``tensor`` is ``source[index]``, whole rows by one index of one dimension."""
    made = walk.writer(tensor)
    if made is None:
        return None
    match made[0].target, walk.arguments(made[0]):
        case ("aten.index.Tensor", ([Tensor() as source, [Tensor() as index]], {})) if len(index.shape) == 1:
            return source, index
        case ("aten.index_select.default", ([Tensor() as source, 0, Tensor() as index], {})):
            return source, index
    return None


def is_order(walk: Walk, order: Tensor) -> bool:
    """Whether ``order`` is certain to be a permutation: what a sort of one dimension returns."""
    made = walk.writer(order)
    if made is None or len(order.shape) != 1 or order.dtype not in ("int32", "int64") or not is_row_major(order):
        return False
    return made[1] == _ORDER_OF.get(_name(made[0])) and len(walk.arguments(made[0])[0][0].shape) == 1


#: Which result of a sort says where the values were.
_ORDER_OF = {"sort": 1, "argsort": 0}
_TOKEN = either(
    call("floor_divide", any_tensor("order"), number("top_k")),
    call("div", any_tensor("order"), number("top_k"), rounding_mode="floor"),
)


def tokens(walk: Walk, index: Tensor) -> tuple[Tensor, int] | None:
    """``(order, top_k)`` where ``index`` is ``order // top_k`` and ``order`` comes from a sort."""
    for found in walk.find(_TOKEN, index):
        order, top_k = found["order"], found.literals["top_k"]
        if isinstance(top_k, int) and top_k > 0 and is_order(walk, order):
            return order, top_k
    return None


def inverted(walk: Walk, inverse: Tensor) -> Tensor | None:
    """The order that ``inverse`` undoes: written by ``inverse[order] = arange``, or sorted from it."""
    made = walk.writer(inverse)
    if made is None:
        return None
    arguments, keywords = walk.arguments(made[0])
    name = _name(made[0])
    if made[1] == _ORDER_OF.get(name) and _ascends(arguments[1:], keywords):
        return arguments[0] if is_order(walk, arguments[0]) else None
    match name, arguments:
        case ("index_put", [into, [Tensor() as order], Tensor() as numbers, *rest]):
            counts = _counts_up(walk, numbers) and not keywords and rest in ([], [False])
            fits = into.shape == order.shape == numbers.shape
            return order if counts and fits and is_order(walk, order) else None
    return None


def _counts_up(walk: Walk, numbers: Tensor) -> bool:
    made = walk.writer(numbers)
    if made is None:
        return False
    arguments, keywords = walk.arguments(made[0])
    match made[0].target, arguments:
        case ("aten.arange.default", [count]) | ("aten.arange.start", [0, count]):
            return bool(count == numbers.shape[0])
        case ("aten.arange.start_step", [0, count] | [0, count, 1]):
            return bool(count == numbers.shape[0])
        case ("prims.iota.default", [count]):
            return (count, keywords.get("start"), keywords.get("step")) == (numbers.shape[0], 0, 1)
    return False


def _ascends(rest: list[Any], keywords: dict[str, Any]) -> bool:
    """Whether a sort along the only dimension goes upwards."""
    given = dict(zip(("dim", "descending"), rest, strict=False)) | keywords
    return (
        given.get("dim", -1) in (0, -1) and not given.get("descending") and {"dim", "descending", "stable"} >= {*given}
    )


@dataclass(frozen=True)
class Routing:
    """A choice of experts: ``weights`` and ``indices``; ``order`` and ``ends`` where the graph sorts and counts."""

    logits: Tensor
    top_k: int
    normalize: bool
    weights: Tensor
    indices: Tensor
    order: Tensor | None
    ends: Tensor | None


_X, _V, _DIM, _DIMS = any_tensor("x"), any_tensor("values"), literal("dim"), literal("dims")
_POWERS = call("exp", call("sub", _X, call("amax", _X, _DIMS, True)))
_SOFTMAX = either(
    call("softmax", _X, _DIM),
    call("softmax", _X, _DIM, torch.float32),
    call("_softmax", _X, _DIM, False),
    call("_softmax", _X, _DIM, True),
    call("div", _POWERS, call("sum", _POWERS, _DIMS, True)),
)
_SHARES = call("div", _V, call("sum", _V, _DIMS, True))


def routings(walk: Walk) -> Iterator[Routing]:
    """Choices of experts by ``topk``, of softmax in float32 or softmax of them, with the sort by expert behind."""
    for op in walk.graph.ops:
        if op.target != "aten.topk.default":
            continue
        arguments, keywords = walk.arguments(op)
        scores, top_k = arguments[:2]
        given = dict(zip(("dim", "largest", "sorted"), arguments[2:], strict=False)) | keywords
        if given.get("dim", -1) not in (-1, len(scores.shape) - 1) or not given.get("largest", True):
            continue
        values, indices = (walk.graph.tensor[name] for name in op.outputs)
        sizes = top_k * scores.shape[-1] > 0 and scores.shape[-1] <= MOST_EXPERTS
        if not sizes or any(t.name != t.buffer or not is_row_major(t) for t in (values, indices)):
            continue
        order, ends = _sorted(walk, indices, scores.shape[-1])
        for weights, logits, normalize in _weights(walk, scores, values):
            if logits.shape == scores.shape and logits.dtype in _FLOATS and is_row_major(logits):
                yield Routing(logits, top_k, normalize, weights, indices, order, ends)


def _weights(walk: Walk, scores: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """``(weights, logits, normalize)`` of experts whose ``scores`` are ``values``."""
    of_last = ([-1], [len(scores.shape) - 1])
    for found in walk.find(_SOFTMAX, scores):
        if not _is_last(found.literals, len(scores.shape)) or scores.dtype != "float32":
            continue
        logits = _narrower(walk, found["x"])
        yield values, logits, False
        for op in walk.readers(values, "div"):
            shares = walk.graph.tensor[op.outputs[0]]
            for of_values in walk.find(_SHARES, shares):
                if of_values["values"].name == values.name and of_values.literals["dims"] in of_last:
                    yield shares, logits, True
    for weights in walk.results("softmax", "_softmax", "div"):
        if weights.shape != values.shape or weights.dtype != "float32":
            continue
        for found in walk.find(_SOFTMAX, weights):
            if _narrower(walk, found["x"]).name == values.name and _is_last(found.literals, len(values.shape)):
                yield weights, scores, True


def _is_last(literals: Any, dimensions: int) -> bool:
    dim = literals.get("dim", -1)
    return dim in (-1, dimensions - 1) and literals.get("dims", [-1]) in ([-1], [dimensions - 1])


def _narrower(walk: Walk, tensor: Tensor) -> Tensor:
    """What ``tensor`` of float32 was widened from, if it was: kernels widen what they read themselves."""
    made = walk.writer(tensor)
    if made is None or made[0].target not in CASTS or tensor.dtype != "float32":
        return tensor
    source = walk.graph.tensor[made[0].inputs[0]]
    return (reshaped(source, tensor.shape) or tensor) if source.dtype in _FLOATS else tensor


def _sorted(walk: Walk, indices: Tensor, experts: int) -> tuple[Tensor | None, Tensor | None]:
    """``(order, ends)``: where the assignments of ``indices`` are sorted by expert, and where their counts add up."""
    flat = reshaped(indices, (math.prod(indices.shape),))
    if flat is None or walk.writer(_view(indices)) is None:
        return None, None
    for op in walk.readers(indices, *_ORDER_OF):
        arguments, keywords = walk.arguments(op)
        if _is_all(arguments[0], flat) and _ascends(arguments[1:], keywords):
            results = [walk.graph.tensor[name] for name in op.outputs]
            ends = _ends(walk, results[0], experts) if len(results) > 1 else None
            return results[_ORDER_OF[_name(op)]], ends or _ends(walk, flat, experts)
    return None, _ends(walk, flat, experts)


def _ends(walk: Walk, chosen: Tensor, experts: int) -> Tensor | None:
    """The running sum of the histogram of ``chosen`` experts, which ``histc`` makes of another dtype."""
    graph = walk.graph
    for cast in walk.readers(chosen, *_CAST_NAMES):
        numbers = graph.tensor[cast.outputs[0]]
        is_exact = numbers.dtype in ("float32", "int32") and walk.writer(_view(chosen)) is not None
        for count in walk.readers(numbers, "histc") if is_exact else ():
            counts = walk.arguments(count) == ([numbers, experts, 0, experts - 1], {})
            if counts and _is_all(walk.arguments(cast)[0][0], chosen):
                return _added_up(walk, graph.tensor[count.outputs[0]])
    return None


def _is_all(tensor: Tensor, flat: Tensor) -> bool:
    """Whether ``tensor`` has the elements of ``flat``, in one dimension."""
    place = (tensor.buffer, tensor.shape, tensor.offset_bytes)
    return place == (flat.buffer, flat.shape, flat.offset_bytes) and is_row_major(tensor)


def _added_up(walk: Walk, counts: Tensor) -> Tensor | None:
    for op in walk.readers(counts, "cumsum"):
        match walk.arguments(op):
            case ([Tensor() as summed, 0 | -1], {"dtype": torch.int32}) if summed.name == counts.name:
                return walk.graph.tensor[op.outputs[0]]
    return None
