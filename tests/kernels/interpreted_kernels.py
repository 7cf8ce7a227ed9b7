"""Numerics of every kernel under Triton's interpreter; `test_interpreted.py` runs this file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.conforming import Case, Cases, cases_of, check
from tests.support.interpreter import correct

CHOSEN = os.environ.get("TESTED_KERNELS", "").split(",")
NAMES = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[!_]*.py"))
NAMES = [name for name in NAMES if name in CHOSEN or CHOSEN == [""]]
DTYPES = os.environ.get("TESTED_DTYPES", "bfloat16,float16,float32").split(",")
ALL = [
    pytest.param(cases, case, dtype, id=f"{name}-{case}-{str(dtype).removeprefix('torch.')}")
    for name in NAMES
    for cases in [cases_of(name)]
    for case in cases.cases
    for dtype in case.dtypes or cases.kernel.dtypes
    if str(dtype).removeprefix("torch.") in DTYPES
]


@pytest.mark.parametrize(("cases", "case", "dtype"), ALL)
def test_computes_what_it_says(cases: Cases, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)
    check(cases, case, dtype, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_operators_obey_the_rules_of_custom_operators(name: str) -> None:
    """PyTorch's own checks of both operators: schema against what is written, fake tensors, dispatch when compiled."""
    cases = cases_of(name)
    kernel = cases.kernel
    case = next(c for c in cases.cases if 0 not in c.sizes.values())
    dtype = (case.dtypes or kernel.dtypes)[0]
    inputs: list[Any] = list(case.change(kernel.arguments(dtype, "cpu", **case.sizes)).values())
    outputs = [torch.zeros_like(made) for made in kernel.allocate(*inputs)]
    for operator, arguments in ((kernel.operator, inputs), (kernel.out_operator, [*inputs, *outputs])):
        results = torch.library.opcheck(operator, tuple(arguments))
        assert set(results.values()) == {"SUCCESS"}
