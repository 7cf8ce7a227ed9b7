"""Finds gradients of normalisations in a graph: one call of ATen's, or what it decomposes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..compiler.graph import Graph, Tensor
from ._checks import FLOATS, dtype_name
from ._match import Cost, Found, Match, Pattern, Walk, any_tensor, call, either, is_row_major, literal, number, reshaped

__all__ = ["NormGradients", "gradient_matches", "norm_gradients"]

_HIDDEN, _OUT_GRADIENT, _WEIGHT = any_tensor("hidden"), any_tensor("out_gradient"), any_tensor("weight")
_DIMS, _EPSILON, _COUNT = literal("dims"), number("epsilon"), number("count")
_WEIGHTED = call("mul", _OUT_GRADIENT, _WEIGHT)


def _sum(value: Pattern) -> Pattern:
    return call("sum", value, literal("sums"), True)


def _over_rows(value: Pattern) -> Pattern:
    return either(call("sum", value, literal("rows")), call("sum", value, literal("rows"), False))


_RMS_SCALE = call(
    "rsqrt",
    call("add", call("mean", either(call("pow", _HIDDEN, 2), call("mul", _HIDDEN, _HIDDEN)), _DIMS, True), _EPSILON),
)
_RMS = call("mul", _HIDDEN, _RMS_SCALE)
_RMS_PRODUCT = call("mul", _WEIGHTED, _RMS)
_RMS_PULL = either(
    call("mul", _RMS, call("mean", _RMS_PRODUCT, literal("means"), True)),
    call("mul", call("div", _RMS, _COUNT), _sum(_RMS_PRODUCT)),
)
_RMS_GRADIENT = call("mul", _RMS_SCALE, call("sub", _WEIGHTED, _RMS_PULL))

_MOMENTS = {"correction": 0, "keepdim": True}
_LAYER_SCALE = call("rsqrt", call("add", call("var_mean", _HIDDEN, _DIMS, **_MOMENTS), _EPSILON))
_LAYER = call("mul", call("sub", _HIDDEN, call("var_mean", _HIDDEN, _DIMS, result=1, **_MOMENTS)), _LAYER_SCALE)
_LAYER_PULL = call("mul", _LAYER, _sum(call("mul", _WEIGHTED, _LAYER)))
_LAYER_GRADIENT = call(
    "mul",
    call("div", _LAYER_SCALE, _COUNT),
    call("sub", call("sub", call("mul", _WEIGHTED, _COUNT), _sum(_WEIGHTED)), _LAYER_PULL),
)


def _statistic(place: int) -> Pattern:
    """Mean (1) or reciprocal standard deviation (2) of ATen's own forward pass."""
    return call(
        "native_layer_norm", _HIDDEN, literal("shape"), any_tensor("w"), any_tensor("b"), _EPSILON, result=place
    )


def _whole(place: int) -> Pattern:
    """A result of ATen's own backward pass."""
    operands = (_OUT_GRADIENT, _HIDDEN, literal("shape"), _statistic(1), _statistic(2), _WEIGHT, any_tensor("bias"))
    return call("native_layer_norm_backward", *operands, [True, True, True], result=place)


#: By kind: the gradient of what is normalised, then those of the weight and, if there is one, of the bias.
_GRADIENTS: Mapping[str, tuple[tuple[Pattern, ...], ...]] = MappingProxyType(
    {
        "rms": ((_RMS_GRADIENT, _over_rows(call("mul", _OUT_GRADIENT, _RMS))),),
        "layer": (
            (_LAYER_GRADIENT, _over_rows(call("mul", _OUT_GRADIENT, _LAYER)), _over_rows(_OUT_GRADIENT)),
            (_whole(0), _whole(1), _whole(2)),
        ),
    }
)


@dataclass(frozen=True)
class NormGradients:
    """A launcher's operands, all of one dtype, by name, and the tensors that it writes."""

    operands: Mapping[str, Tensor | None]
    epsilon: float
    outputs: tuple[Tensor, ...]


def norm_gradients(walk: Walk, kind: str) -> Iterator[NormGradients]:
    """Gradients of ``"rms"`` or ``"layer"`` normalisations, with and without another that is added to that of ``x``."""
    for pattern, *others in _GRADIENTS[kind]:
        added = call("add", pattern, any_tensor("hidden_gradient"))
        for tensor in walk.results(
            "mul", "add", "native_layer_norm_backward", "_to_copy", "to", "convert_element_type"
        ):
            if tensor.name != tensor.buffer or not tensor.shape or tensor.dtype not in map(dtype_name, FLOATS):
                continue
            for found in (found for option in (added, pattern) for found in walk.find(option, tensor)):
                operands = _operands(found, tensor)
                vectors = [_vector(walk, other, found, tensor) for other in others if operands is not None]
                if operands is not None and all(vectors):
                    outputs = (tensor, *(vector for vector in vectors if vector is not None))
                    yield NormGradients(operands, float(found.literals["epsilon"]), outputs)


def _operands(found: Found, tensor: Tensor) -> dict[str, Tensor | None] | None:
    """The launcher's, in the shape of ``tensor``; ``None`` if it cannot take them, or literals say something else."""
    literals, columns = found.literals, tensor.shape[-1]
    last = len(found["hidden"].shape) - 1
    dims = (literals.get("dims", [-1]), literals.get("sums", [-1]), literals.get("means", [-1]))
    if any(given not in ([-1], [last]) for given in dims) or found["hidden"].shape[-1:] != (columns,):
        return None
    if literals.get("count", columns) != columns or literals.get("shape", [columns]) != [columns]:
        return None
    operands = {
        name: reshaped(found[name], tensor.shape) if name in found.tensors else None
        for name in ("out_gradient", "hidden_gradient", "hidden")
    }
    operands["weight"] = found["weight"]
    given = [value for name, value in operands.items() if value is not None or name != "hidden_gradient"]
    if found["weight"].shape != (columns,) or any(
        value is None or value.dtype != tensor.dtype or not is_row_major(value) for value in given
    ):
        return None
    wanted = "hidden_gradient" in found.tensors
    return operands if wanted == (operands["hidden_gradient"] is not None) else None


def _vector(walk: Walk, pattern: Pattern, found: Found, tensor: Tensor) -> Tensor | None:
    """The weight's or the bias's gradient that belongs to what is ``found``."""
    wanted = (tensor.shape[-1:], tensor.dtype)
    for op in walk.graph.ops:
        for name in op.outputs:
            vector = walk.graph.tensor[name]
            if (vector.shape, vector.dtype) != wanted or vector.name != vector.buffer:
                continue
            for whole in walk.find(pattern, vector, found):
                rows = whole.literals.get("rows", [0])
                if sorted(row % (len(rows) + 1) for row in rows) == [*range(len(rows))]:
                    return vector
    return None


def gradient_matches(graph: Graph, kernel: str, kind: str, cost: Callable[..., Cost]) -> tuple[Match, ...]:
    """Launches of ``kernel`` for the `norm_gradients` of a graph, but for those of a part of what another replaces.

    ``cost`` is the kernel's.
    """
    walk = Walk(graph)
    found = []
    for gradients in norm_gradients(walk, kind):
        operands, tensor = gradients.operands, gradients.outputs[0]
        is_added = operands["hidden_gradient"] is not None
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        launch_cost = cost(tensor.dtype, rows, columns, hidden_gradient=is_added)
        match = walk.match(kernel, {**operands, "epsilon": gradients.epsilon}, gradients.outputs, launch_cost)
        if match is not None:
            found.append(match)
    return tuple(one for one in found if not any(set(one.ops) < set(other.ops) for other in found))
