"""The correction of Triton's interpreter, bit for bit against torch; `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreter import correct_bfloat16_casts


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def cast_kernel(source: tl.tensor, target: tl.tensor, block: tl.constexpr) -> None:
    """Copy one block, cast to the target's dtype."""
    lane = tl.arange(0, block)
    tl.store(target + lane, tl.load(source + lane).to(target.dtype.element_ty))


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``source.to(dtype)`` by Triton."""
    target = torch.empty_like(source, dtype=dtype)
    cast_kernel[(1,)](source, target, block=source.numel())
    return target


def samples() -> torch.Tensor:
    """Every upper half of a float32 with lower halves around a tie, and random ones."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    random = torch.randint(0, 1 << 16, (1 << 16,), generator=torch.Generator().manual_seed(0))
    halves = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    bits = torch.stack([*(upper + half for half in halves), upper + random, upper]).flatten()
    return bits.to(torch.uint32).view(torch.float32)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two bfloat16 tensors have the same bits, any NaN for any other."""
    equal = left.view(torch.int16) == right.view(torch.int16)
    return bool((equal | (left.isnan() & right.isnan())).all())


def test_rounding_to_bfloat16_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    correct_bfloat16_casts(monkeypatch)
    values = samples()
    assert same(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_widening_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    correct_bfloat16_casts(monkeypatch)
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    widened = cast(values, torch.float32)
    numbers = ~values.isnan()
    assert torch.equal(widened[numbers].view(torch.int32), values.float()[numbers].view(torch.int32))
    assert bool(widened[~numbers].isnan().all())
