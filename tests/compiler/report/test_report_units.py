"""Numbers as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.report.units import format_bytes, format_flops, format_percent, format_seconds, plural


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1024 * 1024 - 1, "1.00 MiB"),
        (100 << 20, "100 MiB"),
        (1 << 50, "1.00 PiB"),
    ],
)
def test_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 1 << 60))
def test_bytes_lose_less_than_one_percent(nbytes: int) -> None:
    number, unit = format_bytes(nbytes).replace(",", "").split()
    power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].index(unit)
    assert float(number) * 1024**power == pytest.approx(nbytes, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.2e-5, "42.0 us"), (3e-9, "3.00 ns"), (1200.0, "1,200 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_seconds_that_are_no_number_are_still_written() -> None:
    assert format_seconds(float("nan")) == "nan s"
    assert format_seconds(float("inf")) == "inf s"


def test_flops_percent_and_plural() -> None:
    assert format_flops(999) == "999 FLOP"
    assert format_flops(4_100_000_000) == "4.10 GFLOP"
    assert format_percent(0.5) == "50.0 %"
    assert format_percent(0.0123) == "1.23 %"
    assert format_percent(1e-7) == "<0.01 %"
    assert format_percent(0) == "0.00 %"
    assert (plural(1, "store"), plural(2000, "store")) == ("1 store", "2,000 stores")
    assert re.fullmatch(r"[\d.]+ EFLOP", format_flops(10**19))
