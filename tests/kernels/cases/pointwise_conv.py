"""Cases of ``kernels/pointwise_conv.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.pointwise_conv import KERNEL
from tests.kernels.cases import linear_epilogue
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_HALVES = Config({"block_m": 32, "block_n": 256, "block_k": 32, "group_m": 8})


def activated(value: torch.Tensor, activation: str) -> torch.Tensor:
    """The formulas, in float64."""
    if activation == "relu6":
        return value.clamp(0, 6)
    if activation == "hardswish":
        return value * (value + 3).clamp(0, 6) / 6
    return linear_epilogue.activated(value, activation)


def truth(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    variance: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    epsilon: float,
    activation: str,
) -> tuple[torch.Tensor]:
    value = torch.einsum("nchw,fc->nfhw", x.double(), weight.double()[..., 0, 0])
    spread = (variance.double() + epsilon).sqrt() if variance is not None else None
    for name, one in (("add", bias), ("sub", mean), ("div", spread), ("mul", gamma), ("add", beta)):
        value = value if one is None else getattr(value, name)(one.double()[:, None, None])
    return (activated(value if residual is None else value + residual.double(), activation),)


def _sizes(images: int, channels: int, filters: int, height: int, width: int, last: str = "none", **more: bool) -> Any:
    sizes = {"images": images, "channels": channels, "filters": filters, "height": height, "width": width}
    return {**sizes, "activation": last, **more}


def _wide(given: dict[str, Any]) -> dict[str, Any]:
    """Activations are flat, or end, beyond 3 and 6."""
    return given | {"x": 4 * given["x"]}


def _strided_weight(given: dict[str, Any]) -> dict[str, Any]:
    weight = given["weight"].repeat_interleave(2, 1)[:, ::2]
    return given | {"weight": weight.transpose(0, 1).contiguous().transpose(0, 1), "mean": given["mean"].float()}


def _folded(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"mean": None, "variance": None}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1, 1, 1)),
        Case(_sizes(2, 31, 13, 5, 3, "relu6", residual=True), change=_wide),
        Case(_sizes(3, 53, 37, 3, 7, "hardswish", residual=True, bias=True), config=_SMALL, change=_wide),
        Case(_sizes(1, 16, 16, 4, 4, "relu", norm=False, bias=True), config=_SMALL),
        Case(_sizes(2, 48, 33, 3, 5, "silu", norm=False, bias=True, scale=True, residual=True), config=_SMALL),
        Case(_sizes(1, 15, 17, 3, 5, "gelu", norm=False), config=_SMALL),
        Case(_sizes(2, 65, 300, 5, 4, "hardswish", residual=True), config=_HALVES, change=_wide),
        Case(_sizes(2, 70, 33, 9, 9, "gelu_tanh", residual=True)),
        Case(_sizes(2, 20, 19, 3, 3, "none"), change=_folded, label="folded normalisation"),
        Case(_sizes(2, 24, 19, 3, 3, "relu"), config=_SMALL, change=_strided_weight, label="strided weight"),
        Case(_sizes(3, 17, 5, 1, 1, "none", residual=True)),
        Case(_sizes(3, 1, 5, 2, 3, "relu")),
        Case(_sizes(2, 0, 3, 2, 2, "relu", residual=True)),
        Case(_sizes(0, 3, 3, 2, 2)),
        Case(_sizes(2, 3, 0, 2, 2)),
        Case(_sizes(2, 3, 3, 0, 2)),
    ),
    # Sums of some hundred products, of which float32 rounds each.
    {**FLOAT_TOLERANCE, torch.float32: (2e-6, 4e-6)},
)
