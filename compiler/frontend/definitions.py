"""Definitions of operators from a file that the user names, and so trusts."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import OptionError

__all__ = ["load_definitions"]


def load_definitions(path: Path) -> dict[str, Callable[..., Any]]:
    """The ``DEFINITIONS`` of a Python file, which is executed: functions by operator type.

    Raises:
        OptionError: the file cannot be read, fails, or has no such dictionary.
    """
    try:
        found = runpy.run_path(str(path)).get("DEFINITIONS")
    except OSError as error:
        raise OptionError(f"cannot read definitions {str(path)!r}: {error.strerror}") from error
    except (Exception, SystemExit) as error:  # whatever the user's own file raises
        raise OptionError(f"definitions {str(path)!r} end in {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and callable(v) for k, v in found.items()):
        raise OptionError(
            f"{str(path)!r} has no dictionary DEFINITIONS of functions by operator type",
            hint="see docs/adding-an-op.md",
        )
    return found
