"""Activation functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows

from ..node import Lowered, Lowering, Node
from .aten import aten
from .elementwise import narrow, unary, widen

__all__ = ["TABLE"]


def _prelu(node: Node) -> Lowered:
    x, slope = node.tensor(0), node.tensor(1)
    if not x.is_floating_point():
        return narrow(torch.where(widen(x) > 0, widen(x), widen(x) * widen(slope)), x.dtype)
    channels_only = x.dim() >= 2 and slope.dim() == x.dim() - 1 and slope.numel() == x.shape[1] == slope.shape[0]
    if slope.numel() == 1 or (channels_only and slope.shape[1:].numel() == 1):
        return aten("_prelu_kernel", x, slope.reshape([1, -1] + [1] * (x.dim() - 2))) if x.dim() >= 2 \
            else torch.where(x > 0, x, x * slope)  # fmt: skip
    return torch.where(x > 0, x, x * slope)


def _gelu(node: Node) -> Lowered:
    return F.gelu(node.tensor(0), approximate=node.string("approximate", "none"))


def _hard_sigmoid(node: Node) -> Lowered:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    return torch.clamp(node.tensor(0) * alpha + beta, 0.0, 1.0)


def _selu(node: Node) -> Lowered:
    alpha, gamma = node.number("alpha", 1.6732632423543772), node.number("gamma", 1.0507009873554805)
    return aten("elu", node.tensor(0), alpha, gamma)


def _celu(node: Node) -> Lowered:
    return F.celu(node.tensor(0), node.number("alpha", 1.0))


def _shrink(node: Node) -> Lowered:
    x, bias, bound = node.tensor(0), node.number("bias", 0.0), node.number("lambd", 0.5)
    wide = x if x.is_floating_point() else widen(x).to(torch.float64)
    zero = torch.zeros_like(wide)
    return torch.where(wide < -bound, wide + bias, torch.where(wide > bound, wide - bias, zero)).to(x.dtype)


def _thresholded_relu(node: Node) -> Lowered:
    x, alpha = node.tensor(0), node.number("alpha", 1.0)
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _swish(node: Node) -> Lowered:
    x, alpha = node.tensor(0), node.number("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def _softsign(x: torch.Tensor) -> torch.Tensor:
    return x / (torch.abs(x) + 1)


def _relu(node: Node) -> Lowered:
    return torch.relu(node.tensor(0))


def _microsoft_gelu(node: Node) -> Lowered:
    return F.gelu(node.tensor(0))


TABLE: Mapping[str, Lowering] = {
    "Relu": _relu,
    "LeakyRelu": lambda node: F.leaky_relu(node.tensor(0), node.number("alpha", 0.01)),
    "Elu": lambda node: F.elu(node.tensor(0), node.number("alpha", 1.0)),
    "Softplus": lambda node: F.softplus(node.tensor(0)),
    "PRelu": _prelu,
    "Gelu": _gelu,
    "com.microsoft::Gelu": _microsoft_gelu,
    "HardSigmoid": _hard_sigmoid,
    "Selu": _selu,
    "Celu": _celu,
    "Shrink": _shrink,
    "ThresholdedRelu": _thresholded_relu,
    "Swish": _swish,
    "Softsign": unary(_softsign),
    "HardSwish": unary(F.hardswish),
    "Mish": unary(F.mish),
}
