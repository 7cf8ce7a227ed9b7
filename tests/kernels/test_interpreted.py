"""Runs each ``interpreted_*.py`` under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from tests.support.interpreted import run

HERE = Path(__file__).parent
#: In parts, so that several cores share the work.
PARTS = 6
KERNELS = sorted(path.stem for path in (HERE / "cases").glob("[!_]*.py"))


@pytest.mark.parametrize(
    "file", sorted(path.name for path in HERE.glob("interpreted_*.py") if path.name != "interpreted_kernels.py")
)
def test_passes_under_the_interpreter(file: str) -> None:
    run(HERE / file)


@pytest.mark.parametrize(
    "dtypes",
    ["bfloat16,float32", pytest.param("float16", marks=pytest.mark.slow)],  # the third tells little more
)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_kernel_computes_what_it_says(part: int, dtypes: str) -> None:
    run(HERE / "interpreted_kernels.py", TESTED_KERNELS=",".join(KERNELS[part::PARTS]), TESTED_DTYPES=dtypes)
