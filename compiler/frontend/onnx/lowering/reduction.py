"""Reductions, softmaxes and searches along axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..node import CannotLower, Lowered, Lowering, Node
from .aten import aten
from .elementwise import narrow, widen

__all__ = ["TABLE"]

Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _axes(node: Node) -> list[int] | None:
    """The axes: an attribute in older opsets, an input in newer ones."""
    if node.given("axes"):
        return node.integers("axes")
    return node.int_list(1) if node.has(1) else None


def _reduce(function: Reduction, *, ordered: bool = False) -> Lowering:
    """``ordered``: the result depends on the order of values, which int64 does not keep for uint64."""

    def lower(node: Node) -> Lowered:
        x = node.tensor(0)
        if ordered and x.dtype == torch.uint64:
            raise CannotLower("ATen orders no uint64")
        axes, keep = _axes(node), node.flag("keepdims", True)
        if not axes:
            if node.flag("noop_with_empty_axes"):
                return narrow(function(widen(x).unsqueeze(0), [0], False), x.dtype)
            dims = list(range(x.dim()))
        else:
            dims = [node.axis(axis, x.dim()) for axis in axes]
        if not dims:
            return narrow(function(widen(x).unsqueeze(0), [0], False), x.dtype)
        return narrow(function(widen(x), dims, keep), x.dtype)

    return lower


def _sum(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(x, dims, keepdim=keep)


def _mean(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keepdim=keep)
    count = math.prod(x.shape[dim] for dim in dims)
    return torch.div(torch.sum(x, dims, keepdim=keep), count, rounding_mode="floor")


def _prod(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


def _extreme(function: Callable[..., torch.Tensor], *, largest: bool) -> Reduction:
    def reduce(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
        if math.prod(x.shape[dim] for dim in dims) == 0:
            if not x.is_floating_point():
                raise CannotLower("the extreme of no integers")
            sizes = [1 if dim in dims else size for dim, size in enumerate(x.shape) if keep or dim not in dims]
            return torch.full(sizes, -math.inf if largest else math.inf, dtype=x.dtype)
        return function(x, dims, keepdim=keep)

    return reduce


def _l1(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(torch.abs(x), dims, keepdim=keep)


def _l2(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    if x.is_floating_point():
        return aten("linalg_vector_norm", x, 2, dims, keep)
    return torch.sqrt(torch.sum(torch.square(x.to(torch.float64)), dims, keepdim=keep))


def _sum_square(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(torch.square(x), dims, keepdim=keep)


def _log_sum(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return torch.log(torch.sum(x, dims, keepdim=keep))


def _log_sum_exp(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return torch.logsumexp(x, dims, keepdim=keep)


def _arg(function: Callable[..., torch.Tensor]) -> Lowering:
    def lower(node: Node) -> Lowered:
        x = node.tensor(0)
        if x.dtype == torch.uint64:
            raise CannotLower("ATen orders no uint64")
        axis, keep = node.axis(node.integer("axis", 0), x.dim()), node.flag("keepdims", True)
        if not node.flag("select_last_index"):
            return function(widen(x), axis, keepdim=keep)
        found = function(torch.flip(widen(x), [axis]), axis, keepdim=keep)
        return torch.rsub(found, x.shape[axis] - 1)

    return lower


def _along_axis(function: Callable[[torch.Tensor, int], torch.Tensor]) -> Lowering:
    """Softmax and its kin; before opset 13 they work on the input flattened to a matrix at ``axis``."""

    def lower(node: Node) -> Lowered:
        x = node.tensor(0)
        axis = node.axis(node.integer("axis", -1 if node.opset >= 13 else 1), x.dim())
        if node.opset >= 13 or math.prod(x.shape[axis + 1 :]) == 1:
            return function(x, axis)
        flat = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
        return function(flat, 1).reshape(x.shape)

    return lower


def _softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.softmax(x, axis)


def _log_softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.log_softmax(x, axis)


def _hardmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    found = torch.argmax(x, axis, keepdim=True)
    return torch.scatter(torch.zeros_like(x), axis, found, 1)


def _top_k(node: Node) -> Sequence[Lowered]:
    x = node.tensor(0)
    axis = node.axis(node.integer("axis", -1), x.dim())
    count = node.integer("k") if node.opset < 10 else int(node.scalar(1))
    largest = node.flag("largest", True)
    if x.dtype == torch.uint64:
        raise CannotLower("ATen orders no uint64")
    # a stable sort: of equal elements ONNX takes the one with the lower index, aten.topk any
    values, indices = torch.sort(widen(x), dim=axis, descending=largest, stable=True)
    return [narrow(torch.narrow(values, axis, 0, count), x.dtype), torch.narrow(indices, axis, 0, count)]


def _cumulative(function: Callable[..., torch.Tensor], neutral: int) -> Lowering:
    def lower(node: Node) -> Lowered:
        x = node.tensor(0)
        axis, dtype = node.axis(int(node.scalar(1)), x.dim()), x.dtype
        x = torch.flip(x, [axis]) if node.flag("reverse") else x
        if node.flag("exclusive"):
            pads = [0, 0] * (x.dim() - 1 - axis) + [1, -1]
            x = torch.constant_pad_nd(x, pads, neutral)
        y = function(widen(x), axis, dtype=dtype if dtype not in (torch.uint16, torch.uint32, torch.uint64) else None)
        return narrow(torch.flip(y, [axis]) if node.flag("reverse") else y, dtype)

    return lower


TABLE: Mapping[str, Lowering] = {
    "ReduceSum": _reduce(_sum),
    "ReduceMean": _reduce(_mean, ordered=True),
    "ReduceProd": _reduce(_prod),
    "ReduceMax": _reduce(_extreme(torch.amax, largest=True), ordered=True),
    "ReduceMin": _reduce(_extreme(torch.amin, largest=False), ordered=True),
    "ReduceL1": _reduce(_l1),
    "ReduceL2": _reduce(_l2),
    "ReduceSumSquare": _reduce(_sum_square),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(_log_sum_exp),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Softmax": _along_axis(_softmax),
    "LogSoftmax": _along_axis(_log_softmax),
    "Hardmax": _along_axis(_hardmax),
    "TopK": _top_k,
    "CumSum": _cumulative(torch.cumsum, 0),
    "CumProd": _cumulative(torch.cumprod, 1),
}
