"""Triton's interpreter, its casts from and to bfloat16 corrected.

The interpreter computes with bfloat16's bit patterns as if they were integers (Triton's issues 11584, 11585 and
10945: not supported), truncates where a GPU rounds to nearest even, and flushes subnormal numbers to zero when it
widens. Kernels avoid the first by casting to float32 right after each load; this module corrects the casts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

__all__ = ["correct_bfloat16_casts"]


def _to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bits of float32 ``values`` rounded to bfloat16: add half a unit in the last place, a tie's odd bit, truncate."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def correct_bfloat16_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make casts between float32 and bfloat16 those of a GPU, until ``monkeypatch`` is undone."""
    stock = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return stock(self, source, to)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
