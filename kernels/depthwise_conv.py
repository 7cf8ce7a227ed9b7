"""A depthwise convolution with batch normalisation and activation behind it, channels last, in one pass over memory.

    out = activation((conv(x, weight) + bias - mean) / sqrt(variance + epsilon) * gamma + beta)

Each channel is convolved with a filter of its own (MobileNet: Howard et al., 2017); the normalisation is that of
inference, folded into one scale and one shift for each channel when a program starts. What is not given adds nothing
and scales by one: with only ``gamma`` and ``beta`` they are a scale and a shift folded before. Everything is computed
in float32 and ``out`` is rounded once, where separate operators round after each.

Little is computed for each byte, so what counts is that nothing is read twice. A thread has some channels of four
neighbours in a row of ``out``: an element of ``x`` is loaded once for all taps of a row that meet it, and an element
of the filter once for the four. Rows are read again by the taps above and below, from cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._activations import ACTIVATIONS, activated
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._convolutions import convolutions
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk

__all__ = ["KERNEL", "channels_inside"]

NAME = "depthwise_conv"
CONFIGS = Configs.beside(__file__)
#: Filters up to this high and wide; larger ones are better done by other algorithms.
LARGEST = 11
#: Neighbours in a row of ``out`` that a thread computes together.
STRIP = 4


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def depthwise_conv_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    mean_pointer: tl.tensor,
    variance_pointer: tl.tensor,
    gamma_pointer: tl.tensor,
    beta_pointer: tl.tensor,
    out_pointer: tl.tensor,
    epsilon: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    x_stride_n: tl.tensor,
    x_stride_c: tl.tensor,
    x_stride_h: tl.tensor,
    x_stride_w: tl.tensor,
    weight_stride_c: tl.tensor,
    weight_stride_h: tl.tensor,
    weight_stride_w: tl.tensor,
    channels: tl.constexpr,
    kernel_h: tl.constexpr,
    kernel_w: tl.constexpr,
    stride: tl.constexpr,
    padding: tl.constexpr,
    dilation: tl.constexpr,
    activation: tl.constexpr,
    block_h: tl.constexpr,
    block_w: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Compute ``block_h`` rows x ``block_w`` strips of four columns x ``block_c`` channels of channels-last ``out``.

    The grid is the number of such tiles, channels running fastest, images slowest. Pointers of vectors may be None.
    """
    blocks_c: tl.constexpr = (channels + block_c - 1) // block_c
    tiles_w = tl.cdiv(out_width, 4 * block_w)
    tiles_h = tl.cdiv(out_height, block_h)
    tile = tl.program_id(0) // blocks_c
    image = tile // (tiles_w * tiles_h)
    strip = tl.arange(0, block_h * block_w)
    row = tile // tiles_w % tiles_h * block_h + strip // block_w
    column = (tile % tiles_w * block_w + strip % block_w) * 4
    channel = tl.program_id(0) % blocks_c * block_c + tl.arange(0, block_c)
    inside = channel < channels
    x_channels = x_pointer + image.to(tl.int64) * x_stride_n + channel.to(tl.int64) * x_stride_c
    weight_channels = weight_pointer + channel.to(tl.int64) * weight_stride_c
    left = column * stride - padding
    total0 = tl.zeros([block_h * block_w, block_c], dtype=tl.float32)
    total1, total2, total3 = total0, total0, total0
    for tap in range(kernel_h):
        y = row * stride - padding + tap * dilation
        first = y.to(tl.int64) * x_stride_h + left.to(tl.int64) * x_stride_w
        pixels = x_channels[None, :] + first[:, None]
        taps = weight_channels + tap * weight_stride_h
        has_row = (row < out_height) & (y >= 0) & (y < height)
        for step in tl.static_range(3 * stride + (kernel_w - 1) * dilation + 1):
            at = left + step
            has_pixel = (has_row & (at >= 0) & (at < width))[:, None] & inside[None, :]
            x = tl.load(pixels + step * x_stride_w, mask=has_pixel, other=0.0).to(tl.float32)
            total0 = _tap(total0, x, taps, weight_stride_w, inside, step, kernel_w, dilation)
            total1 = _tap(total1, x, taps, weight_stride_w, inside, step - stride, kernel_w, dilation)
            total2 = _tap(total2, x, taps, weight_stride_w, inside, step - 2 * stride, kernel_w, dilation)
            total3 = _tap(total3, x, taps, weight_stride_w, inside, step - 3 * stride, kernel_w, dilation)
    scale, shift = _folded(
        bias_pointer, mean_pointer, variance_pointer, gamma_pointer, beta_pointer, channel, inside, epsilon, block_c
    )
    first = ((image.to(tl.int64) * out_height + row) * out_width + column) * channels
    place = out_pointer + first[:, None] + channel[None, :]
    inside = (row < out_height)[:, None] & inside[None, :]
    left_over = (out_width - column)[:, None]
    _store(place, total0, scale, shift, inside & (left_over > 0), activation)
    _store(place + channels, total1, scale, shift, inside & (left_over > 1), activation)
    _store(place + 2 * channels, total2, scale, shift, inside & (left_over > 2), activation)
    _store(place + 3 * channels, total3, scale, shift, inside & (left_over > 3), activation)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _tap(
    total: tl.tensor,
    x: tl.tensor,
    taps: tl.tensor,
    stride: tl.tensor,
    inside: tl.tensor,
    distance: tl.constexpr,
    kernel_w: tl.constexpr,
    dilation: tl.constexpr,
) -> tl.tensor:
    """Add what ``x``, at a ``distance`` from the left end of the filter, contributes, if a tap is there.

    The compiler sees that the loads of one tap for four columns are one, and that an ``x`` without a tap is not read.
    """
    if distance >= 0 and distance % dilation == 0 and distance // dilation < kernel_w:
        weight = tl.load(taps + distance // dilation * stride, mask=inside, other=0.0).to(tl.float32)
        total += x * weight[None, :]
    return total


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _folded(
    bias_pointer: tl.tensor,
    mean_pointer: tl.tensor,
    variance_pointer: tl.tensor,
    gamma_pointer: tl.tensor,
    beta_pointer: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    epsilon: tl.tensor,
    block_c: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and shift of each channel that normalise a sum of products."""
    scale = tl.full([block_c], 1.0, tl.float32)
    shift = tl.zeros([block_c], dtype=tl.float32)
    if bias_pointer is not None:
        shift += tl.load(bias_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    if mean_pointer is not None:
        shift -= tl.load(mean_pointer + channel, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.load(variance_pointer + channel, mask=inside, other=1.0).to(tl.float32) + epsilon)
    if gamma_pointer is not None:
        scale *= tl.load(gamma_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    shift *= scale
    if beta_pointer is not None:
        shift += tl.load(beta_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _store(
    place: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    inside: tl.tensor,
    activation: tl.constexpr,
) -> None:
    """Normalise, activate and round one column of all strips."""
    value = activated(total * scale[None, :] + shift[None, :], activation)
    tl.store(place, value.to(place.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    epsilon: float,
    activation: str,
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the convolved, normalised and activated ``x`` into ``out``, on the current stream.

    Args:
        x: ``[N, C, H, W]``, float32, float16 or bfloat16, on a CUDA device. Any strides give the same; fast is
            ``torch.channels_last``.
        weight: ``[C, 1, R, S]`` of x's dtype, up to 11 x 11, of any strides; `channels_inside` gives the best.
        bias: ``[C]`` of any of the three dtypes, row-major, or None.
        mean: as ``bias``; of the normalisation.
        variance: as ``bias``; given where ``mean`` is.
        gamma: as ``bias``; the normalisation's weight, or a scale.
        beta: as ``bias``; the normalisation's bias, or a shift.
        stride: of the filter, in both directions.
        padding: zeros on all four sides.
        dilation: distance of neighbours in the filter.
        epsilon: added to the variance.
        activation: one of `opweave.kernels._activations.ACTIVATIONS`.
        out: ``[N, C, OH, OW]`` of x's dtype, ``torch.channels_last``; shares no memory with any other argument.
        config: how to launch; chosen by sizes if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, the output overlaps something, the filter
            is larger than ``x``, or there is no such activation.
    """
    vectors = {"bias": bias, "mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    shape = _check(x, weight, vectors, stride, padding, dilation, activation)
    check_tensor(NAME, "out", out, shape, x.dtype, x.device, row_major=False)
    if not out.permute(0, 2, 3, 1).is_contiguous():
        raise fail(NAME, f"needs out channels-last; {list(out.shape)} has strides {list(out.stride())}")
    present = {name: vector for name, vector in vectors.items() if vector is not None}
    check_apart(NAME, {"out": out}, {"x": x, "weight": weight, **present})
    check_device(NAME, depthwise_conv_kernel, x)
    if out.numel() == 0:
        return
    batch, channels, out_height, out_width = shape
    config = config or CONFIGS.choose(x.device, x.dtype, batch=batch, width=out_width, kernel=max(weight.shape[2:]))
    block_h, block_w, block_c = (config.constants[f"block_{name}"] for name in "hwc")
    tiles = -(-out_height // block_h) * -(-out_width // (STRIP * block_w)) * -(-channels // block_c)
    with torch.accelerator.device_index(x.device.index):
        depthwise_conv_kernel[(batch * tiles,)](
            x,
            weight,
            *vectors.values(),
            out,
            epsilon,
            *x.shape[2:],
            out_height,
            out_width,
            *x.stride(),
            weight.stride(0),
            *weight.stride()[2:],
            channels=channels,
            kernel_h=weight.shape[2],
            kernel_w=weight.shape[3],
            stride=stride,
            padding=padding,
            dilation=dilation,
            activation=activation,
            **config.options,
        )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    vectors: dict[str, torch.Tensor | None],
    stride: int,
    padding: int,
    dilation: int,
    activation: str,
) -> tuple[int, int, int, int]:
    """The shape of ``out``. Raises ExecutionError for what a launch cannot take."""
    check_tensor(NAME, "x", x, (None, None, None, None), FLOATS, x.device, row_major=False)
    batch, channels, height, width = x.shape
    check_tensor(NAME, "weight", weight, (channels, 1, None, None), x.dtype, x.device, row_major=False)
    for name, vector in vectors.items():
        if vector is not None:
            check_tensor(NAME, name, vector, (channels,), FLOATS, x.device)
    if (vectors["mean"] is None) != (vectors["variance"] is None):
        raise fail(NAME, "needs mean and variance both, or neither")
    if activation not in ACTIVATIONS:
        raise fail(NAME, f"knows the activations {', '.join(ACTIVATIONS)}; got {activation!r}")
    if stride < 1 or padding < 0 or dilation < 1:
        raise fail(NAME, f"needs positive steps; got stride {stride}, padding {padding}, dilation {dilation}")
    kernel = weight.shape[2:]
    if not all(1 <= extent <= LARGEST for extent in kernel):
        raise fail(NAME, f"needs a filter of 1 x 1 to {LARGEST} x {LARGEST}; got {kernel[0]} x {kernel[1]}")
    room = [extent + 2 * padding - dilation * (size - 1) - 1 for extent, size in zip(x.shape[2:], kernel, strict=True)]
    if min(room) < 0:
        raise fail(NAME, f"needs images as large as the filter; {height} x {width} with padding {padding} are not")
    return batch, channels, room[0] // stride + 1, room[1] // stride + 1


def allocate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    epsilon: float,
    activation: str,
) -> tuple[torch.Tensor]:
    """A new ``out``, not filled. Raises ExecutionError as ``launch`` does."""
    vectors = {"bias": bias, "mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    batch, channels, *extents = _check(x, weight, vectors, stride, padding, dilation, activation)
    return (x.new_empty((batch, *extents, channels)).permute(0, 3, 1, 2),)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    epsilon: float,
    activation: str,
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's one rounding; shapes as ``launch``."""
    wide: list[Any] = [None if vector is None else vector.float() for vector in (bias, mean, variance, gamma, beta)]
    value = eager(x.float(), weight.float(), *wide, stride, padding, dilation, epsilon, activation)  # type: ignore[call-arg] # five of them
    out = value.to(x.dtype).permute(0, 2, 3, 1).contiguous()
    return (out.permute(0, 3, 1, 2),)


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    epsilon: float,
    activation: str,
) -> torch.Tensor:
    """What a model says: a convolution with as many groups as channels, a normalisation, an activation."""
    value = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])
    if mean is not None:
        value = torch.nn.functional.batch_norm(value, mean, variance, gamma, beta, eps=epsilon)
    else:
        value = value if gamma is None else value * gamma[:, None, None]
        value = value if beta is None else value + beta[:, None, None]
    return ACTIVATIONS[activation](value)


def channels_inside(weight: torch.Tensor) -> torch.Tensor:
    """A filter ``[C, 1, R, S]`` with the same elements, neighbouring channels side by side: a row of loads a tap."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def cost(
    dtype: str,
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    norm: bool = True,
    bias: bool = False,
    activation: str = "none",
) -> Cost:
    """Flops and bytes of one launch: a product and a sum for each tap. Without ``padding``, as `arguments` pads.

    Behind them, normalisation counts two operations each element, a bias and an activation one. Bytes are compulsory,
    each tensor read or written once; vectors have the dtype of ``x``.
    """
    span = (kernel - 1) * dilation
    lost = span - 2 * (span // 2 if padding is None else padding)
    pixels = ((height - lost - 1) // stride + 1) * ((width - lost - 1) // stride + 1)
    elements = batch * channels * pixels
    values = batch * channels * height * width + elements + channels * (kernel * kernel + 4 * norm + bias)
    each = 2 * kernel * kernel + 2 * norm + bias + (activation != "none")
    return Cost(elements * each, values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    norm: bool = True,
    bias: bool = False,
    activation: str = "none",
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; padded so that an odd filter at stride 1 keeps sizes."""
    random = normal(device, seed)
    return {
        "x": random(batch, height, width, channels).to(dtype).permute(0, 3, 1, 2),
        "weight": channels_inside((random(channels, 1, kernel, kernel) / kernel).to(dtype)),
        "bias": random(channels).to(dtype) if bias else None,
        "mean": random(channels).to(dtype) if norm else None,
        "variance": (random(channels).abs() + 0.5).to(dtype) if norm else None,
        "gamma": random(channels).to(dtype) if norm else None,
        "beta": random(channels).to(dtype) if norm else None,
        "stride": stride,
        "padding": (kernel - 1) * dilation // 2,
        "dilation": dilation,
        "epsilon": 1e-3,
        "activation": activation,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph convolves with as many groups as channels, channels last, with what follows that the kernel knows.

    That is a normalisation of inference, whole or decomposed, or a scale and a shift of each channel; and then an
    activation. The filter is square, and steps and padding are the same in both directions. Of launches that replace
    the same convolution, those that replace most are returned.
    """
    walk = Walk(graph)
    convolved = {tensor.name for tensor in walk.results("conv2d", "convolution") if [*_depthwise(walk, tensor)]}
    if not convolved:
        return ()
    floats = {dtype_name(dtype) for dtype in FLOATS}
    tensors = (graph.tensor[op.outputs[0]] for op in graph.ops if op.outputs)
    found = [match for out in tensors if out.dtype in floats and len(out.shape) == 4 for match in _depthwise(walk, out)]
    writes = {op.name: op.outputs[0] for op in graph.ops if op.outputs}
    found = [match for match in found if convolved & {writes.get(name) for name in match.ops}]  # computed only once
    return tuple(match for match in found if not any({*match.ops} < {*other.ops} for other in found))


def _depthwise(walk: Walk, out: Tensor) -> Iterator[Match]:
    """Launches that compute ``out``."""
    floats = {dtype_name(dtype) for dtype in FLOATS}
    batch, channels = out.shape[:2]
    strides = (math.prod(out.shape[1:]), 1, out.shape[-1] * channels, channels)  # those of `allocate`
    for conv in convolutions(walk, out) if out.element_strides == strides else ():
        height, width = conv.x.shape[2:]
        kernel = conv.weight.shape[-1]
        if (conv.weight.shape, conv.groups, conv.x.shape[1]) != ((channels, 1, kernel, kernel), channels, channels):
            continue
        vectors = conv.vectors
        if not 1 <= kernel <= LARGEST or not {v.dtype for v in vectors.values() if v is not None} <= floats:
            continue
        if {conv.x.dtype, conv.weight.dtype} != {out.dtype}:
            continue
        steps = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        norm, bias = vectors["mean"] is not None, vectors["bias"] is not None
        launch_cost = cost(
            out.dtype, batch, channels, height, width, kernel, **steps, norm=norm, bias=bias, activation=conv.activation
        )
        last = {"epsilon": conv.epsilon, "activation": conv.activation}
        arguments: dict[str, Any] = {"x": conv.x, "weight": conv.weight, **vectors, **steps, **last}
        match = walk.match(NAME, arguments, (out,), launch_cost, row_major=False)
        if match is not None:
            yield match


_RELU6, _SILU, _HARDSWISH = ({"activation": name} for name in ("relu6", "silu", "hardswish"))
_CONVNEXT = {"kernel": 7, "norm": False, "bias": True}
#: Layers by name: channels, pixels of a side, and what else there is to say.
_LAYERS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("MobileNetV2 second block", 96, 112, {"stride": 2, **_RELU6}),
    ("MobileNetV2 14 x 14", 576, 14, _RELU6),
    ("MobileNetV3-L 14 x 14", 672, 14, {"kernel": 5, "stride": 2, **_HARDSWISH}),
    ("EfficientNet-B0 first block", 32, 112, _SILU),
    ("EfficientNet-B0 28 x 28", 240, 28, {"kernel": 5, **_SILU}),
    ("EfficientNet-B0 7 x 7", 1152, 7, {"kernel": 5, **_SILU}),
    ("ConvNeXt-T stage 1", 96, 56, _CONVNEXT),
    ("ConvNeXt-T stage 3", 384, 14, _CONVNEXT),
)

KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=tuple(
        Workload(
            f"{name}, batch {batch}", {"batch": batch, "channels": channels, "height": side, "width": side, **more}
        )
        for name, channels, side, more in _LAYERS
        for batch in (1, 64)
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
