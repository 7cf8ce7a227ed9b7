"""A convolution of one by one pixels as a matrix product, with what follows it in its epilogue; channels last.

    out = activation((conv1x1(x, weight) + bias - mean) / sqrt(variance + epsilon) * gamma + beta + residual)

The normalisation is that of inference, folded into one scale and one shift for each channel when a program ends. What
is not given adds nothing and scales by one: ``gamma`` and ``beta`` alone are a scale and a shift folded before, while
``bias`` and ``gamma`` alone are ConvNeXt's layer scale. The residual comes before the activation, as in ResNet (He et
al., 2016); where it comes last, as in MobileNetV2 and EfficientNet, nothing is activated. Products are summed in
float32, the epilogue is computed in float32, and ``out`` is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph, Tensor
from ._activations import ACTIVATIONS
from ._checks import FLOATS, check_apart, check_device, check_tensor, dtype_name, fail
from ._configs import Config, Configs
from ._convolutions import Convolution, convolutions
from ._epilogues import addends, outermost
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match, Walk
from ._matmul import finish, multiplied, sizes_of
from ._patterns import activations
from ._tiles import swizzled

__all__ = ["KERNEL"]

NAME = "pointwise_conv"
CONFIGS = Configs.beside(__file__)
#: What the kernel computes last.
KNOWN = ("none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh")


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def pointwise_conv_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    mean_pointer: tl.tensor,
    variance_pointer: tl.tensor,
    gamma_pointer: tl.tensor,
    beta_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    out_pointer: tl.tensor,
    epsilon: tl.tensor,
    pixels: tl.tensor,
    stride_in: tl.constexpr,
    stride_out: tl.constexpr,
    channels: tl.constexpr,
    filters: tl.constexpr,
    activation: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of ``out`` [pixels, filters]; the grid is the number of tiles. Pointers may be None."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(pixels, block_m), tl.cdiv(filters, block_n), group_m)
    pixel = tile_m * block_m + tl.arange(0, block_m)
    one = tile_n * block_n + tl.arange(0, block_n)
    value = multiplied(x_pointer, weight_pointer, pixel, one, pixels, stride_in, stride_out, filters, channels, block_k)
    finish(
        value,
        pixel,
        tile_n * block_n,
        bias_pointer,
        mean_pointer,
        variance_pointer,
        gamma_pointer,
        beta_pointer,
        residual_pointer,
        out_pointer,
        epsilon,
        pixels,
        1,
        filters,
        activation,
        residual_first=True,
    )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    epsilon: float = 0.0,
    activation: str = "none",
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the convolved, normalised and activated ``x`` into ``out``, on the current stream.

    Args:
        x: ``[images, channels, height, width]``, float32, float16 or bfloat16, channels last, on a CUDA device.
        weight: ``[filters, channels, 1, 1]`` of x's dtype and any strides.
        bias: ``[filters]`` of any of the three dtypes, row-major, or None.
        mean: as ``bias``; of the normalisation.
        variance: as ``bias``; given where ``mean`` is.
        gamma: as ``bias``; the normalisation's weight, or a scale.
        beta: as ``bias``; the normalisation's bias, or a shift.
        residual: as ``out``, or None.
        epsilon: added to the variance.
        activation: ``none``, ``relu``, ``relu6``, ``silu``, ``hardswish``, ``gelu`` or ``gelu_tanh``.
        out: ``[images, filters, height, width]`` of x's dtype, channels last; written, shares no memory with any other
            argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, the output overlaps something, or there is
            no such activation.
    """
    vectors = {"bias": bias, "mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    _check(x, weight, vectors, residual, activation)
    _check_image("out", out, _shape(x, weight), x)
    read = {"x": x, "weight": weight, **vectors, "residual": residual}
    check_apart(NAME, {"out": out}, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, pointwise_conv_kernel, x)
    if out.numel() == 0:
        return
    matrix = weight[:, :, 0, 0].t()
    channels, filters = matrix.shape
    pixels = out.numel() // filters
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(pixels, matrix))
    tiles = -(-pixels // config.constants["block_m"]) * -(-filters // config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        pointwise_conv_kernel[(tiles,)](
            x,
            weight,
            *vectors.values(),
            residual,
            out,
            epsilon,
            pixels,
            stride_in=matrix.stride(0),
            stride_out=matrix.stride(1),
            channels=channels,
            filters=filters,
            activation=activation,
            **config.options,
        )


def _shape(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    return (x.shape[0], weight.shape[0], *x.shape[2:])


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    vectors: Mapping[str, torch.Tensor | None],
    residual: torch.Tensor | None,
    activation: str,
) -> None:
    _check_image("x", x, (None,) * 4, x)
    check_tensor(NAME, "weight", weight, (None, x.shape[1], 1, 1), x.dtype, x.device, row_major=False)
    if (vectors["mean"] is None) != (vectors["variance"] is None):
        raise fail(NAME, "needs mean and variance both, or neither")
    for name, tensor in vectors.items():
        if tensor is not None:
            check_tensor(NAME, name, tensor, weight.shape[:1], FLOATS, x.device)
    if residual is not None:
        _check_image("residual", residual, _shape(x, weight), x)
    if activation not in KNOWN:
        raise fail(NAME, f"knows the activations {', '.join(KNOWN)}; got {activation!r}")


def _check_image(name: str, image: torch.Tensor, shape: tuple[int | None, ...], x: torch.Tensor) -> None:
    check_tensor(NAME, name, image, shape, FLOATS if image is x else x.dtype, x.device, row_major=False)
    if not image.is_contiguous(memory_format=torch.channels_last):
        raise fail(
            NAME,
            f"needs {name} channels last; {list(image.shape)} has strides {list(image.stride())}",
            hint="call .to(memory_format=torch.channels_last) on the model and its inputs",
        )


def allocate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    epsilon: float = 0.0,
    activation: str = "none",
) -> tuple[torch.Tensor]:
    """A new ``out``, channels last, not filled. Raises ExecutionError as ``launch`` does."""
    vectors = {"bias": bias, "mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    _check(x, weight, vectors, residual, activation)
    shape = _shape(x, weight)
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last),)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    epsilon: float = 0.0,
    activation: str = "none",
) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's one rounding; shapes and layout as ``launch``."""
    value = x.float().permute(0, 2, 3, 1) @ weight[:, :, 0, 0].t().float()
    value = value if bias is None else value + bias.float()
    if mean is not None and variance is not None:
        value = (value - mean.float()) * torch.rsqrt(variance.float() + epsilon)
    value = value if gamma is None else value * gamma.float()
    value = value if beta is None else value + beta.float()
    value = value if residual is None else value + residual.permute(0, 2, 3, 1).float()
    return (ACTIVATIONS[activation](value).to(x.dtype).permute(0, 3, 1, 2),)


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    epsilon: float = 0.0,
    activation: str = "none",
) -> torch.Tensor:
    """What a model says: a convolution, a normalisation, an addition and an activation."""
    value = torch.nn.functional.conv2d(x, weight, bias)
    if mean is not None:
        value = torch.nn.functional.batch_norm(value, mean, variance, gamma, beta, eps=epsilon)
    else:
        value = value if gamma is None else value * gamma[:, None, None]
        value = value if beta is None else value + beta[:, None, None]
    return ACTIVATIONS[activation](value if residual is None else value + residual)


def cost(
    dtype: str,
    images: int,
    channels: int,
    filters: int,
    height: int,
    width: int,
    activation: str = "none",
    norm: bool = True,
    bias: bool = False,
    scale: bool = False,
    residual: bool = False,
) -> Cost:
    """Flops and bytes of one launch: a multiplication and an addition for each pixel, channel and filter.

    Behind them, bias, layer scale (``scale``, a gamma without a normalisation), residual and activation count one
    operation each for every element, and the normalisation two. Bytes are compulsory, each tensor read or written once.
    """
    pixels = images * height * width
    elements = pixels * filters
    epilogue = bias + 2 * norm + scale + residual + (activation != "none")
    values = pixels * channels + filters * (channels + bias + 4 * norm + scale) + elements * (1 + residual)
    return Cost(elements * (2 * channels + epilogue), values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    images: int,
    channels: int,
    filters: int,
    height: int,
    width: int,
    activation: str = "none",
    norm: bool = True,
    bias: bool = False,
    scale: bool = False,
    residual: bool = False,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; with ``scale``, ``gamma`` is there without ``norm``."""
    random = normal(device, seed)
    last = torch.channels_last

    def positive(wanted: bool) -> torch.Tensor | None:
        return (1 + random(filters).abs() / 8).to(dtype) if wanted else None

    def vector(wanted: bool) -> torch.Tensor | None:
        return random(filters).to(dtype) if wanted else None

    return {
        "x": random(images, channels, height, width).to(dtype, memory_format=last),
        "weight": (random(filters, channels, 1, 1) / math.sqrt(max(channels, 1))).to(dtype),
        "bias": vector(bias),
        "mean": vector(norm),
        "variance": positive(norm),
        "gamma": positive(norm or scale),
        "beta": vector(norm),
        "residual": random(images, filters, height, width).to(dtype, memory_format=last) if residual else None,
        "epsilon": 1e-5,
        "activation": activation,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph convolves pixels one by one, channels last, with something behind it that the kernel knows.

    That is a normalisation of inference, whole or decomposed, or a scale and a shift of each channel; then the addition
    of an image of the same shape; then an activation. A convolution and a bias alone are left to the vendor's library.
    Of launches that replace the same operators, those that replace most are returned.
    """
    walk = Walk(graph)
    if not any(_is_pointwise(walk, tensor) for tensor in walk.results("conv2d", "convolution")):
        return ()
    floats = {dtype_name(dtype) for dtype in FLOATS}
    tensors = (graph.tensor[op.outputs[0]] for op in graph.ops if op.outputs)
    images = (out for out in tensors if out.dtype in floats and len(out.shape) == 4 and _is_channels_last(out))
    return outermost(match for out in images for match in _ending(walk, out) if len(match.ops) > 1)


def _is_pointwise(walk: Walk, tensor: Tensor) -> bool:
    return any(conv.weight.shape[2:] == (1, 1) for conv in convolutions(walk, tensor))


def _ending(walk: Walk, out: Tensor) -> Iterator[Match]:
    """Launches that compute ``out``."""
    for conv in convolutions(walk, out):
        yield from _matched(walk, conv, None, conv.activation, out)
    for activation, inner in (("none", out), *activations(walk, out, *KNOWN[1:])):
        for term, residual in addends(walk, inner):
            for conv in convolutions(walk, term):
                if conv.activation == "none" and (residual.shape, residual.dtype) == (out.shape, out.dtype):
                    yield from _matched(walk, conv, residual, activation, out)


def _matched(walk: Walk, conv: Convolution, residual: Tensor | None, activation: str, out: Tensor) -> Iterator[Match]:
    """A launch for what was found, if shapes, dtypes, strides and steps are those of the kernel."""
    images, filters, height, width = out.shape
    channels = conv.x.shape[1]
    floats = {dtype_name(dtype) for dtype in FLOATS}
    fits = (
        conv.weight.shape == (filters, channels, 1, 1)
        and (conv.groups, conv.stride, conv.padding) == (1, 1, 0)
        and {conv.x.dtype, conv.weight.dtype} == {out.dtype}
        and {vector.dtype for vector in conv.vectors.values() if vector is not None} <= floats
        and all(_is_channels_last(image) for image in (conv.x, residual or conv.x))
        and activation in KNOWN
    )
    if not fits:
        return
    norm, bias = conv.vectors["mean"] is not None, conv.vectors["bias"] is not None
    more = {"norm": norm, "bias": bias, "scale": not norm and conv.vectors["gamma"] is not None}
    launch_cost = cost(
        out.dtype, images, channels, filters, height, width, activation, residual=residual is not None, **more
    )
    last = {"residual": residual, "epsilon": conv.epsilon, "activation": activation}
    match = walk.match(
        NAME, {"x": conv.x, "weight": conv.weight, **conv.vectors, **last}, (out,), launch_cost, row_major=False
    )
    if match is not None:
        yield match


def _is_channels_last(image: Tensor) -> bool:
    """Whether it has the strides that `allocate` gives an image."""
    _, channels, height, width = image.shape
    return image.element_strides == (height * width * channels, 1, width * channels, channels)


def _workload(name: str, channels: int, filters: int, side: int, **more: Any) -> Workload:
    sizes = {"images": 64, "channels": channels, "filters": filters, "height": side, "width": side}
    return Workload(f"{name}, batch 64", {**sizes, **more})


KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=(
        _workload("ResNet-50 layer 1 expansion + residual", 64, 256, 56, activation="relu", residual=True),
        _workload("ResNet-50 layer 4 reduction", 2048, 512, 7, activation="relu"),
        _workload("MobileNetV2 first expansion", 16, 96, 112, activation="relu6"),
        _workload("MobileNetV2 projection + residual", 144, 24, 56, residual=True),
        _workload("ConvNeXt-T stage 2 up + GELU", 192, 768, 28, activation="gelu", norm=False, bias=True),
        _workload(
            "ConvNeXt-T stage 2 down + layer scale + residual",
            768,
            192,
            28,
            norm=False,
            bias=True,
            scale=True,
            residual=True,
        ),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
