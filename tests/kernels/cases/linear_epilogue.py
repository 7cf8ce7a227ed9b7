"""Cases of ``kernels/linear_epilogue.py``."""

from __future__ import annotations

import math
from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.linear_epilogue import KERNEL
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_HIGH = Config({"block_m": 32, "block_n": 16, "block_k": 32, "group_m": 3})
_HALVES = Config({"block_m": 16, "block_n": 256, "block_k": 32, "group_m": 8})


def activated(value: torch.Tensor, activation: str) -> torch.Tensor:
    """The formulas, in float64."""
    if activation == "gelu":
        below: torch.Tensor = torch.special.erfc(-value / math.sqrt(2)) / 2
        return value * below
    if activation == "gelu_tanh":
        return value / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
    formulas = {"none": value, "relu": value.clamp(min=0), "silu": value / (1 + torch.exp(-value))}
    return formulas[activation]


def truth(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor]:
    value = torch.einsum("...k,kn->...n", x.double(), weight.double())
    value = activated(value if bias is None else value + bias.double(), activation)
    return (value if residual is None else value + residual.double(),)


def _sizes(rows: int, depth: int, columns: int, activation: str = "none", **more: bool) -> dict[str, Any]:
    return {"rows": rows, "depth": depth, "columns": columns, "activation": activation, **more}


def _row_major_weight(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].contiguous()}


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    """Every other column of a wider weight, every third element of a longer bias."""
    weight = given["weight"].repeat_interleave(2, 1)[:, ::2]
    return given | {"weight": weight, "bias": given["bias"].repeat_interleave(3)[::3]}


def _three_dimensions(given: dict[str, Any]) -> dict[str, Any]:
    x, residual = given["x"], given["residual"]
    return given | {"x": x.view(2, -1, x.shape[-1]), "residual": residual.view(2, -1, residual.shape[-1])}


def _float32_bias(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"bias": given["bias"].float() / 3}


_BOTH = {"bias": True, "residual": True}

CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1)),
        Case(_sizes(7, 31, 13, "gelu", **_BOTH)),
        Case(_sizes(17, 53, 37, "silu", **_BOTH), config=_SMALL),
        Case(_sizes(16, 16, 16, "relu", bias=False), config=_SMALL),
        Case(_sizes(33, 48, 32, "gelu_tanh", bias=False, residual=True), config=_SMALL),
        Case(_sizes(101, 33, 31, "none", **_BOTH), config=_HIGH),
        Case(_sizes(15, 15, 15, "gelu"), config=_SMALL, change=_row_major_weight, label="row-major weight"),
        Case(_sizes(19, 40, 35, "relu"), config=_SMALL, change=_strided, label="strided weight and bias"),
        Case(_sizes(20, 257, 300, "silu", **_BOTH), config=_HALVES),
        Case(_sizes(34, 129, 255, "gelu_tanh", **_BOTH)),
        Case(_sizes(22, 24, 17, "gelu", **_BOTH), config=_SMALL, change=_three_dimensions, label="three dimensions"),
        Case(_sizes(5, 24, 17, "none"), change=_float32_bias, label="bias in float32"),
        Case(_sizes(3, 0, 5, "gelu", **_BOTH)),
        Case(_sizes(0, 8, 8)),
        Case(_sizes(3, 8, 0)),
    ),
    # Sums of some hundred products, of which float32 rounds each; activations leave what cancels.
    {**FLOAT_TOLERANCE, torch.float32: (2e-6, 4e-6)},
)
