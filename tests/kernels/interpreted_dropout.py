"""Dropout masks of ``kernels/_dropout.py``: Triton's generator and PyTorch's arithmetic give the same bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from opweave.kernels._dropout import dropped, kept, mask, philox, scaling, threshold
from tests.support.interpreter import correct

SEEDS = (0, 1, -3, 2**31, 2**40 + 7, 2**63 - 1, -(2**63))


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def words_kernel(
    seed_pointer: tl.tensor, offset_pointer: tl.tensor, words_pointer: tl.tensor, uniform_pointer: tl.tensor
) -> None:
    """Four words for each offset, one row after the other, and what ``tl.rand`` makes of the first."""
    lane = tl.arange(0, 16)
    seed, offset = tl.load(seed_pointer), tl.load(offset_pointer + lane)
    words = tl.randint4x(seed, offset)
    for word in tl.static_range(4):
        tl.store(words_pointer + 16 * word + lane, words[word].to(tl.int32, bitcast=True))
    tl.store(uniform_pointer + lane, tl.rand(seed, offset))


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def mask_kernel(
    seed_pointer: tl.tensor,
    kept_pointer: tl.tensor,
    dropped_pointer: tl.tensor,
    least: tl.tensor,
    first_row: tl.constexpr,
    rows: tl.constexpr,
    first: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """One tile of a mask, and the tile of ones with that dropout."""
    seed, row = tl.load(seed_pointer), first_row + tl.arange(0, rows)
    at = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(kept_pointer + at, kept(seed, row, first, least, columns).to(tl.int8))
    ones = tl.full([rows, columns], 1.0, tl.float32)
    tl.store(dropped_pointer + at, dropped(ones, seed, row, first, least, columns))


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_triton_s(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)
    offsets = torch.tensor([*range(8), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40, 2**62, 2**63 - 1])
    words, uniform = torch.empty(4, 16, dtype=torch.int32), torch.empty(16)
    words_kernel[(1,)](torch.tensor([seed]), offsets, words, uniform)
    zero = torch.zeros_like(offsets)
    expected = torch.stack(philox(torch.tensor(seed), (offsets & 0xFFFFFFFF, (offsets >> 32) & 0xFFFFFFFF, zero, zero)))
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)
    signed = words[0].long()
    assert torch.equal(uniform, torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_masks_are_the_same_for_every_tile(seed: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)
    whole = mask((24, 72), p, torch.tensor([seed]))
    for first_row, rows, first, columns in ((0, 16, 0, 64), (8, 16, 8, 64), (20, 4, 64, 8), (3, 1, 4, 8)):
        tile, values = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, columns)
        mask_kernel[(1,)](torch.tensor([seed]), tile, values, threshold(p), first_row, rows, first, columns)
        expected = whole[first_row : first_row + rows, first : first + columns]
        assert torch.equal(tile.bool(), expected)
        assert torch.equal(values.bool(), expected)


def test_a_known_answer() -> None:
    """Philox 4x32-10 of Random123's test vectors."""
    full = torch.tensor(0xFFFFFFFF)
    zero = torch.zeros((), dtype=torch.int64)
    assert [hex(w) for w in philox(zero, (zero,) * 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(w) for w in philox(torch.tensor(-1), (full,) * 4)] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


def test_as_many_are_kept_as_should_be() -> None:
    for p in (0.0, 0.05, 0.5, 0.9, 1.0):
        keep = mask((500, 401), p, torch.tensor([11])).double()
        assert abs(keep.mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5 + 1e-9
        assert abs(keep.mean() * scaling(p) - float(p < 1)) < 0.02
    one, other = (mask((500, 401), 0.5, torch.tensor([seed])) for seed in (1, 2))
    assert abs((one == other).double().mean() - 0.5) < 0.01
    assert abs((one[:-1] == one[1:]).double().mean() - 0.5) < 0.01
    assert abs((one[:, :-1] == one[:, 1:]).double().mean() - 0.5) < 0.01
