"""What ``kernels/add_rms_norm.py`` has to compute, under the interpreter and on a GPU alike."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from opweave.kernels.add_rms_norm import launch
from tests.kernels.guard import Guarded

__all__ = ["SHAPES", "TOLERANCE", "check", "operands"]

#: Relative and absolute: a few float32 roundings; for narrower dtypes those can tip one rounding to the neighbour.
TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = MappingProxyType(
    {torch.float32: (2e-6, 1e-6), torch.float16: (2.0**-10, 2.0**-24), torch.bfloat16: (2.0**-7, 2.0**-40)}
)

#: Leading dimensions and columns: one element, primes, full blocks, one less and more, a row walked in several blocks.
SHAPES = ((1,), (7, 1), (1, 31), (5, 257), (2, 3, 256), (4, 1021), (2, 1025), (3, 4096), (1, 16384), (2, 16411))


def operands(
    *shape: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ``x``, ``residual`` and ``weight``, the same for the same arguments."""
    generator = torch.Generator().manual_seed(7 * shape[-1] + len(shape))
    x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return x, residual, (1 + torch.randn(shape[-1:], generator=generator) / 8).to(device, weight_dtype)


def check(*shape: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str, epsilon: float = 1e-5) -> None:
    """Launch once; compare with float64, look at the sentinels and at the inputs."""
    inputs = operands(*shape, dtype=dtype, weight_dtype=weight_dtype, device=device)
    copies = [tensor.clone() for tensor in inputs]
    hidden, out = (Guarded(*shape, dtype=dtype, device=device) for _ in range(2))
    launch(*inputs, epsilon, hidden=hidden.tensor, out=out.tensor)
    x, residual, weight = copies
    assert torch.equal(hidden.tensor, x + residual)
    wide = (x + residual).double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.double()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out.tensor.double(), expected, rtol=rtol, atol=atol)
    assert hidden.is_intact()
    assert out.is_intact()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
