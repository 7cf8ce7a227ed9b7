"""Reductions and scans of the corrected interpreter against torch; `test_interpreted.py` runs this file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.support.interpreter import correct

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, COLUMNS = 8, 64


@pytest.fixture(autouse=True)
def _corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)


def samples(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def reduce_kernel(
    source: Any, target: Any, function: tl.constexpr, axis: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
) -> None:
    """Reduce a matrix along one axis, or to one number."""
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    values = tl.load(source + row[:, None] * columns + column[None, :])
    result = function(values, axis)
    if axis is None:
        tl.store(target, result)
    elif axis == 0:
        tl.store(target + column, result)
    else:
        tl.store(target + row, result)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def total(values: Any, axis: tl.constexpr) -> Any:
    """A sum in the values' own dtype."""
    return tl.sum(values, axis)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def largest(values: Any, axis: tl.constexpr) -> Any:
    """A maximum."""
    return tl.max(values, axis)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def place(values: Any, axis: tl.constexpr) -> Any:
    """Where the smallest is, the first of equal ones."""
    return tl.argmin(values, axis)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def first_of(left: Any, right: Any) -> Any:
    """Associative but not commutative."""
    return left + 0.0 * right


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def first(values: Any, axis: tl.constexpr) -> Any:
    """The first element."""
    return tl.reduce(values, axis, first_of)


def tree_sum(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Neighbours first, every sum rounded to the dtype."""
    values = values.flatten() if axis is None else values.movedim(axis, 0)
    while len(values) > 1:
        values = values[::2] + values[1::2]
    return values[0]


def over(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, int | None], torch.Tensor]:
    """``function`` of torch with an axis or of all elements."""
    return lambda values, axis: function(values) if axis is None else function(values, axis)


REDUCTIONS: Mapping[str, tuple[Any, Callable[[torch.Tensor, int | None], torch.Tensor]]] = MappingProxyType(
    {
        "sum": (total, tree_sum),
        "max": (largest, over(torch.amax)),
        "argmin": (place, over(torch.argmin)),
        "first": (first, lambda values, axis: values.flatten()[0] if axis is None else values.select(axis, 0)),
    }
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in REDUCTIONS for axis in (None, 0, 1) if (name, axis) != ("argmin", None)]
)
def test_reductions(name: str, axis: int | None, dtype: torch.dtype) -> None:
    function, reference = REDUCTIONS[name]
    values = samples(dtype)
    values[:, 3] = values[:, 5] = -torch.finfo(torch.float16).max
    expected = reference(values, axis)
    target = torch.empty(expected.shape, dtype=torch.int32 if name == "argmin" else dtype)
    reduce_kernel[(1,)](values, target, function, axis, ROWS, COLUMNS)
    assert torch.equal(target, expected.to(target.dtype))


def test_small_integers_have_the_sum_of_torch() -> None:
    values = torch.randint(-2, 3, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1)).bfloat16()
    target = torch.empty((), dtype=torch.bfloat16)
    reduce_kernel[(1,)](values, target, total, None, ROWS, COLUMNS)
    assert torch.equal(target, values.sum())


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def merge(mean: Any, square: Any, weight: Any, other_mean: Any, other_square: Any, other_weight: Any) -> Any:
    """Welford's merge of two means and sums of squared deviations."""
    weights = weight + other_weight
    share = other_weight / weights
    distance = other_mean - mean
    return mean + distance * share, square + other_square + distance * distance * weight * share, weights


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def welford_kernel(source: Any, means: Any, squares: Any, rows: tl.constexpr, columns: tl.constexpr) -> None:
    """Mean and squared deviations of each row, with three values reduced at once."""
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    values = tl.load(source + row[:, None] * columns + column[None, :])
    mean, square, _ = tl.reduce((values, values * 0.0, values * 0.0 + 1.0), 1, merge)
    tl.store(means + row, mean)
    tl.store(squares + row, square)


def test_several_values_are_reduced_together() -> None:
    values = samples(torch.float32)
    means, squares = torch.empty(ROWS), torch.empty(ROWS)
    welford_kernel[(1,)](values, means, squares, ROWS, COLUMNS)
    torch.testing.assert_close(means, values.mean(1))
    torch.testing.assert_close(squares / (COLUMNS - 1), values.var(1))


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def scan_kernel(
    source: Any, target: Any, reverse: tl.constexpr, axis: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
) -> None:
    """Running sums of a matrix."""
    at = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(target + at, tl.cumsum(tl.load(source + at), axis, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scans(axis: int, reverse: bool) -> None:
    """Of small integers, so that the order does not show."""
    values = torch.randint(-2, 3, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(2)).bfloat16()
    target = torch.empty_like(values)
    scan_kernel[(1,)](values, target, reverse, axis, ROWS, COLUMNS)
    expected = values.flip(axis).cumsum(axis).flip(axis) if reverse else values.cumsum(axis)
    assert torch.equal(target, expected)
