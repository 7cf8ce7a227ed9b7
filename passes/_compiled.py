"""Functions compiled by numba. Import this where compiled code is needed only: numba takes a second to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from numba import njit

__all__ = ["compiled"]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` as machine code on first use, kept on disk where there is a place for it, free of Python's lock.

    ``options`` are further ones of ``numba.njit``.
    """
    try:
        return cast(Callable[..., Any], njit(cache=True, nogil=True, **options)(function))
    except RuntimeError:  # no folder that numba may write to
        return cast(Callable[..., Any], njit(nogil=True, **options)(function))
