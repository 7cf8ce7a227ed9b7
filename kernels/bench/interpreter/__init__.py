"""Triton's interpreter, corrected to compute what a GPU computes.

As it comes (triton 3.6 to 3.9) it computes with bfloat16's bit patterns as if they were integers (Triton's issues
11584, 11585 and 10945: not supported), truncates where a GPU rounds to nearest even, flushes bfloat16's subnormal
numbers to zero, propagates NaN where ``tl.maximum`` must not, rounds between the steps of ``tl.fma``, takes ``and``
and ``or`` of blocks for Python's, knows no libdevice function, no ``@triton.autotune`` and no atomic addition in
bfloat16, and reduces element by element in Python.

TRITON_INTERPRET must be 1 before Triton is imported. What stays different from a GPU: tensor cores round float32
operands to tf32 unless told not to, divisions and elementary functions are exact to the last place or two, and
programs of one launch run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ._libdevice import correct_libdevice
from ._patch import Patch, patching
from ._reductions import correct_reductions
from ._syntax import correct_syntax

__all__ = ["Patch", "correct", "corrected"]

Array: TypeAlias = np.ndarray[Any, Any]

_BFLOAT16, _BITS = np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint16)

#: Kept as bytes, as Triton does; conversions go through these.
_FLOAT8: dict[Any, np.dtype[Any]] = {
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
}
_LARGEST = {tl.float8e5: 57344.0, tl.float8e4nv: 448.0}
_FLOATS = frozenset({tl.bfloat16, tl.float16, tl.float32, tl.float64, *_FLOAT8})


@contextmanager
def corrected() -> Iterator[None]:
    """Within, the interpreter computes what a GPU computes."""
    with patching() as patch:
        correct(patch)
        yield


def correct(patch: Patch) -> None:
    """Install all corrections until ``patch``, such as pytest's ``monkeypatch``, is undone."""
    _correct_storage(patch)
    _correct_casts(patch)
    _correct_arithmetic(patch)
    _correct_atomics(patch)
    _correct_launches(patch)
    correct_reductions(patch)
    correct_libdevice(patch)
    correct_syntax(patch)


def _correct_storage(patch: Patch) -> None:
    """Keep bfloat16 as numbers that numpy can compute with, each result rounded to nearest even."""
    stock = interpreter._get_np_dtype
    patch.setattr(interpreter, "_get_np_dtype", lambda kind: _BFLOAT16 if _scalar(kind) == tl.bfloat16 else stock(kind))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def get_bf16(self: Any, value: float) -> Any:
        return TensorHandle(np.array([value], _BFLOAT16), tl.bfloat16)

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *options)
        default = np.zeros(pointers.data.shape, np.uint16) if other is None else other.data.view(np.uint16)
        return TensorHandle(memory.load(pointers.data, mask.data, default, _BITS).view(_BFLOAT16), tl.bfloat16)

    def create_masked_store(self: Any, pointers: Any, values: Any, mask: Any, *options: Any) -> Any:
        if values.data.dtype != _BFLOAT16:
            return store(self, pointers, values, mask, *options)
        return memory.store(pointers.data, values.data.view(np.uint16), mask.data)

    patch.setattr(InterpreterBuilder, "get_bf16", get_bf16, False)
    patch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)


def _scalar(kind: Any) -> Any:
    """The element type of a block or scalar; a block of pointers is no block of what they point to."""
    return kind.element_ty if isinstance(kind, tl.block_type) else kind


def _correct_casts(patch: Patch) -> None:
    stock = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        """Numpy's conversions round to nearest even; those to float8 saturate as sm_90's do."""
        return TensorHandle(_rounded(_numbers(source), to.scalar), to.scalar)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if not {source.dtype.scalar, to.scalar} <= _FLOATS:
            return stock(self, source, to, rounding)
        if rounding == ir.ROUNDING_MODE.RTZ:
            if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
                raise NotImplementedError(f"rounding towards zero from {source.dtype.scalar} to {to.scalar}")
            return TensorHandle(_towards_zero(source.data), tl.bfloat16)
        return cast_impl(self, source, to)

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)


def _numbers(handle: Any) -> Array:
    """What the handle holds, as an array numpy can compute with."""
    values: Array = handle.data
    return values.view(_FLOAT8[handle.dtype.scalar]) if handle.dtype.scalar in _FLOAT8 else values


def _rounded(values: Array, to: Any) -> Array:
    """``values`` as Triton keeps the element type ``to``."""
    if to not in _FLOAT8:
        return values.astype(interpreter._get_np_dtype(to))
    largest = _LARGEST[to]
    wide = values.astype(np.float32)
    return np.clip(wide, -largest, largest).astype(_FLOAT8[to]).view(np.uint8)


def _towards_zero(values: Array) -> Array:
    """Float32 cut off to bfloat16; NaN stays NaN."""
    cut = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).view(_BFLOAT16)
    return np.where(np.isnan(values), np.array(np.nan, _BFLOAT16), cut)


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Any, Any, Any], Any]:
    return lambda self, left, right: self.binary_op(left, right, function)


def _correct_arithmetic(patch: Patch) -> None:
    patch.setattr(InterpreterBuilder, "create_minnumf", _binary(np.fmin))
    patch.setattr(InterpreterBuilder, "create_maxnumf", _binary(np.fmax))
    patch.setattr(InterpreterBuilder, "create_clampf", _clamp)
    patch.setattr(InterpreterBuilder, "create_fma", _fused_multiply_add)
    patch.setattr(InterpreterBuilder, "create_dot", _dot(InterpreterBuilder.create_dot))


def _clamp(self: Any, value: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
    clamped = np.fmin(np.fmax(value.data, low.data), high.data)
    if propagate_nans == ir.PROPAGATE_NAN.ALL:
        clamped = np.where(np.isnan(value.data), value.data, clamped)
    return TensorHandle(clamped, value.dtype.scalar)


def _fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding: float64 holds every product of narrower numbers, and the sum to twice their precision."""
    if x.data.dtype == np.float64:
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    x_wide, y_wide, z_wide = (operand.data.astype(np.float64) for operand in (x, y, z))
    return TensorHandle((x_wide * y_wide + z_wide).astype(z.data.dtype), z.dtype.scalar)


def _dot(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Products of narrow floats are summed in float32, as tensor cores do, and rounded once to the accumulator."""

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if not {a.dtype.scalar, b.dtype.scalar} <= _FLOATS - {tl.float64}:
            return stock(self, a, b, accumulator, *options)
        product = np.matmul(_numbers(a).astype(np.float32), _numbers(b).astype(np.float32))
        total = product + accumulator.data.astype(np.float32)
        return TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)

    return create_dot


def _correct_atomics(patch: Patch) -> None:
    stock = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, *order: Any) -> Any:
        if values.data.dtype != _BFLOAT16:
            return stock(self, operation, pointers, values, mask, *order)
        if operation != ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"atomic {operation} in bfloat16")
        return TensorHandle(_add_one_by_one(pointers.data, values.data, mask.data), tl.bfloat16)

    patch.setattr(InterpreterBuilder, "create_atomic_rmw", create_atomic_rmw)


def _add_one_by_one(pointers: Array, values: Array, mask: Array) -> Array:
    """Add in memory; several lanes may mean one address. Returns what was there before, zero where masked."""
    before = np.zeros(pointers.shape, _BFLOAT16)
    values = np.broadcast_to(values, pointers.shape)
    one, nothing = np.ones(1, bool), np.zeros(1, _BITS)
    for lane in map(tuple, np.argwhere(np.broadcast_to(mask, pointers.shape))):
        address = np.array([pointers[lane]])
        before[lane] = memory.load(address, one, nothing, _BITS).view(_BFLOAT16)[0]
        memory.store(address, np.array([before[lane] + values[lane]], _BFLOAT16).view(_BITS), one)
    return before


def _correct_launches(patch: Patch) -> None:
    """A GPU warns of no overflow; there is nothing to tune by, so the first configuration is taken."""
    launch, tuned = interpreter.GridExecutor.__call__, Autotuner.run

    def quiet(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with np.errstate(all="ignore"):
            return launch(self, *arguments, **keywords)

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        configurations, self.configs = self.configs, self.configs[:1]
        try:
            return tuned(self, *arguments, **keywords)
        finally:
            self.configs = configurations

    patch.setattr(interpreter.GridExecutor, "__call__", quiet)
    patch.setattr(Autotuner, "run", run)
