"""libdevice under Triton's interpreter: NVIDIA's own table of types, torch's functions.

Triton's functions check the types of their operands and name a symbol such as ``__nv_tanhf``; here the symbol is
looked up below. A dtype that libdevice does not have is refused as it is on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice as generic
from triton.language.extra.cuda import libdevice as nvidia
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ._patch import Patch

__all__ = ["correct_libdevice"]

Tensor: TypeAlias = torch.Tensor
Function: TypeAlias = Callable[..., Tensor]

#: Functions that torch has by the same name.
_SAME = (
    "abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc erfinv exp exp2 expm1 floor fmod hypot "
    "isinf isnan ldexp lgamma log log10 log1p log2 nextafter pow rsqrt signbit sin sinh sqrt tan tanh trunc"
)
_FAST = ("sin", "cos", "tan", "log", "log2", "log10", "exp", "tanh", "pow")


def _fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x.double() * y.double() + z.double()).to(x.dtype)


def _half_away_from_zero(x: Tensor) -> Tensor:
    whole = x.trunc()
    return torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)


_OTHERS: Mapping[str, Function] = MappingProxyType(
    {
        "fabs": torch.abs,
        "llabs": torch.abs,
        "rint": torch.round,
        "nearbyint": torch.round,
        "llrint": torch.round,
        "round": _half_away_from_zero,
        "llround": _half_away_from_zero,
        "finite": torch.isfinite,
        "isfinite": torch.isfinite,
        "powi": torch.pow,
        "fma": _fused,
        "fmaf_rn": _fused,
        "fma_rn": _fused,
        "fdim": lambda x, y: (x - y).clamp_min(0),
        "ilogb": lambda x: torch.frexp(x).exponent - 1,
        "logb": lambda x: torch.frexp(x).exponent - 1,
        "scalbn": torch.ldexp,
        "exp10": lambda x: torch.pow(10.0, x),
        "rhypot": lambda x, y: torch.hypot(x, y).reciprocal(),
        "cbrt": lambda x: torch.copysign(x.abs().double().pow(1 / 3), x),
        "tgamma": lambda x: torch.lgamma(x.double()).exp(),
        "j0": torch.special.bessel_j0,
        "j1": torch.special.bessel_j1,
        "y0": torch.special.bessel_y0,
        "y1": torch.special.bessel_y1,
        "cyl_bessel_i0": torch.special.i0,
        "cyl_bessel_i1": torch.special.i1,
        "erfcx": torch.special.erfcx,
        "normcdf": torch.special.ndtr,
        "normcdfinv": torch.special.ndtri,
        **{f"fast_{name}": getattr(torch, name) for name in _FAST},
        **{f"{kind}add_rn": torch.add for kind in "fd"},
        **{f"{kind}sub_rn": torch.sub for kind in "fd"},
        **{f"{kind}mul_rn": torch.mul for kind in "fd"},
        **{f"{kind}div_rn": torch.div for kind in "fd"},
        **{f"{kind}rcp_rn": torch.reciprocal for kind in "fd"},
        **{f"{kind}sqrt_rn": torch.sqrt for kind in "fd"},
        "fast_fdivide": torch.div,
        "frsqrt_rn": torch.rsqrt,
    }
)
_FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {**{name: getattr(torch, name) for name in _SAME.split()}, **_OTHERS}
)


def correct_libdevice(patch: Patch) -> None:
    """Make ``libdevice.*`` usable under the interpreter until ``patch`` is undone."""
    for name, function in vars(nvidia).copy().items():
        if tl.core.is_builtin(function):
            for module in (generic, nvidia):
                patch.setattr(module, name, _called(function), False)
    patch.setattr(InterpreterBuilder, "create_extern_elementwise", _elementwise)
    patch.setattr(InterpreterBuilder, "create_erf", lambda self, x: _apply(torch.erf, [x], x.dtype.scalar))


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a kernel calls it: without Triton's own argument."""

    def call(*operands: Any, _semantic: Any = None) -> Any:
        return function(*operands, _semantic=interpreter.interpreter_semantic)

    return call


def _elementwise(
    self: Any, library: str, path: str, symbol: str, operands: list[Any], result: Any, is_pure: bool
) -> Any:
    name = symbol.removeprefix("__nv_")
    function = _FUNCTIONS.get(name) or _FUNCTIONS.get(name[:-1] if name[-1] in "fd" else name)
    if function is None:
        raise NotImplementedError(f"libdevice function {symbol} under the interpreter; add it to {__name__}")
    return _apply(function, operands, result.scalar)


def _apply(function: Function, operands: list[Any], to: Any) -> Any:
    values = function(*(torch.from_numpy(np.array(operand.data)) for operand in operands))
    return TensorHandle(values.numpy().astype(interpreter._get_np_dtype(to)), to)
