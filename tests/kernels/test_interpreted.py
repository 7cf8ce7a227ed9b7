"""Runs each ``interpreted_*.py`` under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from tests.support.interpreted import run

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_passes_under_the_interpreter(file: str) -> None:
    run(HERE / file)
