"""Matrix products and normalisations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..node import CannotLower, Lowered, Lowering, Node
from ..types import dtype_of
from .aten import aten, aten_all
from .elementwise import narrow, widen

__all__ = ["TABLE"]


def _gemm(node: Node) -> Lowered:
    a, b, c = node.tensor(0), node.tensor(1), node.optional(2)
    alpha, beta, dtype = node.number("alpha", 1.0), node.number("beta", 1.0), a.dtype
    a, b = widen(a), widen(b)
    a = a.mT if node.flag("transA") else a
    b = b.mT if node.flag("transB") else b
    if not dtype.is_floating_point and not (alpha.is_integer() and beta.is_integer()):
        raise CannotLower("an integer Gemm with fractional factors")
    scale = (lambda factor: factor) if dtype.is_floating_point else int
    batched = (a.dim(), b.dim()) != (2, 2)  # not ONNX, but what Deeploy's exporter writes
    if c is None or beta == 0.0 or batched:
        product = torch.matmul(a, b)
        product = product if alpha == 1.0 else product * scale(alpha)
        if c is not None and beta != 0.0:
            product = product + (widen(c) if beta == 1.0 else widen(c) * scale(beta))
        return narrow(product, dtype)
    return narrow(torch.addmm(widen(c), a, b, beta=scale(beta), alpha=scale(alpha)), dtype)


def _matmul(node: Node) -> Lowered:
    a, b = node.tensor(0), node.tensor(1)
    return narrow(torch.matmul(widen(a), widen(b)), a.dtype)


def _einsum(node: Node) -> Lowered:
    return torch.einsum(node.string("equation"), *node.tensors())


def _batch_norm(node: Node) -> Sequence[Lowered]:
    x, scale, bias, mean, variance = (node.tensor(index) for index in range(5))
    epsilon, momentum = node.number("epsilon", 1e-5), node.number("momentum", 0.9)
    if node.opset < 9 and not node.flag("spatial", True):
        raise CannotLower("BatchNormalization over single activations (spatial=0)")
    if not node.flag("training_mode"):
        if any(node.wants(index) for index in range(1, 5)):
            raise CannotLower("BatchNormalization in the training mode of opset 13 and before")
        result = aten_all(
            "_native_batch_norm_legit_no_training",
            x,
            scale.to(x.dtype),
            bias.to(x.dtype),
            mean.to(x.dtype),
            variance.to(x.dtype),
            0.1,
            epsilon,
        )
        return [result[0]]
    dims = [dim for dim in range(x.dim()) if dim != 1]
    found_variance, found_mean = torch.var_mean(x, dims, correction=0)
    normalised = aten_all(
        "_native_batch_norm_legit_no_training", x, scale, bias, found_mean, found_variance, 0.1, epsilon
    )
    running_mean = mean * momentum + found_mean * (1 - momentum)
    running_variance = variance * momentum + found_variance * (1 - momentum)
    return [normalised[0], running_mean, running_variance]


def _instance_norm(node: Node) -> Lowered:
    x, scale, bias = node.tensor(0), node.tensor(1), node.tensor(2)
    return aten_all(
        "native_group_norm",
        x,
        scale,
        bias,
        x.shape[0],
        x.shape[1],
        math.prod(x.shape[2:]),
        x.shape[1],
        node.number("epsilon", 1e-5),
    )[0]


def _group_norm(node: Node) -> Lowered:
    x, scale, bias, groups = node.tensor(0), node.tensor(1), node.tensor(2), node.integer("num_groups")
    epsilon = node.number("epsilon", 1e-5)
    if node.opset < 21:  # one scale and bias a group; from opset 21 one a channel
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    rest = math.prod(x.shape[2:])
    return aten_all("native_group_norm", x, scale, bias, x.shape[0], x.shape[1], rest, groups, epsilon)[0]


def _layer_norm(node: Node) -> Sequence[Lowered]:
    x, scale, bias = node.tensor(0), node.tensor(1), node.optional(2)
    axis = node.axis(node.integer("axis", -1), x.dim())
    sizes = list(x.shape[axis:])
    epsilon = node.number("epsilon", 1e-5)
    fits = list(scale.shape) == sizes and (bias is None or list(bias.shape) == sizes)
    y, mean, inverse = aten_all("native_layer_norm", x, sizes, scale if fits else None, bias if fits else None, epsilon)
    if not fits:
        y = y * scale if bias is None else y * scale + bias
    outputs: list[Lowered] = [y]
    if node.wants(1) or node.wants(2):
        stash = dtype_of(node.integer("stash_type", 1), str(node))
        outputs += [value if value.dtype == stash else value.to(stash) for value in (mean, inverse)]
    return outputs


def _rms_norm(node: Node) -> Lowered:
    x, scale = node.tensor(0), node.tensor(1)
    axis = node.axis(node.integer("axis", -1), x.dim())
    stash = dtype_of(node.integer("stash_type", 1), str(node))
    wide = x if x.dtype == stash else x.to(stash)
    mean = torch.mean(torch.square(wide), list(range(axis, x.dim())), keepdim=True)
    normalised = wide * torch.rsqrt(mean + node.number("epsilon", 1e-5))
    return (normalised if x.dtype == stash else normalised.to(x.dtype)) * scale


def _lrn(node: Node) -> Lowered:
    x, size = node.tensor(0), node.integer("size")
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    n, c = x.shape[0], x.shape[1]
    rest = math.prod(x.shape[2:])
    squares = torch.square(x).reshape(n, 1, c, rest)
    padded = torch.constant_pad_nd(squares, [0, 0, (size - 1) // 2, size // 2])
    means = aten("avg_pool2d", padded, [size, 1], [1, 1]).reshape(x.shape)
    return x / torch.pow(means * alpha + bias, beta)


def _lp_normalization(node: Node) -> Lowered:
    x, p = node.tensor(0), node.integer("p", 2)
    axis = node.axis(node.integer("axis", -1), x.dim())
    norm = torch.linalg.vector_norm(x, p, [axis], keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _mean_variance_normalization(node: Node) -> Lowered:
    x, axes = node.tensor(0), node.integers("axes", [0, 2, 3])
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


def _dropout(node: Node) -> Sequence[Lowered]:
    x = node.tensor(0)
    if node.opset >= 12 and node.has(2) and node.scalar(2):
        ratio = float(node.scalar(1)) if node.has(1) else 0.5
        if ratio != 0.0:
            raise CannotLower("Dropout that drops draws random numbers")
    return [x, torch.ones_like(x, dtype=torch.bool)] if node.wants(1) else [x]


TABLE: Mapping[str, Lowering] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "LRN": _lrn,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "Dropout": _dropout,
}
