"""The corrected interpreter, bit for bit against torch; `test_interpreted.py` runs this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tests.support.interpreter import correct

Reference = Callable[..., torch.Tensor]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)


def every_bfloat16() -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BFLOAT16)


def around_ties() -> torch.Tensor:
    """Every upper half of a float32 with lower halves around a tie, and random ones."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    random = torch.randint(0, 1 << 16, (1 << 16,), generator=torch.Generator().manual_seed(0))
    halves = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    bits = torch.stack([*(upper + half for half in halves), upper + random, upper]).flatten()
    return bits.to(torch.uint32).view(FLOAT32)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype and bits, any NaN for any other."""
    if left.dtype != right.dtype or not left.is_floating_point():
        return left.dtype == right.dtype and torch.equal(left, right)
    number = ~right.float().isnan()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.itemsize]
    return torch.equal(left.float().isnan(), ~number) and torch.equal(left.view(kind)[number], right.view(kind)[number])


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def cast_kernel(source: Any, target: Any, rounding: tl.constexpr, block: tl.constexpr) -> None:
    """Copy one block, cast to the target's dtype."""
    lane = tl.arange(0, block)
    tl.store(target + lane, tl.load(source + lane).to(target.dtype.element_ty, fp_downcast_rounding=rounding))


def cast(source: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    """``source.to(dtype)`` by Triton."""
    target = torch.empty_like(source, dtype=dtype)
    cast_kernel[(1,)](source, target, rounding, block=source.numel())
    return target


@pytest.mark.parametrize("rounding", [None, "rtne"])
def test_rounding_to_bfloat16_is_that_of_torch(rounding: str | None) -> None:
    values = around_ties()
    assert same(cast(values, BFLOAT16, rounding), values.to(BFLOAT16))


def test_rounding_towards_zero_cuts_off() -> None:
    values = around_ties()
    values = values[~values.isnan()][: 1 << 18]
    cut = (values.view(torch.int32) >> 16).to(torch.int16).view(BFLOAT16)
    assert same(cast(values, BFLOAT16, "rtz"), cut)


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64, FLOAT16, BFLOAT16])
def test_casts_from_every_bfloat16(dtype: torch.dtype) -> None:
    assert same(cast(every_bfloat16(), dtype), every_bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, FLOAT16, torch.float64])
def test_casts_to_bfloat16(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(1 << 12, generator=generator, dtype=torch.float64) * 1000).to(dtype)
    assert same(cast(values, BFLOAT16), values.to(BFLOAT16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_to_and_from_float8(dtype: torch.dtype) -> None:
    """Rounded as by torch; what is too large becomes the largest number, as by sm_90's instruction."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert same(cast(every, FLOAT32), every.float())
    largest = torch.finfo(dtype).max
    values = torch.cat([torch.randn((1 << 12) - 4, generator=torch.Generator().manual_seed(2)) * 8, torch.empty(4)])
    values[-4:] = torch.tensor([largest * 2, -torch.inf, largest, 2.0**-20])
    for source in (values, values.to(BFLOAT16)):
        assert same(cast(source, dtype), source.float().clamp(-largest, largest).to(dtype))


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def binary_kernel(left: Any, right: Any, target: Any, function: tl.constexpr, block: tl.constexpr) -> None:
    """One binary function on a block."""
    lane = tl.arange(0, block)
    tl.store(target + lane, function(tl.load(left + lane), tl.load(right + lane)))


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def multiply_add(x: Any, y: Any) -> Any:
    """Two roundings, a scalar in between."""
    return (x * y + x) - 0.5


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def larger(x: Any, y: Any) -> Any:
    """The larger of two numbers, and the number where one is NaN."""
    return tl.maximum(x, y)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def larger_or_nan(x: Any, y: Any) -> Any:
    """NaN where one is NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def ordered(x: Any, y: Any) -> Any:
    """The smaller of the two by a comparison and a choice, its sign turned."""
    return -tl.where(x < y, x, y)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def clamped(x: Any, y: Any) -> Any:
    """NaN becomes the lower limit."""
    return tl.clamp(x, -0.25, 1.0) + tl.zeros_like(y)


BINARY: Mapping[str, tuple[Any, Reference]] = MappingProxyType(
    {
        "multiply, add": (multiply_add, lambda x, y: (x * y + x) - 0.5),
        "maximum": (larger, lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))),
        "maximum or NaN": (larger_or_nan, torch.maximum),
        "compare": (ordered, lambda x, y: -torch.where(x < y, x, y)),
    }
)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_rounds_as_torch_does(name: str, dtype: torch.dtype) -> None:
    """On random pairs of bit patterns, with NaN, infinities and subnormal numbers among them.

    Zeros are left out, as their sign is undefined in a maximum and Triton's ``-x`` is ``0 - x``.
    """
    function, reference = BINARY[name]
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randint(0, 1 << 16, (1 << 14,), generator=generator).to(torch.uint16) for _ in range(2))
    left, right = (bits.view(BFLOAT16).to(dtype) for bits in (left, right))
    left, right = (torch.where(values == 0, 1, values) for values in (left, right))
    target = torch.empty_like(left)
    binary_kernel[(1,)](left, right, target, function, block=left.numel())
    assert same(target, reference(left, right))


def test_clamp_sends_nan_to_the_lower_limit() -> None:
    x = torch.tensor([-1.0, 0.5, 3.0, torch.nan])
    target = torch.empty_like(x)
    binary_kernel[(1,)](x, x, target, clamped, block=4)
    assert target.tolist() == [-0.25, 0.5, 1.0, -0.25]


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def fused(x: Any, y: Any) -> Any:
    """The rounding error of x * y."""
    return tl.fma(x, y, -(x * y))


def test_fma_rounds_once() -> None:
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(4))
    target = torch.empty_like(x)
    binary_kernel[(1,)](x, y, target, fused, block=1024)
    error = x.double() * y.double() - (x * y).double()
    assert error.abs().max() > 0
    assert torch.equal(target.double(), error)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def dot_kernel(a: Any, b: Any, c: Any, kind: tl.constexpr, size: tl.constexpr) -> None:
    """One square tile, and c of it added."""
    lane = tl.arange(0, size)
    at = lane[:, None] * size + lane[None, :]
    total = tl.dot(tl.load(a + at), tl.load(b + at), tl.load(c + at).to(kind), out_dtype=kind)
    tl.store(c + at, total)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    """Small integers have exact products and sums, so that the order of summation does not show."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).float().to(dtype) for _ in range(2))
    c = torch.randn(32, 32, generator=generator).mul(64).round()
    expected = a.float() @ b.float() + c
    dot_kernel[(1,)](a, b, c, tl.float32, size=32)
    assert torch.equal(c, expected)


def test_dot_of_random_numbers_is_close() -> None:
    a, b, c = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(6))
    for dtype in (BFLOAT16, FLOAT16):
        x, y, z = a.to(dtype), b.to(dtype), c.clone()
        dot_kernel[(1,)](x, y, z, tl.float32, size=64)
        torch.testing.assert_close(z.double(), x.double() @ y.double() + c.double(), rtol=1e-5, atol=1e-5)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def atomic_kernel(target: Any, index: Any, values: Any, block: tl.constexpr) -> None:
    """Scatter with repeated indices, every fourth lane off."""
    lane = tl.arange(0, block)
    tl.atomic_add(target + tl.load(index + lane), tl.load(values + lane), mask=lane % 4 != 3)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
def test_atomic_addition_counts_every_lane(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    index = torch.randint(0, 8, (64,), generator=generator)
    values = torch.randint(-4, 5, (64,), generator=generator).to(dtype)
    target = torch.ones(8, dtype=dtype)
    atomic_kernel[(1,)](target, index, values, block=64)
    on = torch.arange(64) % 4 != 3
    assert torch.equal(target, torch.ones(8, dtype=dtype).index_add(0, index[on], values[on]))


@triton.autotune(configs=[triton.Config({"block": 4}), triton.Config({"block": 64})], key=["count"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def tuned_kernel(target: Any, count: Any, block: tl.constexpr) -> None:
    """Write the block size that was chosen."""
    lane = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + lane, block + tl.zeros_like(lane), mask=lane < count)


def test_the_first_configuration_is_taken_and_all_are_kept() -> None:
    target = torch.zeros(10, dtype=torch.int32)
    tuned_kernel[lambda meta: (triton.cdiv(10, meta["block"]),)](target, 10)
    assert target.tolist() == [4] * 10
    assert len(tuned_kernel.configs) == 2


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def unary_kernel(source: Any, target: Any, function: tl.constexpr, block: tl.constexpr) -> None:
    """One function on a block."""
    lane = tl.arange(0, block)
    tl.store(target + lane, function(tl.load(source + lane)))


LIBDEVICE = "tanh erf erfc exp exp2 expm1 log1p sqrt rsqrt sin cos tan asinh floor ceil trunc lgamma"


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64])
@pytest.mark.parametrize("name", LIBDEVICE.split())
def test_libdevice_is_torch_s(name: str, dtype: torch.dtype) -> None:
    source = torch.randn(256, generator=torch.Generator().manual_seed(8)).abs().to(dtype)
    target = torch.empty_like(source)
    unary_kernel[(1,)](source, target, getattr(libdevice, name), block=256)
    assert same(target, getattr(torch, name)(source))


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def powers(x: Any, y: Any) -> Any:
    """Mixed operands: block and block, block and number; a test gives an integer."""
    whole = tl.where(libdevice.isnan(x).to(tl.int1), 0.0, libdevice.rint(x))
    return libdevice.pow(libdevice.abs(x), y) + libdevice.fmod(whole, 3.0) + libdevice.llrint(y).to(tl.float32)


def test_libdevice_broadcasts_and_gives_integers() -> None:
    x, y = torch.randn(2, 256, generator=torch.Generator().manual_seed(9)) * 4
    target = torch.empty_like(x)
    binary_kernel[(1,)](x, y, target, powers, block=256)
    assert same(target, x.abs().pow(y) + x.round().fmod(3.0) + y.round())


@pytest.mark.parametrize(("name", "dtype"), [("tanh", BFLOAT16), ("rcp_ru", FLOAT32)])
def test_libdevice_refuses_what_it_does_not_have(name: str, dtype: torch.dtype) -> None:
    """bfloat16 is no dtype of libdevice's, on a GPU neither; rounding upwards is not written here."""
    source = torch.ones(16, dtype=dtype)
    with pytest.raises(Exception, match=r"bfloat16|rcp_ru"):
        unary_kernel[(1,)](source, source.clone(), getattr(libdevice, name), block=16)
