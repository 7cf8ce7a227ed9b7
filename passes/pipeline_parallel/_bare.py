"""Compiled functions that neither make arrays nor keep any: numba need not count who uses them.

They hand many arrays to one another, all the time; counting made them ten to twenty times slower.

What numba keeps on disk it takes for new as long as the file of the function is as it was, though it has the code of
functions of other files in it. ``STAMP`` names the state of all the files; it is part of the type of what they hand on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._compiled import compiled

__all__ = ["STAMP", "bare"]


def _stamp() -> str:
    digest = hashlib.sha256()
    for name in ("_play.py", "_dispatch.py", "_climb.py"):
        source = Path(__file__).with_name(name)
        digest.update(source.read_bytes() if source.exists() else b"")
    return f"stamp_{digest.hexdigest()[:16]}"


STAMP = _stamp()


def bare(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as machine code, without numba's runtime: it may not make an array, a list or a string."""
    return compiled(function, _nrt=False)
