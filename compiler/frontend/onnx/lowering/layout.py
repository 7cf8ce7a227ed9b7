"""Operators that move elements without computing: shapes, slices, joins, pads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..node import CannotLower, Lowered, Lowering, Node
from ..types import MAX_CONSTANT_BYTES, array_from_proto, dtype_of, shape_elements
from .aten import aten
from .elementwise import narrow, widen

__all__ = ["TABLE"]


def _identity(node: Node) -> Lowered:
    return node.tensor(0)


def _reshape(node: Node) -> Lowered:
    x = node.tensor(0)
    sizes = node.int_list(1)
    if not node.flag("allowzero"):
        if any(size == 0 and index >= x.dim() for index, size in enumerate(sizes)):
            raise ValueError(f"shape {sizes} copies a dimension that the input of rank {x.dim()} does not have")
        sizes = [x.shape[index] if size == 0 else size for index, size in enumerate(sizes)]
    if -1 in sizes and 0 in sizes:
        raise ValueError(f"shape {sizes} has both 0 and -1")
    return torch.reshape(x, sizes)


def _flatten(node: Node) -> Lowered:
    x = node.tensor(0)
    axis = node.integer("axis", 1)
    if not -x.dim() <= axis <= x.dim():
        raise ValueError(f"axis {axis} is outside the input's {x.dim()} dimensions")
    axis = axis + x.dim() if axis < 0 else axis
    return torch.reshape(x, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def _axes(node: Node) -> list[int] | None:
    """The axes: an attribute in older opsets, an input in newer ones; some exporters mix the two."""
    if node.given("axes"):
        return node.integers("axes")
    return node.int_list(1) if node.has(1) else None


def _squeeze(node: Node) -> Lowered:
    x = node.tensor(0)
    axes = _axes(node)
    chosen = [dim for dim, size in enumerate(x.shape) if size == 1] if axes is None else \
        [node.axis(axis, x.dim()) for axis in axes]  # fmt: skip
    if any(x.shape[dim] != 1 for dim in chosen):
        raise ValueError(f"axes {chosen} of shape {list(x.shape)} are not all of size 1")
    return torch.squeeze(x, chosen)


def _unsqueeze(node: Node) -> Lowered:
    x = node.tensor(0)
    axes = _axes(node) or []
    rank = x.dim() + len(axes)
    sizes = list(x.shape)
    chosen = sorted(node.axis(axis, rank) for axis in axes)
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"axes {axes} name a dimension twice")
    for axis in chosen:
        sizes.insert(axis, 1)
    return torch.unsqueeze(x, chosen[0]) if len(chosen) == 1 else torch.reshape(x, sizes)


def _transpose(node: Node) -> Lowered:
    x = node.tensor(0)
    return torch.permute(x, node.integers("perm", list(reversed(range(x.dim())))))


def _concat(node: Node) -> Lowered:
    tensors = node.tensors()
    axis = node.integer("axis")
    if len(tensors) == 1:
        return tensors[0].clone()
    # aten.cat skips empty one-dimensional tensors of any rank, ONNX does not
    if len({tensor.dim() for tensor in tensors}) > 1:
        raise ValueError("the inputs differ in rank")
    return torch.cat(tensors, node.axis(axis, tensors[0].dim()))


def _split(node: Node) -> Sequence[Lowered]:
    x = node.tensor(0)
    axis = node.axis(node.integer("axis", 0), x.dim())
    outputs = len(node.proto.output)
    size = x.shape[axis]
    if node.given("split"):
        sizes = node.integers("split")
    elif node.has(1):
        sizes = node.int_list(1)
    else:
        count = node.integer("num_outputs", outputs)
        chunk = -(-size // count)
        sizes = [min(chunk, max(0, size - index * chunk)) for index in range(count)]
    return list(torch.split_with_sizes(x, sizes, axis))


def _slice(node: Node) -> Lowered:
    x = node.tensor(0)
    if node.opset < 10:
        starts, ends = node.integers("starts"), node.integers("ends")
        axes, steps = node.integers("axes", list(range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = node.int_list(1), node.int_list(2)
        axes = node.int_list(3) if node.has(3) else list(range(len(starts)))
        steps = node.int_list(4) if node.has(4) else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        dim = node.axis(axis, x.dim())
        size = x.shape[dim]
        if step == 0:
            raise ValueError("a step is 0")
        begin, stop, _ = slice(start, end, step).indices(size)
        if step > 0:
            x = aten("slice.Tensor", x, dim, begin, max(stop, begin), step)
        else:  # ATen steps forwards only
            flipped = torch.flip(x, [dim])
            x = aten("slice.Tensor", flipped, dim, size - 1 - begin, max(size - 1 - stop, size - 1 - begin), -step)
    return x


def _broadcast(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """The shape to which both shapes broadcast; torch.broadcast_shapes does not take sizes beyond memory."""
    return np.broadcast_shapes(tuple(left), tuple(right))


def _expand(node: Node) -> Lowered:
    x, sizes = node.tensor(0), node.int_list(1)
    shape_elements(tuple(sizes), str(node))
    return torch.broadcast_to(x, _broadcast(x.shape, sizes))


def _tile(node: Node) -> Lowered:
    x, repeats = node.tensor(0), node.int_list(1)
    shape_elements(tuple(size * count for size, count in zip(x.shape, repeats, strict=True)), str(node))
    return x.repeat(repeats)


def _shape(node: Node) -> Lowered:
    sizes = list(node.value(0).shape)
    start, end = node.integer("start", 0), node.integer("end", len(sizes))
    return np.array(sizes[slice(start, end)], np.int64)


def _size(node: Node) -> Lowered:
    return np.array(math.prod(node.value(0).shape), np.int64)


def _constant_of_shape(node: Node) -> Lowered:
    sizes = node.int_list(0)
    elements = shape_elements(tuple(sizes), str(node))
    value = np.zeros(1, np.float32)
    if node.given("value"):
        dtype_of(node.attributes["value"].t.data_type, str(node))
        value = array_from_proto(node.attributes["value"].t, str(node))
    if elements * value.itemsize > MAX_CONSTANT_BYTES:
        raise ValueError(f"a constant of shape {sizes} has more than {MAX_CONSTANT_BYTES} bytes")
    if value.size != 1:
        raise ValueError(f"the value has {value.size} elements, expected one")
    # one element seen from every position: memory is taken only if the tensor turns out to be a weight
    return node.literal(value.reshape(()), "fill").expand(sizes)


def _range(node: Node) -> Lowered:
    start, limit, delta = (node.constant(index).reshape(()) for index in range(3))
    if delta == 0:
        raise ValueError("the step is 0")
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    if count * start.itemsize > MAX_CONSTANT_BYTES:
        raise ValueError(f"a range of {count} elements has more than {MAX_CONSTANT_BYTES} bytes")
    return np.asarray(start + np.arange(count, dtype=start.dtype) * delta, start.dtype)


def _pad_index(mode: str, before: int, size: int, after: int) -> np.ndarray:
    """For each position of the padded dimension, the source position that it shows."""
    position = np.arange(-before, size + after)
    if mode == "edge":
        return np.clip(position, 0, size - 1)
    if mode == "wrap":
        return position % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        folded = np.abs(position) % period
        return np.minimum(folded, period - folded) if size > 1 else np.zeros_like(position)
    raise CannotLower(f"Pad with mode {mode}")


def _pad(node: Node) -> Lowered:
    x, mode = node.tensor(0), node.string("mode", "constant")
    pads = node.integers("pads") if node.opset < 11 else node.int_list(1)
    axes = [node.axis(axis, x.dim()) for axis in node.int_list(3)] if node.has(3) else list(range(x.dim()))
    if len(pads) != 2 * len(axes):
        raise ValueError(f"{len(pads)} pads for {len(axes)} dimensions")
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    after = dict(zip(axes, pads[len(axes) :], strict=True))
    if mode == "constant":
        value = node.number("value", 0.0) if node.opset < 11 else (node.scalar(2) if node.has(2) else 0)
        flat = [width for dim in reversed(range(x.dim())) for width in (before.get(dim, 0), after.get(dim, 0))]
        return torch.constant_pad_nd(x, flat, value)
    for dim in axes:
        if before[dim] or after[dim]:
            index = _pad_index(mode, before[dim], x.shape[dim], after[dim])
            x = torch.index_select(x, dim, node.literal(index, "pad_index"))
    return x


def _depth_to_space(node: Node) -> Lowered:
    x, block = node.tensor(0), node.integer("blocksize")
    n, c, h, w = x.shape
    if node.string("mode", "DCR") == "CRD":
        return torch.pixel_shuffle(x, block)
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(node: Node) -> Lowered:
    x, block = node.tensor(0), node.integer("blocksize")
    n, c, h, w = x.shape
    if node.string("mode", "DCR") == "CRD":
        return torch.pixel_unshuffle(x, block)
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


def _trilu(node: Node) -> Lowered:
    x, diagonal = node.tensor(0), int(node.scalar(1)) if node.has(1) else 0
    function = torch.triu if node.flag("upper", True) else torch.tril
    return narrow(function(widen(x), diagonal), x.dtype)


def _eye_like(node: Node) -> Lowered:
    value = node.value(0)
    dtype = dtype_of(node.integer("dtype"), str(node)) if node.given("dtype") else value.dtype
    rows, columns = value.shape
    if rows * columns * dtype.itemsize > MAX_CONSTANT_BYTES:
        raise ValueError("the matrix is too large")
    matrix = np.eye(rows, columns, node.integer("k", 0), dtype=np.uint8)
    return node.literal(matrix, "eye").to(dtype)


TABLE: Mapping[str, Lowering] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Expand": _expand,
    "Tile": _tile,
    "Shape": _shape,
    "Size": _size,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _trilu,
    "EyeLike": _eye_like,
}
