"""Compiled functions that neither make arrays nor keep any: numba need not count who uses them.

They hand many arrays to one another, all the time; counting made them ten to twenty times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._compiled import compiled

__all__ = ["bare"]


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as machine code, without numba's runtime: it may not make an array, a list or a string."""
    return compiled(function, _nrt=False)
