"""Numbers as people read them: binary prefixes for bytes, decimal ones for seconds and operations."""

from __future__ import annotations

import math

__all__ = ["format_bytes", "format_count", "format_flops", "format_percent", "format_seconds", "plural"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def format_count(value: int) -> str:
    """``1234567`` as ``1,234,567``."""
    return f"{value:,}"


def format_bytes(nbytes: int) -> str:
    """Bytes with a binary prefix and three or four significant digits: ``512 B``, ``1.50 MiB``."""
    value, exponent = float(nbytes), 0
    while abs(value) >= (1024 if exponent == 0 else 1023.5) and exponent < len(_BINARY) - 1:
        value /= 1024
        exponent += 1
    return f"{nbytes} B" if exponent == 0 else f"{_significant(value)} {_BINARY[exponent]}"


def format_seconds(seconds: float) -> str:
    """Seconds in the largest unit that leaves at least one digit before the point: ``1.20 ms``."""
    if seconds == 0 or not math.isfinite(seconds):
        return f"{seconds:g} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(seconds) * factor >= 0.9995:
            return f"{_significant(seconds * factor)} {unit}"
    return f"{_significant(seconds * 1e9)} ns"


def format_flops(flops: int) -> str:
    """Operations with a decimal prefix: ``4.10 GFLOP``."""
    value, exponent = float(flops), 0
    while abs(value) >= 999.5 and exponent < len(_DECIMAL) - 1:
        value /= 1000
        exponent += 1
    return f"{_significant(value)} {_DECIMAL[exponent]}FLOP" if exponent else f"{flops} FLOP"


def format_percent(fraction: float) -> str:
    """A fraction as a percentage; a nonzero one that would round to nothing says so: ``<0.01 %``."""
    if 0 < fraction < 0.0001:
        return "<0.01 %"
    return f"{fraction * 100:.{2 if fraction < 0.1 else 1}f} %"


def plural(count: int, noun: str) -> str:
    """``1 operator``, ``2 operators``."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def _significant(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.{0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2}f}"
