"""Reductions and scans of Triton's interpreter, by halves instead of element by element.

Each step applies the kernel's own combine function to whole blocks, so that one reduction takes log2(n) calls
and every step rounds to the dtype it is done in, as on a GPU. Neighbours are combined in order: a combine function
has to be associative, not commutative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from triton.runtime.interpreter import ReduceOps, ScanOps

from ._patch import Patch

__all__ = ["correct_reductions"]

Array: TypeAlias = np.ndarray[Any, Any]


def correct_reductions(patch: Patch) -> None:
    """Replace ``tl.reduce`` and ``tl.associative_scan`` under the interpreter until ``patch`` is undone."""
    patch.setattr(ReduceOps, "apply_impl", _reduce)
    patch.setattr(ScanOps, "apply_impl", _scan)


def _combined(operation: Any, left: Sequence[Array], right: Sequence[Array], dtypes: Sequence[Any]) -> list[Array]:
    """The combine function on every element of two equally long lists of blocks."""
    operands = [operation.to_tensor(data, dtype) for side in (left, right) for data, dtype in zip(side, dtypes)]  # noqa: B905
    result = operation.combine_fn(*operands)
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [
        np.broadcast_to(of.handle.data, data.shape).astype(data.dtype) for of, data in zip(results, left, strict=True)
    ]


def _reduce(self: Any, operands: Sequence[Any]) -> list[Any]:
    dtypes = [operand.dtype for operand in operands]
    blocks = [operand.handle.data for operand in operands]
    rank, axis = blocks[0].ndim, self.axis
    blocks = [block.reshape(-1) if axis is None else np.moveaxis(block, axis, 0) for block in blocks]
    while len(blocks[0]) > 1:
        even, odd = ([block[start::2] for block in blocks] for start in (0, 1))
        blocks = _combined(self, even, odd, dtypes)
    results: list[Any] = [block[0] for block in blocks]
    if self.keep_dims:
        results = [
            np.reshape(result, (1,) * rank) if axis is None else np.expand_dims(result, axis) for result in results
        ]
    return [self.to_tensor(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]


def _scan(self: Any, operands: Sequence[Any]) -> list[Any]:
    dtypes = [operand.dtype for operand in operands]
    blocks = [np.moveaxis(operand.handle.data, self.axis, 0) for operand in operands]
    if self.reverse:
        blocks = [block[::-1] for block in blocks]
    distance = 1
    while distance < len(blocks[0]):
        # The first ones have nobody that far before them: what is combined for them is thrown away.
        before = [np.concatenate([block[:distance], block[:-distance]]) for block in blocks]
        combined = _combined(self, before, blocks, dtypes)
        blocks = [
            np.concatenate([block[:distance], done[distance:]]) for block, done in zip(blocks, combined, strict=True)
        ]
        distance *= 2
    if self.reverse:
        blocks = [block[::-1] for block in blocks]
    return [
        self.to_tensor(np.moveaxis(block, 0, self.axis), dtype) for block, dtype in zip(blocks, dtypes, strict=True)
    ]
