"""Resize and Upsample: each dimension by itself, as a gather (nearest) or a product with an interpolation matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..node import CannotLower, Lowered, Lowering, Node

__all__ = ["TABLE"]

_MAX_MATRIX_ELEMENTS = 2**26
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Axis:
    """How one dimension is resized: sizes, the scale that coordinates use, and the region of interest."""

    size: int
    output: int
    scale: float
    roi: tuple[float, float]


def _coordinates(axis: Axis, mode: str) -> Array:
    """For each output position, the position in the input (ONNX's coordinate_transformation_mode)."""
    x = np.arange(axis.output, dtype=np.float64)
    if mode == "half_pixel":
        return np.asarray((x + 0.5) / axis.scale - 0.5)
    if mode == "half_pixel_symmetric":
        adjustment = axis.output / (axis.scale * axis.size)
        return np.asarray(axis.size / 2 * (1 - adjustment) + (x + 0.5) / axis.scale - 0.5)
    if mode == "pytorch_half_pixel":
        return np.asarray((x + 0.5) / axis.scale - 0.5 if axis.output > 1 else np.zeros_like(x))
    if mode == "align_corners":
        resized = axis.scale * axis.size  # not rounded: ONNX keeps the fraction here
        return np.asarray(x * (axis.size - 1) / (resized - 1) if resized != 1 else np.zeros_like(x))
    if mode == "asymmetric":
        return np.asarray(x / axis.scale)
    if mode == "tf_half_pixel_for_nn":
        return np.asarray((x + 0.5) / axis.scale)
    if mode == "tf_crop_and_resize":
        start, end = axis.roi
        if axis.output > 1:
            return np.asarray(start * (axis.size - 1) + x * (end - start) * (axis.size - 1) / (axis.output - 1))
        return np.full(1, 0.5 * (start + end) * (axis.size - 1))
    raise CannotLower(f"coordinate_transformation_mode {mode!r}")


def _nearest(positions: Array, mode: str) -> np.ndarray:
    if mode == "round_prefer_floor":
        return np.ceil(positions - 0.5)
    if mode == "round_prefer_ceil":
        return np.floor(positions + 0.5)
    if mode == "floor":
        return np.floor(positions)
    if mode == "ceil":
        return np.ceil(positions)
    raise CannotLower(f"nearest_mode {mode!r}")


def _triangle(x: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(coefficient: float) -> Callable[[Array], Array]:
    """Keys' cubic convolution kernel with parameter ``coefficient`` (Keys, 1981)."""
    a = coefficient

    def kernel(x: Array) -> Array:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def _matrix(axis: Axis, positions: Array, kernel: Callable[[Array], Array], support: int, *, antialias: bool,
            exclude_outside: bool) -> Array:  # fmt: skip
    """The [output, size] matrix of one dimension's interpolation; positions outside take the border's value."""
    if axis.output * axis.size > _MAX_MATRIX_ELEMENTS:
        raise CannotLower("an interpolation matrix of more than 2**26 elements")
    stretch = min(axis.scale, 1.0) if antialias else 1.0
    reach = math.ceil(support / stretch)
    base = np.floor(positions).astype(np.int64)
    taps = base[:, None] + np.arange(-reach + 1, reach + 1)
    weights = kernel((taps - positions[:, None]) * stretch)
    outside = (taps < 0) | (taps >= axis.size)
    if exclude_outside or antialias:
        weights = np.where(outside, 0.0, weights) if exclude_outside else weights
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((axis.output, axis.size))
    rows = np.broadcast_to(np.arange(axis.output)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, axis.size - 1)), weights)
    return matrix


def _along(x: torch.Tensor, dim: int, matrix: torch.Tensor) -> torch.Tensor:
    """The product of ``matrix`` with dimension ``dim`` of ``x``."""
    return torch.movedim(torch.matmul(torch.movedim(x, dim, -1), matrix.t()), -1, dim)


def _targets(node: Node, x: torch.Tensor) -> tuple[list[int], list[float], list[float]]:
    """Per dimension: the output size, the scale, and the region of interest (starts, then ends)."""
    rank = x.dim()
    if node.op_type == "Upsample" or node.opset < 11:
        scales = node.numbers("scales") if node.given("scales") else node.float_list(1)
        return [math.floor(size * scale) for size, scale in zip(x.shape, scales, strict=True)], scales, []
    axes = [node.axis(axis, rank) for axis in node.integers("axes", list(range(rank)))]
    sizes, scales = list(x.shape), [1.0] * rank
    roi = [0.0] * rank + [1.0] * rank
    if node.has(1) and node.value(1).shape != (0,) and node.string("coordinate_transformation_mode", "half_pixel") == \
            "tf_crop_and_resize":  # fmt: skip
        given = node.float_list(1)
        for position, dim in enumerate(axes):
            roi[dim], roi[rank + dim] = given[position], given[len(axes) + position]
    if node.has(2) and node.value(2).shape != (0,):
        for dim, scale in zip(axes, node.float_list(2), strict=True):
            scales[dim] = scale
            sizes[dim] = math.floor(x.shape[dim] * scale)
        return sizes, scales, roi
    wanted = node.int_list(3)
    policy = node.string("keep_aspect_ratio_policy", "stretch")
    ratios = [size / x.shape[dim] for dim, size in zip(axes, wanted, strict=True)]
    if policy != "stretch":
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        ratios = [ratio] * len(axes)
        wanted = [math.floor(ratio * x.shape[dim] + 0.5) for dim in axes]
    for dim, size, ratio in zip(axes, wanted, ratios, strict=True):
        sizes[dim], scales[dim] = size, ratio
    return sizes, scales, roi


def _as_one_operator(x: torch.Tensor, sizes: Sequence[int], indices: Mapping[int, np.ndarray]) -> torch.Tensor | None:
    """``aten.upsample_nearest2d`` where it takes the same elements."""
    if x.dim() != 4 or not set(indices) <= {2, 3} or not indices or not x.is_floating_point():
        return None
    for dim, index in indices.items():
        if not np.array_equal(index, np.floor(np.arange(sizes[dim]) * (x.shape[dim] / sizes[dim]))):
            return None
    return torch.nn.functional.interpolate(x, size=list(sizes[2:]), mode="nearest")


def _resize_nearest(node: Node, x: torch.Tensor, axes: Mapping[int, Axis], mode: str) -> torch.Tensor:
    rounding = "floor" if node.opset < 11 else node.string("nearest_mode", "round_prefer_floor")
    indices = {
        dim: np.clip(_nearest(_coordinates(axis, mode), rounding), 0, axis.size - 1).astype(np.int64)
        for dim, axis in axes.items()
    }
    sizes = [axes[dim].output if dim in axes else size for dim, size in enumerate(x.shape)]
    whole = _as_one_operator(x, sizes, indices)
    if whole is not None:
        return whole
    for dim, index in indices.items():
        x = torch.index_select(x, dim, node.literal(index, "nearest_index"))
    return x


def _resize(node: Node) -> Lowered:
    x = node.tensor(0)
    sizes, scales, roi = _targets(node, x)
    mode = node.string("mode", "nearest")
    old = node.op_type == "Upsample" or node.opset < 11
    coordinates = "asymmetric" if old else node.string("coordinate_transformation_mode", "half_pixel")
    rank = x.dim()
    crops = coordinates == "tf_crop_and_resize"
    axes = {
        dim: Axis(x.shape[dim], sizes[dim], scales[dim], (roi[dim], roi[rank + dim]) if crops else (0.0, 1.0))
        for dim in range(rank)
        if sizes[dim] != x.shape[dim] or scales[dim] != 1.0 or (crops and (roi[dim], roi[rank + dim]) != (0.0, 1.0))
    }
    if min(sizes) < 1:
        raise CannotLower("Resize to an empty tensor")
    if mode == "nearest":
        return _resize_nearest(node, x, axes, coordinates)
    if mode not in ("linear", "cubic"):
        raise CannotLower(f"Resize with mode {mode!r}")
    kernel, support = (_triangle, 1) if mode == "linear" else (_cubic(node.number("cubic_coeff_a", -0.75)), 2)
    dtype = x.dtype
    y = x if dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    for dim, axis in axes.items():
        positions = _coordinates(axis, coordinates)
        matrix = _matrix(axis, positions, kernel, support, antialias=node.flag("antialias"),
                         exclude_outside=node.flag("exclude_outside"))  # fmt: skip
        if crops:
            matrix = _extrapolate(matrix, positions, axis, node)
        y = _along(y, dim, node.literal(matrix.astype(np.float32), "interpolation").to(y.dtype))
    return y if y.dtype == dtype else (y.to(dtype) if dtype.is_floating_point else torch.round(y).to(dtype))


def _extrapolate(matrix: Array, positions: Array, axis: Axis, node: Node) -> Array:
    outside = (positions < 0) | (positions > axis.size - 1)
    if node.number("extrapolation_value", 0.0) != 0.0 and bool(outside.any()):
        raise CannotLower("an extrapolation value other than 0")
    return np.where(outside[:, None], 0.0, matrix)


TABLE: Mapping[str, Lowering] = {"Resize": _resize, "Upsample": _resize}
