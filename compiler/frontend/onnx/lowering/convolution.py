"""Convolutions and poolings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..node import CannotLower, Lowered, Lowering, Node
from .aten import aten, aten_all

__all__ = ["TABLE", "Window", "convolve", "window_of"]


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial dimensions, with explicit padding before and after each."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether ATen's single padding per dimension can express the padding."""
        return self.before == self.after and min(self.before, default=0) >= 0


def window_of(node: Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """The node's window over spatial ``sizes``, with ``auto_pad`` worked out."""
    rank = len(sizes)
    strides = node.integers("strides", [1] * rank)
    dilations = node.integers("dilations", [1] * rank)
    pads = node.integers("pads", [0] * 2 * rank)
    auto = node.string("auto_pad", "NOTSET")
    lengths = {len(kernel), len(strides), len(dilations), len(pads) // 2}
    if lengths != {rank} or min(*strides, *dilations, *kernel, 1) < 1:
        raise ValueError(f"kernel {list(kernel)}, strides {strides}, dilations {dilations}, pads {pads} "
                         f"do not fit {rank} spatial dimensions")  # fmt: skip
    before, after = list(pads[:rank]), list(pads[rank:])
    if auto == "VALID":
        before, after = [0] * rank, [0] * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        for dim, size in enumerate(sizes):
            reach = (kernel[dim] - 1) * dilations[dim] + 1
            total = max(0, (-(-size // strides[dim]) - 1) * strides[dim] + reach - size)
            small, large = total // 2, total - total // 2
            before[dim], after[dim] = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto != "NOTSET":
        raise ValueError(f"auto_pad is {auto!r}")
    return Window(tuple(kernel), tuple(strides), tuple(dilations), tuple(before), tuple(after))


def pad_spatial(x: torch.Tensor, window: Window, value: float) -> torch.Tensor:
    """``x`` with the window's padding made explicit."""
    pairs = zip(reversed(window.before), reversed(window.after), strict=True)
    return torch.constant_pad_nd(x, [width for pair in pairs for width in pair], value)


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: Window, groups: int
) -> torch.Tensor:
    """One ``aten.convolution``, after an explicit pad where the padding is not symmetric."""
    rank = len(window.kernel)
    if not 1 <= rank <= 3:
        raise CannotLower(f"a convolution over {rank} spatial dimensions")
    padding = window.before if window.symmetric else (0,) * rank
    if not window.symmetric:
        x = pad_spatial(x, window, 0)
    return aten("convolution", x, weight, bias, window.strides, padding, window.dilations, False, [0] * rank, groups)


def _conv(node: Node) -> Lowered:
    x, weight, bias = node.tensor(0), node.tensor(1), node.optional(2)
    window = window_of(node, node.integers("kernel_shape", weight.shape[2:]), x.shape[2:])
    return convolve(x, weight, bias, window, node.integer("group", 1))


def _conv_transpose(node: Node) -> Lowered:
    x, weight, bias = node.tensor(0), node.tensor(1), node.optional(2)
    rank = x.dim() - 2
    kernel = node.integers("kernel_shape", weight.shape[2:])
    if not 1 <= rank <= 3:
        raise CannotLower(f"a convolution over {rank} spatial dimensions")
    strides, dilations = node.integers("strides", [1] * rank), node.integers("dilations", [1] * rank)
    extra = node.integers("output_padding", [0] * rank)
    pads = node.integers("pads", [0] * 2 * rank)
    before, after = list(pads[:rank]), list(pads[rank:])
    auto = node.string("auto_pad", "NOTSET")
    reach = [(kernel[d] - 1) * dilations[d] + 1 for d in range(rank)]
    full = [(x.shape[2 + d] - 1) * strides[d] + reach[d] + extra[d] for d in range(rank)]
    if node.given("output_shape") or auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = node.integers("output_shape", [x.shape[2 + d] * strides[d] for d in range(rank)])[-rank:]
        for dim in range(rank):
            total = full[dim] - wanted[dim]
            if total < 0:  # larger than the convolution reaches: zeros at the end
                extra[dim], total = extra[dim] - total, 0
            small = total // 2
            before[dim], after[dim] = (total - small, small) if auto == "SAME_LOWER" else (small, total - small)
    if auto == "VALID":
        before, after = [0] * rank, [0] * rank
    groups = node.integer("group", 1)
    if (
        before == after
        and min(before, default=0) >= 0
        and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    ):
        return aten("convolution", x, weight, bias, strides, before, dilations, True, extra, groups)
    y = aten("convolution", x, weight, bias, strides, [0] * rank, dilations, True, [0] * rank, groups)
    crop = [width for dim in reversed(range(rank)) for width in (-before[dim], extra[dim] - after[dim])]
    if any(width > 0 for width in crop) and bias is not None:
        raise CannotLower("output padding beyond the bias")
    return torch.constant_pad_nd(y, crop, 0)


def _pooled_sizes(x: torch.Tensor, window: Window, ceil: bool) -> list[int]:
    sizes = []
    for dim, kernel in enumerate(window.kernel):
        reach = (kernel - 1) * window.dilations[dim] + 1
        span = x.shape[2 + dim] + window.before[dim] + window.after[dim] - reach
        count = (-(-span // window.strides[dim]) if ceil else span // window.strides[dim]) + 1
        if ceil and (count - 1) * window.strides[dim] >= x.shape[2 + dim] + window.before[dim]:
            count -= 1  # a window must start inside the input or the padding before it
        sizes.append(count)
    return sizes


def _grow(x: torch.Tensor, window: Window, ceil: bool) -> Window:
    """The window with as much padding after as makes every window of ceil mode complete."""
    if not ceil:
        return window
    after = []
    for dim, count in enumerate(_pooled_sizes(x, window, True)):
        reach = (window.kernel[dim] - 1) * window.dilations[dim] + 1
        needed = (count - 1) * window.strides[dim] + reach - x.shape[2 + dim] - window.before[dim]
        after.append(max(needed, window.after[dim]) if needed > 0 else window.after[dim])
    return Window(window.kernel, window.strides, window.dilations, window.before, tuple(after))


def _max_pool(node: Node) -> Sequence[Lowered]:
    x = node.tensor(0)
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise CannotLower(f"a pooling over {rank} spatial dimensions")
    window = window_of(node, node.integers("kernel_shape"), x.shape[2:])
    ceil, dtype = node.flag("ceil_mode"), x.dtype
    if node.wants(1) and node.integer("storage_order", 0):
        raise CannotLower("MaxPool's column-major indices")
    data = x if x.is_floating_point() else x.to(torch.float32)
    lowest = float("-inf")
    fits = window.symmetric and all(2 * pad <= kernel for pad, kernel in zip(window.before, window.kernel, strict=True))
    if not fits or ceil:
        if node.wants(1) and not fits:
            raise CannotLower("MaxPool's indices with asymmetric padding")
        if not fits:
            window = _grow(data, window, ceil)
            data, ceil = pad_spatial(data, window, lowest), False
    padding = window.before if fits else (0,) * rank
    kernel, strides, dilations = window.kernel, window.strides, window.dilations
    if rank == 1:
        data = data.unsqueeze(2)
        kernel, strides, padding, dilations = (1, *kernel), (1, *strides), (0, *padding), (1, *dilations)
    pool = "max_pool3d_with_indices" if rank == 3 else "max_pool2d_with_indices"
    values, indices = aten_all(pool, data, kernel, strides, padding, dilations, ceil)
    if rank == 1:
        values, indices = values.squeeze(2), indices.squeeze(2)
    values = values if dtype.is_floating_point else values.to(dtype)
    if not node.wants(1):
        return [values]
    planes = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * rank) * math.prod(x.shape[2:])
    return [values, indices + node.literal(planes.astype(np.int64), "plane_offset")]


def _coverage(x: torch.Tensor, window: Window, ceil: bool, include_pad: bool) -> np.ndarray:
    """How many elements each window of an average counts, shaped to broadcast over batch and channels."""
    total = np.ones([1] * (2 + len(window.kernel)))
    for dim, count in enumerate(_pooled_sizes(x, window, ceil)):
        size = x.shape[2 + dim]
        taps = np.arange(window.kernel[dim]) * window.dilations[dim]
        positions = np.arange(count)[:, None] * window.strides[dim] - window.before[dim] + taps
        low, high = (-window.before[dim], size + window.after[dim]) if include_pad else (0, size)
        counted = ((positions >= low) & (positions < high)).sum(axis=1)
        total = total * counted.reshape([-1 if index == 2 + dim else 1 for index in range(total.ndim)])
    return total


def _sum_pool(x: torch.Tensor, window: Window, node: Node) -> torch.Tensor:
    """The sum over each window, padding counted as zero, as a convolution with ones over single channels."""
    n, c, *spatial = x.shape
    ones = node.literal(np.ones((1, 1, *window.kernel), np.float32), "ones").to(x.dtype)
    pooled = convolve(x.reshape(n * c, 1, *spatial), ones, None, window, 1)
    return pooled.reshape(n, c, *pooled.shape[2:])


def _average_pool(node: Node) -> Lowered:
    x = node.tensor(0)
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise CannotLower(f"a pooling over {rank} spatial dimensions")
    window = window_of(node, node.integers("kernel_shape"), x.shape[2:])
    ceil, include_pad = node.flag("ceil_mode"), node.flag("count_include_pad")
    half = all(2 * pad <= kernel for pad, kernel in zip(window.before, window.kernel, strict=True))
    pool = "avg_pool3d" if rank == 3 else "avg_pool2d"
    dense = set(window.dilations) <= {1} and rank > 1
    if dense and window.symmetric and half:
        return aten(pool, x, window.kernel, window.strides, window.before, ceil, include_pad)
    if dense and include_pad and not ceil:
        return aten(pool, pad_spatial(x, window, 0), window.kernel, window.strides)
    counts = np.maximum(_coverage(x, window, ceil, include_pad), 1)
    window = _grow(x, window, ceil)
    if dense:
        padded = pad_spatial(x, window, 0)
        sums = aten(pool, padded, window.kernel, window.strides, [0] * rank, False, True, 1)
    else:
        sums = _sum_pool(x, window, node)
    return sums / node.literal(counts.astype(np.float32), "window_sizes").to(x.dtype)


def _global_average_pool(node: Node) -> Lowered:
    x = node.tensor(0)
    return torch.mean(x, list(range(2, x.dim())), keepdim=True)


def _global_max_pool(node: Node) -> Lowered:
    x = node.tensor(0)
    return torch.amax(x, list(range(2, x.dim())), keepdim=True)


def _lp_pool(node: Node) -> Lowered:
    x, p = node.tensor(0), node.integer("p", 2)
    window = window_of(node, node.integers("kernel_shape"), x.shape[2:])
    powers = torch.pow(torch.abs(x), p)
    return torch.pow(_sum_pool(powers, _grow(x, window, node.flag("ceil_mode")), node), 1.0 / p)


def _global_lp_pool(node: Node) -> Lowered:
    x = node.tensor(0)
    return aten("linalg_vector_norm", x, node.integer("p", 2), list(range(2, x.dim())), True)


TABLE: Mapping[str, Lowering] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "GlobalLpPool": _global_lp_pool,
}
