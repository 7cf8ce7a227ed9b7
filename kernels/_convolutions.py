"""Finds convolutions in a graph, with a normalisation of inference or a scale and shift, and an activation behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..compiler.graph import Tensor
from ._match import Found, Walk, any_tensor, call, either, is_row_major, literal, number, reshaped
from ._patterns import activations

__all__ = ["Convolution", "convolutions"]

_X, _WEIGHT = any_tensor("x"), any_tensor("weight")
_PADDED = (literal("stride"), literal("padding"), literal("dilation"))
_DEFAULTS: Mapping[str, Any] = MappingProxyType({"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1})
_BIAS = either(any_tensor("bias"), literal("no_bias"))
_CONV = either(
    call("conv2d", _X, _WEIGHT),  # what is left out at the end is as in `_DEFAULTS`
    *(call("conv2d", _X, _WEIGHT, _BIAS, *_PADDED[:given]) for given in range(4)),
    call("conv2d", _X, _WEIGHT, _BIAS, *_PADDED, number("groups")),
    call("convolution", _X, _WEIGHT, _BIAS, *_PADDED, False, [0, 0], number("groups")),
)
_GAMMA, _BETA, _MEAN, _VARIANCE = (any_tensor(name) for name in ("gamma", "beta", "mean", "variance"))
_VECTORS = (either(_GAMMA, literal("no_gamma")), either(_BETA, literal("no_beta")), _MEAN, _VARIANCE)
_EPSILON = number("epsilon")
#: Normalisations as one call, which takes vectors; and spelled out, where they are spread over pixels.
_WHOLE = either(
    call("batch_norm", _CONV, *_VECTORS, False, literal("momentum"), _EPSILON, literal("cudnn")),
    call("_native_batch_norm_legit_no_training", _CONV, *_VECTORS, literal("momentum"), _EPSILON),
)
_SHIFTED = call("add", _VARIANCE, _EPSILON)
_ROOT = either(call("mul", call("reciprocal", call("sqrt", _SHIFTED)), 1), call("rsqrt", _SHIFTED))
_NORMALISED = call("mul", call("sub", _CONV, _MEAN), any_tensor("root"))
_SPREAD = either(
    call("add", call("mul", _NORMALISED, _GAMMA), _BETA),
    _NORMALISED,
    call("add", call("mul", _CONV, _GAMMA), _BETA),
    call("mul", _CONV, _GAMMA),
    call("add", _CONV, _BETA),
)


@dataclass(frozen=True)
class Convolution:
    """``activation((conv(x, weight) + bias - mean) / sqrt(variance + epsilon) * gamma + beta)`` of two dimensions.

    ``vectors`` are bias, mean, variance, gamma and beta, each ``[channels]`` of the result and row-major, or None for
    one that adds nothing and scales by one. Steps are the same in both directions.
    """

    x: Tensor
    weight: Tensor
    vectors: Mapping[str, Tensor | None]
    stride: int
    padding: int
    dilation: int
    groups: int
    epsilon: float
    activation: str


def convolutions(walk: Walk, out: Tensor) -> Iterator[Convolution]:
    """Those that ``out`` may be the result of; layouts and dtypes of ``x`` and ``weight`` are the caller's to check."""
    for activation, inner in (("none", out), *activations(walk, out)):
        for found, spread in _normalised(walk, inner, out.dtype):
            vectors = _vectors(found, found["weight"].shape[0], spread=spread)
            given = {**_DEFAULTS, **found.literals}
            steps = [given[name] for name in ("stride", "padding", "dilation")]
            if vectors is None or inner.shape != out.shape or not all(_is_square(step) for step in steps):
                continue
            stride, padding, dilation = (step[0] for step in steps)
            groups, epsilon = int(given["groups"]), float(found.literals.get("epsilon", 0.0))
            x, weight = found["x"], found["weight"]
            yield Convolution(x, weight, vectors, stride, padding, dilation, groups, epsilon, activation)


def _normalised(walk: Walk, tensor: Tensor, result: str) -> Iterator[tuple[Found, bool]]:
    """Convolutions whose normalised result is ``tensor``; and whether vectors are spread over pixels there."""
    for pattern in (_WHOLE, _CONV):
        yield from ((found, False) for found in walk.find(pattern, tensor, result=result))
    for found in walk.find(_SPREAD, tensor, result=result):
        root = found.tensors.get("root")
        if root is None:
            yield found, True
        elif _is_spread(root, found["weight"].shape[0]):
            yield from ((whole, True) for whole in walk.find(_ROOT, root, found, result=result))


def _vectors(found: Found, channels: int, *, spread: bool) -> dict[str, Tensor | None] | None:
    vectors: dict[str, Tensor | None] = {}
    for name in ("bias", "mean", "variance", "gamma", "beta"):
        given = found.tensors.get(name)
        vector = vectors[name] = None if given is None else reshaped(given, (channels,))
        if found.literals.get(f"no_{name}") is not None or (given is not None and vector is None):
            return None
        if vector is not None and not is_row_major(vector):
            return None
        if given is not None and spread and name in ("mean", "gamma", "beta") and not _is_spread(given, channels):
            return None
    return vectors


def _is_spread(vector: Tensor, channels: int) -> bool:
    """Whether the vector has one element for each channel of images."""
    return vector.shape in ((channels, 1, 1), (1, channels, 1, 1))


def _is_square(step: object) -> bool:
    return isinstance(step, list) and len({*step}) == 1 and type(step[0]) is int
