"""Patterns that several kernels share: linear layers, activations and normalisations, whole and decomposed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..compiler.graph import Tensor
from ._match import Pattern, Walk, any_tensor, call, either, is_row_major, literal, reshaped, transposed

__all__ = ["ACTIVATIONS", "Linear", "Norm", "activations", "linears", "norms", "sums"]

_X = any_tensor("x")


def _gelu_of(inner: Pattern) -> Pattern:
    """``x / 2 * (1 + inner)``, in the two groupings that are in use."""
    half, shifted = call("mul", _X, 0.5), call("add", inner, 1)
    return either(call("mul", half, shifted), call("mul", call("mul", _X, shifted), 0.5))


_CUBE = either(call("mul", call("mul", _X, _X), _X), call("pow", _X, 3))
_TANH = call("tanh", call("mul", call("add", _X, call("mul", _CUBE, 0.044715)), math.sqrt(2 / math.pi)))
_HARD_SIX = call("clamp_max", call("clamp_min", call("add", _X, 3), 0), 6)

#: What computes ``activation(x)``, whole as ATen has it and in the parts that Inductor's decompositions leave.
ACTIVATIONS: Mapping[str, Pattern] = MappingProxyType(
    {
        "silu": either(
            call("silu", _X),
            call("mul", _X, call("sigmoid", _X)),
            call("div", _X, call("add", call("exp", call("neg", _X)), 1)),
        ),
        "gelu": either(
            call("gelu", _X),
            call("gelu", _X, approximate="none"),
            _gelu_of(call("erf", call("mul", _X, math.sqrt(0.5)))),
            _gelu_of(call("erf", call("div", _X, math.sqrt(2)))),
        ),
        "gelu_tanh": either(call("gelu", _X, approximate="tanh"), _gelu_of(_TANH)),
        "relu": either(call("relu", _X), call("clamp_min", _X, 0)),
        "relu6": either(
            call("hardtanh", _X, 0, 6),
            call("clamp", _X, 0, 6),
            call("clamp_max", call("clamp_min", _X, 0), 6),
            call("relu6", _X),
        ),
        "hardswish": either(
            call("hardswish", _X),
            call("div", call("mul", _X, _HARD_SIX), 6),
            call("mul", _X, call("div", _HARD_SIX, 6)),
        ),
    }
)


def activations(walk: Walk, tensor: Tensor, *allowed: str, result: str = "") -> Iterator[tuple[str, Tensor]]:
    """Which activation ``tensor`` is the result of, by its name in ``ACTIVATIONS``, and of what.

    ``result`` is the dtype of the launch's result, where ``tensor`` is a step on the way and has another.
    """
    for name in allowed or ACTIVATIONS:
        for found in walk.find(ACTIVATIONS[name], tensor, result=result):
            yield name, found["x"]
            break


@dataclass(frozen=True)
class Linear:
    """``x @ weight + bias``: ``x`` [..., K] row-major, with the leading dimensions asked for; ``weight`` [K, N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


_PRODUCT = either(call("mm", any_tensor("x"), any_tensor("w")), call("matmul", any_tensor("x"), any_tensor("w")))
_LINEARS: tuple[tuple[Pattern, bool], ...] = (  # and whether the weight lies [N, K]
    (call("linear", any_tensor("x"), any_tensor("w"), any_tensor("b")), True),
    (call("linear", any_tensor("x"), any_tensor("w")), True),
    (call("addmm", any_tensor("b"), any_tensor("x"), any_tensor("w")), False),
    (call("add", _PRODUCT, any_tensor("b")), False),
    (_PRODUCT, False),
)


def linears(walk: Walk, tensor: Tensor) -> Iterator[Linear]:
    """The linear layers, with a weight of two dimensions, that ``tensor`` [..., N] may be the result of.

    ``x`` comes with the leading dimensions of ``tensor``. All operands have its dtype.
    """
    for pattern, is_transposed in _LINEARS:
        for found in walk.find(pattern, tensor):
            weight = found["w"]
            if len(weight.shape) != 2:
                continue
            weight = transposed(weight) if is_transposed else weight
            inner, columns = weight.shape
            bias = found.tensors.get("b")
            x = reshaped(found["x"], (*tensor.shape[:-1], inner)) if tensor.shape else None
            if x is None or tensor.shape[-1] != columns or not is_row_major(x):
                continue
            if bias is not None and (bias.shape != (columns,) or not is_row_major(bias)):
                continue
            if any(t is not None and t.dtype != tensor.dtype for t in (x, weight, bias)):
                continue
            yield Linear(x, weight, bias)


_WEIGHT, _BIAS, _SHAPE, _EPSILON = any_tensor("weight"), any_tensor("bias"), literal("shape"), literal("epsilon")
_SQUARE = either(call("pow", _X, 2), call("mul", _X, _X), call("square", _X))
_SCALE = call("rsqrt", call("add", call("mean", _SQUARE, literal("dims"), True), _EPSILON))
_RMS_NORM = either(
    call("rms_norm", _X, _SHAPE, _WEIGHT, _EPSILON),
    call("rms_norm", _X, _SHAPE, _WEIGHT),
    call("_fused_rms_norm", _X, _SHAPE, _WEIGHT, _EPSILON),
    call("mul", call("mul", _X, _SCALE), _WEIGHT),
)
_MEAN = either(
    call("var_mean", _X, literal("dims"), correction=0, keepdim=True, result=1),
    call("mean", _X, literal("dims"), True),
)
_VARIANCE = call("var_mean", _X, literal("dims"), correction=0, keepdim=True)
_NORMALISED = call("mul", call("sub", _X, _MEAN), call("rsqrt", call("add", _VARIANCE, _EPSILON)))
_LAYER_NORM = either(
    call("layer_norm", _X, _SHAPE, _WEIGHT, _BIAS, _EPSILON),
    call("layer_norm", _X, _SHAPE, _WEIGHT, _BIAS),
    call("native_layer_norm", _X, _SHAPE, _WEIGHT, _BIAS, _EPSILON),
    call("add", call("mul", _NORMALISED, _WEIGHT), _BIAS),
)


@dataclass(frozen=True)
class Norm:
    """A normalisation of ``x`` over its last dimension, times ``weight`` [columns], plus ``bias`` if it has one."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    epsilon: float


def norms(walk: Walk, tensor: Tensor, kind: str, *, result: str = "") -> Iterator[Norm]:
    """RMS (``kind="rms"``) or layer (``"layer"``) normalisations that ``tensor`` may be the result of.

    They are one call, or what it decomposes to; where the dtype is narrower, computed in float32 or in the dtype
    itself. ``x``, weight and ``tensor`` are row-major. ``x`` has the shape of ``tensor`` and the dtype ``result``,
    which is that of ``tensor`` where none is given.
    """
    result = result or tensor.dtype
    for found in walk.find(_RMS_NORM if kind == "rms" else _LAYER_NORM, tensor, result=result):
        columns = tensor.shape[-1:]
        dims = found.literals.get("dims", [-1])
        given = found.literals.get("epsilon")
        x, weight, bias = reshaped(found["x"], tensor.shape), found["weight"], found.tensors.get("bias")
        if x is None or tuple(found.literals.get("shape", columns)) != columns or weight.shape != columns:
            continue
        if dims not in ([-1], [len(found["x"].shape) - 1]) or found["x"].shape[-1:] != columns:
            continue
        if x.dtype != result or not all(is_row_major(t) for t in (x, weight, bias or weight)):
            continue
        if bias is not None and bias.shape != columns:
            continue
        default = 2.0**-23 if kind == "rms" else 1e-5  # of the dtype that torch computes in, float32 for narrower ones
        yield Norm(x, weight, bias, default if given is None else float(given))


def sums(walk: Walk, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Two tensors that ``tensor`` may be the sum of, without broadcasting or scaling, and the sum as it was written.

    All three are row-major and have the shape and dtype of ``tensor``.
    """
    for found in walk.find(call("add", any_tensor("a"), any_tensor("b")), tensor):
        one, other = (reshaped(found[name], tensor.shape) for name in ("a", "b"))
        total = walk.graph.tensor[tensor.buffer]
        if one is None or other is None or {t.dtype for t in (one, other, total)} != {tensor.dtype}:
            continue
        is_whole = total.shape == tensor.shape and walk.writer(total) == walk.writer(tensor)  # not written in place
        if is_whole and all(is_row_major(t) for t in (one, other, total)):
            yield one, other, total
