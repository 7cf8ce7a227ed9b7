"""Finds RMS normalisations in a graph, whole or decomposed; shared by the match rules of kernels that contain one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..compiler.graph import Op
from ..compiler.runtime.calls import InputRef, parse_call
from ._match import Walk, operands

__all__ = ["RmsNorm", "rms_norms"]

_WHOLE = ("aten.rms_norm.default", "aten._fused_rms_norm.default")
_CASTS = ("aten.to.dtype", "aten._to_copy.default")
#: Without an epsilon, torch takes that of the dtype it computes in, which is float32 for all narrower ones too.
_DEFAULT_EPSILON = 2.0**-23


class RmsNorm(NamedTuple):
    """``out = source * rsqrt(mean(source ** 2) + epsilon) * weight``: its operators and what they read and write."""

    ops: tuple[Op, ...]
    weight: str
    epsilon: float
    out: str


def rms_norms(walk: Walk, source: str) -> Iterator[RmsNorm]:
    """Normalisations of ``source`` over its last dimension, with a weight, computed in float32.

    They are one of ``aten.rms_norm`` and ``aten._fused_rms_norm``, or what they decompose to: power, mean, addition of
    epsilon, rsqrt, two products, with a cast to float32 before and a cast back before or after the weight where the
    dtype is narrower. Shapes and dtypes of weight and result are the caller's to check.
    """
    yield from _whole(walk, source)
    for cast in (None, *walk.readers(source, *_CASTS)):
        wide = source if cast is None else cast.outputs[0]
        if walk.graph.tensor[wide].dtype != "float32" or (cast and _literals(cast, source) is None):
            continue
        for square in walk.readers(wide, "aten.pow.Tensor_Scalar"):
            norm = _from_square(walk, source, wide, square)
            if norm is not None:
                yield norm if cast is None else norm._replace(ops=(cast, *norm.ops))


def _whole(walk: Walk, source: str) -> Iterator[RmsNorm]:
    columns = walk.graph.tensor[source].shape[-1]
    for op in walk.readers(source, *_WHOLE):
        literals = _literals(op, source)
        match (*(literals or ()), *(value for _, value in parse_call(op.body).keywords)):
            case ([int() as extent], InputRef(weight), *rest) if extent == columns and len(rest) < 2:
                epsilon = _DEFAULT_EPSILON if not rest or rest[0] is None else float(rest[0])
                yield RmsNorm((op,), op.inputs[weight], epsilon, op.outputs[0])


def _from_square(walk: Walk, source: str, wide: str, square: Op) -> RmsNorm | None:
    """The decomposed normalisation that begins with ``square``; ``wide`` is ``source`` in float32."""
    mean = walk.sole_reader(square, "aten.mean.dim")
    shifted = walk.sole_reader(mean, "aten.add.Tensor", "aten.add.Scalar")
    root = walk.sole_reader(shifted, "aten.rsqrt.default")
    scaled = walk.sole_reader(root, "aten.mul.Tensor")
    narrow = walk.sole_reader(scaled, *_CASTS)
    weighted = walk.sole_reader(narrow or scaled, "aten.mul.Tensor")
    if mean is None or shifted is None or root is None or scaled is None or weighted is None:
        return None
    last = len(walk.graph.tensor[wide].shape) - 1
    shift = _literals(shifted, mean.outputs[0])
    computes_it = (
        _literals(square, wide) == (2,)
        and _literals(mean, square.outputs[0]) in (([-1], True), ([last], True))
        and shift is not None
        and len(shift) == 1
        and type(shift[0]) in (int, float)
        and _literals(root, shifted.outputs[0]) == ()
        and _other_factor(scaled, root.outputs[0]) == wide
        and (narrow is None or _narrows(walk, narrow, scaled.outputs[0], source))
    )
    weight = _other_factor(weighted, (narrow or scaled).outputs[0])
    if not computes_it or shift is None or weight is None:
        return None
    is_wide = walk.graph.tensor[weighted.outputs[0]].dtype != walk.graph.tensor[source].dtype
    back = walk.sole_reader(weighted, *_CASTS) if is_wide else None
    ops = tuple(op for op in (square, mean, shifted, root, scaled, narrow, weighted, back) if op is not None)
    return RmsNorm(ops, weight, float(shift[0]), ops[-1].outputs[0])


def _narrows(walk: Walk, cast: Op, operand: str, source: str) -> bool:
    """Whether a cast takes ``operand`` back to the dtype of ``source``: to any other it would lose digits."""
    dtypes = {walk.graph.tensor[name].dtype for name in (cast.outputs[0], source)}
    return len(dtypes) == 1 and _literals(cast, operand) is not None


def _literals(op: Op, source: str) -> tuple[Any, ...] | None:
    """The arguments behind the first, if the first is ``source`` and the call has no keyword that changes values."""
    call = parse_call(op.body)
    match call.arguments:
        case (InputRef(index), *rest) if op.inputs[index] == source:
            plain = op.target in (*_CASTS, *_WHOLE) or not call.keywords
            return tuple(rest) if plain else None
    return None


def _other_factor(op: Op, factor: str) -> str | None:
    """What a product multiplies ``factor`` with."""
    match operands(op):
        case (left, right) if factor in (left, right):
            return left if right == factor else right
    return None
