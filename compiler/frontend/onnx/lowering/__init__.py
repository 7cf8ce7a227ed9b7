"""The lowerings: for each ONNX operator, how it is said in ATen.

Each module here holds one kind of operator and a ``TABLE`` from the operator's name (``domain::name`` outside the
standard domain) to a function of a ``Node``. The same function records ATen operators when tracing and computes
constants when folding.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..node import Lowering
from . import (
    activation,
    convolution,
    elementwise,
    indexing,
    layout,
    linear,
    quantization,
    recurrent,
    reduction,
    resize,
    sampling,
)

__all__ = ["LOWERINGS"]

LOWERINGS: Mapping[str, Lowering] = {
    **activation.TABLE,
    **elementwise.TABLE,
    **indexing.TABLE,
    **layout.TABLE,
    **convolution.TABLE,
    **reduction.TABLE,
    **linear.TABLE,
    **quantization.TABLE,
    **recurrent.TABLE,
    **resize.TABLE,
    **sampling.TABLE,
}
