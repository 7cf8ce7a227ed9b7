"""Finds dynamic quantisations in a graph: each row is scaled so that its largest element is the largest in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..compiler.graph import Tensor
from ._match import Pattern, Walk, any_tensor, call, either, literal, number

__all__ = ["quantisations"]

_Y, _LIMIT, _LEAST = any_tensor("y"), number("limit"), number("least")
_LARGEST = call("amax", call("abs", _Y), literal("dims"), True)


def _at_least(value: Pattern, least: Pattern) -> Pattern:
    return either(call("clamp", value, least), call("clamp", value, min=least), call("clamp_min", value, least))


_SCALE = call("div", _LARGEST, _LIMIT)
_SCALES = either(_SCALE, _at_least(_SCALE, _LEAST), call("div", _at_least(_LARGEST, number("least_largest")), _LIMIT))
_GIVEN = any_tensor("scale")
_IS_ZERO = call("eq", _GIVEN, 0)
_NOT_ZERO = either(
    *(
        call("where", _IS_ZERO, one, _GIVEN)
        for one in (1, call("scalar_tensor", 1, layout=torch.strided), call("full", [], 1))
    )
)


def _bounded(value: Pattern) -> Pattern:
    low, high = number("low"), number("high")
    return either(call("clamp", value, low, high), call("clamp_max", call("clamp_min", value, low), high))


def quantisations(walk: Walk, out: Tensor, limit: float) -> Iterator[tuple[Tensor, Tensor, float]]:
    """What ``out`` may be the quantisation of, the scales, and below which no scale falls."""
    made = walk.writer(out)
    source = walk.arguments(made[0])[0][0] if made is not None else None
    if not isinstance(source, Tensor) or source.dtype != "float32":
        return
    for divisor in (_NOT_ZERO, _GIVEN):
        quotient = call("div", _Y, divisor)
        rounded = either(call("round", _bounded(quotient)), _bounded(call("round", quotient)))
        for outer in walk.find(rounded if out.dtype == "int8" else _bounded(quotient), source):
            for found in walk.find(_SCALES, outer["scale"], outer):
                literals = found.literals
                least = literals.get("least", literals.get("least_largest", 0.0) / limit)
                lowest = (-limit, -limit - 1) if out.dtype == "int8" else (-limit,)  # nothing comes below -limit
                if literals["limit"] != limit or literals["high"] != limit or literals["low"] not in lowest:
                    continue
                if literals["dims"] not in ([-1], [len(found["y"].shape) - 1]) or least < 0:
                    continue
                if divisor is _NOT_ZERO or least > 0:  # else rows of zeros are divided by zero
                    yield found["y"], found["scale"], float(least)
