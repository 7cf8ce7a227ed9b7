"""Cases of ``kernels/depthwise_conv.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from opweave.kernels._configs import Config
from opweave.kernels.depthwise_conv import KERNEL
from tests.kernels.conforming import Case, Cases

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda value: value,
    "relu": lambda value: value.clamp(min=0),
    "relu6": lambda value: value.clamp(0, 6),
    "gelu": lambda value: value * torch.special.ndtr(value),
    "silu": lambda value: value / (1 + torch.exp(-value)),
    "hardswish": lambda value: value * (value + 3).clamp(0, 6) / 6,
}


def truth(
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
    """Tap by tap: each adds a shifted image."""

    def wide(vector: torch.Tensor | None, default: float) -> torch.Tensor:
        given = x.new_full((x.shape[1],), default) if vector is None else vector
        return given.double()[:, None, None]

    _, _, high, across = weight.shape
    image = functional.pad(x.double(), (padding,) * 4)
    span_h, span_w = (image.shape[2] - dilation * (high - 1), image.shape[3] - dilation * (across - 1))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for r in range(high):
        for s in range(across):
            top, left = r * dilation, s * dilation
            shifted = image[:, :, top : top + span_h : stride, left : left + span_w : stride]
            total = total + shifted * weight.double()[:, 0, r, s][:, None, None]
    scale = torch.rsqrt(wide(variance, 1.0) + (epsilon if variance is not None else 0)) * wide(gamma, 1.0)
    value = (total + wide(bias, 0.0) - wide(mean, 0.0)) * scale + wide(beta, 0.0)
    return (_ACTIVATIONS[activation](value),)


def _config(block_h: int, block_w: int, block_c: int) -> Config:
    return Config({"block_h": block_h, "block_w": block_w, "block_c": block_c})


_SMALL = _config(2, 2, 16)


def _case(shape: tuple[int, int, int, int], config: Config | None = None, **more: Any) -> Case:
    return Case(dict(zip(("batch", "channels", "height", "width"), shape, strict=True)) | more, config)


def _folded(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"mean": None, "variance": None, "bias": given["bias"].float()}


def _without_affine(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"gamma": None, "beta": None, "mean": given["mean"].float(), "variance": given["variance"].float()}


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    """Channel slices of a wider image, a contiguous filter with fewer rows than columns, more padding than needed."""
    channels = given["x"].shape[1] // 2
    vectors = {name: given[name][:channels].contiguous() for name in ("mean", "variance", "gamma", "beta")}
    weight = given["weight"][channels:].contiguous()[:, :, 1:]
    return given | vectors | {"x": given["x"][:, channels:], "weight": weight, "padding": 2}


CASES = Cases(
    KERNEL,
    truth,
    (
        _case((1, 1, 1, 1), kernel=1, norm=False),
        _case((2, 17, 3, 13), _SMALL, bias=True, activation="silu"),
        _case((1, 16, 4, 8), _SMALL, activation="relu6"),
        _case((1, 17, 5, 9), _SMALL, stride=2, activation="hardswish"),
        _case((2, 8, 9, 7), _SMALL, kernel=5, stride=2, activation="relu"),
        _case((1, 8, 8, 18), _SMALL, kernel=3, dilation=2, norm=False, bias=True),
        _case((1, 8, 7, 9), _SMALL, kernel=3, stride=3, dilation=2, activation="silu"),
        _case((1, 24, 7, 7), kernel=7, norm=False, bias=True, activation="gelu"),
        _case((1, 3, 2, 5), _config(2, 2, 4), kernel=11),
        _case((0, 8, 4, 4)),
        _case((1, 70, 5, 17), kernel=3),
        Case(
            {"batch": 2, "channels": 9, "height": 3, "width": 6, "bias": True, "activation": "silu"},
            _SMALL,
            _folded,
            label="scale and shift",
        ),
        Case({"batch": 1, "channels": 9, "height": 3, "width": 6}, _SMALL, _without_affine, label="no affine"),
        Case({"batch": 2, "channels": 22, "height": 5, "width": 6}, _SMALL, _strided, label="strides"),
        Case(
            {"batch": 2, "channels": 5, "height": 4, "width": 6},
            _SMALL,
            lambda given: given | {"x": given["x"].contiguous()},
            label="channels first",
        ),
    ),
)
