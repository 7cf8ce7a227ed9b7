"""Operators that sample at computed positions, and transforms: grids, regions, windows, Fourier."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows

from ..node import CannotLower, Lowered, Lowering, Node
from ..types import dtype_of
from .aten import aten

__all__ = ["TABLE"]

_MAX_MATRIX_ELEMENTS = 2**24


def _grid_sample(node: Node) -> Lowered:
    x, grid = node.tensor(0), node.tensor(1)
    wanted = node.string("mode", "linear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(wanted, wanted)
    if x.dim() not in (4, 5) or (x.dim() == 5 and mode == "bicubic"):
        raise CannotLower(f"GridSample of {x.dim()} dimensions with mode {mode}")
    padding, align = node.string("padding_mode", "zeros"), node.flag("align_corners")
    return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=align)


def _reverse_sequence(node: Node) -> Lowered:
    x, lengths = node.tensor(0), node.tensor(1)
    batch, time = node.integer("batch_axis", 1), node.integer("time_axis", 0)
    steps = node.literal(np.arange(x.shape[time]).reshape([-1 if d == time else 1 for d in range(x.dim())]), "steps")
    spread = lengths.reshape([-1 if dim == batch else 1 for dim in range(x.dim())])
    index = torch.where(steps < spread, spread - 1 - steps, steps)
    return torch.gather(x, time, index.expand(x.shape))


def _tensor_scatter(node: Node) -> Lowered:
    past, update, starts = node.tensor(0), node.tensor(1), node.optional(2)
    axis = node.axis(node.integer("axis", -2), past.dim())
    offsets = node.literal(
        np.arange(update.shape[axis]).reshape([-1 if dim == axis else 1 for dim in range(past.dim())]), "offsets"
    )
    if starts is not None:
        offsets = offsets + starts.reshape([-1] + [1] * (past.dim() - 1))
    if node.string("mode", "linear") == "circular":
        offsets = torch.remainder(offsets, past.shape[axis])
    return torch.scatter(past, axis, offsets.expand(update.shape), update)


def _col2im(node: Node) -> Lowered:
    x, image, block = node.tensor(0), node.int_list(1), node.int_list(2)
    rank = len(image)
    pads = node.integers("pads", [0] * 2 * rank)
    if rank != 2 or pads[:rank] != pads[rank:]:
        raise CannotLower("Col2Im outside two dimensions with symmetric padding")
    dilations, strides = node.integers("dilations", [1, 1]), node.integers("strides", [1, 1])
    return aten("col2im", x, image, block, dilations, pads[:rank], strides)


def _fourier(length: int, bins: int, *, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of the DFT matrix [bins, length]."""
    if length * bins > _MAX_MATRIX_ELEMENTS:
        raise CannotLower("a Fourier transform of more than 4096 points")
    angle = 2 * np.pi * (np.outer(np.arange(bins), np.arange(length)) % length) / length
    scale = 1 / length if inverse else 1.0
    return np.cos(angle) * scale, (np.sin(angle) if inverse else -np.sin(angle)) * scale


def _product(signal: torch.Tensor, node: Node, length: int, bins: int, *, inverse: bool) -> torch.Tensor:
    """The transform over the last but one dimension of ``signal`` [..., length, 1 or 2], as real matrix products."""
    dtype, signal = signal.dtype, signal.to(torch.float64)  # sums that cancel lose float32's digits
    real, imaginary = (
        node.literal(part.astype(np.float64), name)
        for part, name in zip(_fourier(length, bins, inverse=inverse), ("dft_real", "dft_imaginary"), strict=True)
    )
    a = torch.select(signal, -1, 0)
    if signal.shape[-1] == 1:
        return torch.stack([torch.matmul(a, real.t()), torch.matmul(a, imaginary.t())], -1).to(dtype)
    b = torch.select(signal, -1, 1)
    top = torch.matmul(a, real.t()) - torch.matmul(b, imaginary.t())
    bottom = torch.matmul(a, imaginary.t()) + torch.matmul(b, real.t())
    return torch.stack([top, bottom], -1).to(dtype)


def _fit(x: torch.Tensor, length: int) -> torch.Tensor:
    """``x`` [..., n, parts] cut or padded with zeros to n = length."""
    return x if x.shape[-2] == length else torch.constant_pad_nd(x, [0, 0, 0, length - x.shape[-2]])


def _dft(node: Node) -> Lowered:
    x = node.tensor(0)
    axis = node.integer("axis", 1) if node.opset < 20 else (int(node.scalar(2)) if node.has(2) else -2)
    axis = node.axis(axis, x.dim())
    inverse, one_sided = node.flag("inverse"), node.flag("onesided")
    length = int(node.scalar(1)) if node.has(1) else x.shape[axis]
    moved = torch.movedim(x, axis, -2)
    if inverse and not one_sided:
        raise CannotLower("the complex inverse transform, whose expected rounding is that of a single-precision FFT")
    if inverse and one_sided:
        length = int(node.scalar(1)) if node.has(1) else 2 * (x.shape[axis] - 1)
        half = _fit(moved, length // 2 + 1)
        mirror = torch.flip(half[..., 1 : (length + 1) // 2, :], [-2])
        conjugate = torch.stack([mirror[..., 0], -mirror[..., 1]], -1)
        whole = torch.cat([half, conjugate], -2)
        return torch.movedim(_product(whole, node, length, length, inverse=True)[..., :1], -2, axis)
    bins = length // 2 + 1 if one_sided else length
    return torch.movedim(_product(_fit(moved, length), node, length, bins, inverse=False), -2, axis)


def _stft(node: Node) -> Lowered:
    signal, step = node.tensor(0), int(node.scalar(1))
    window = node.optional(2)
    length = int(node.scalar(3)) if node.has(3) else (window.shape[0] if window is not None else 0)
    if length < 1 or step < 1 or length > signal.shape[1]:
        raise ValueError(f"frames of {length} samples every {step} over {signal.shape[1]}")
    frames = (signal.shape[1] - length) // step + 1
    index = np.arange(frames)[:, None] * step + np.arange(length)
    framed = aten("index.Tensor", signal, [None, node.literal(index, "frames")])
    if window is not None:
        framed = framed * window.reshape(1, 1, -1, 1)
    bins = length // 2 + 1 if node.flag("onesided", True) else length
    return _product(framed, node, length, bins, inverse=False)


def _max_unpool(node: Node) -> Lowered:
    x, indices = node.tensor(0), node.tensor(1)
    rank = x.dim() - 2
    kernel, strides = node.integers("kernel_shape"), node.integers("strides", [1] * rank)
    pads = node.integers("pads", [0] * 2 * rank)
    natural = [(x.shape[2 + d] - 1) * strides[d] - pads[d] - pads[rank + d] + kernel[d] for d in range(rank)]
    sizes = [*x.shape[:2], *natural]
    wanted = node.int_list(2) if node.has(2) else sizes
    flat = torch.zeros(math.prod(sizes), dtype=x.dtype)
    filled = torch.scatter(flat, 0, indices.reshape(-1), x.reshape(-1)).reshape(sizes)
    pads_after = [width for dim in reversed(range(rank)) for width in (0, wanted[2 + dim] - natural[dim])]
    return filled if wanted == sizes else torch.constant_pad_nd(filled, pads_after)


def _det(node: Node) -> Lowered:
    return aten("linalg_det", node.tensor(0))


def _window(coefficients: tuple[float, ...]) -> Lowering:
    """A sum of cosines; periodic windows repeat after ``size``, symmetric ones after ``size - 1``."""

    def lower(node: Node) -> Lowered:
        size = int(node.scalar(0))
        dtype = dtype_of(node.integer("output_datatype", 1), str(node))
        if not 0 <= size <= _MAX_MATRIX_ELEMENTS:
            raise CannotLower(f"a window of {size} points")
        period = size if node.flag("periodic", True) else size - 1
        angle = 2 * np.pi * np.arange(size) / max(period, 1)
        values = sum(c * np.cos(k * angle) for k, c in enumerate(coefficients))
        return node.literal(np.asarray(values, np.float64), "window").to(dtype)

    return lower


TABLE: Mapping[str, Lowering] = {
    "GridSample": _grid_sample,
    "ReverseSequence": _reverse_sequence,
    "TensorScatter": _tensor_scatter,
    "Col2Im": _col2im,
    "DFT": _dft,
    "STFT": _stft,
    "MaxUnpool": _max_unpool,
    "Det": _det,
    "HannWindow": _window((0.5, -0.5)),
    "HammingWindow": _window((25 / 46, -21 / 46)),
    "BlackmanWindow": _window((0.42, -0.5, 0.08)),
}
