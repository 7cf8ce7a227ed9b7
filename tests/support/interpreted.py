"""Runs a file of tests under Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and the interpreter leaves triton.language patched; neither may
reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run"]

_ROOT = Path(__file__).parents[2]


def run(file: Path, *options: str, timeout_s: float = 300, **environment: str) -> None:
    """Run pytest on ``file`` with TRITON_INTERPRET=1 and ``environment``; an error, a failure, a skipped test raise.

    Raises:
        AssertionError: with all that the other process said.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)]
    result = subprocess.run(
        command,
        env={**os.environ, **environment, "TRITON_INTERPRET": "1"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout, result.stdout
