"""Every kernel on a CUDA device: the interpreter's cases, workloads at full size, and offsets beyond 32 bits.

The cases compile some thousand kernels, one or two a second; ``-n 8``, where pytest-xdist is installed, shares them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

import torch

from opweave.kernels import registry
from opweave.kernels._kernel import Kernel, Workload
from opweave.kernels.bench.problem import TOLERANCE, Case, Problem, error_of
from opweave.kernels.bench.providers import OURS, providers_of
from tests.kernels import conforming
from tests.kernels.test_kernels import NAMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SLACK = 4.0  # exponentials, roots and divisions are some units in the last place off there
BEYOND = 1 << 31  # elements
SHARE = 0.4  # of the free memory that a large input may have; results, the truth and its steps need the rest
SCALED = ("rows", "tokens", "sequences", "batch", "images")


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


ALL = [
    pytest.param(cases, case, dtype, id=f"{name}-{case}-{str(dtype).removeprefix('torch.')}")
    for name in NAMES
    for cases in [conforming.cases_of(name)]
    for case in cases.cases
    for dtype in case.dtypes or cases.kernel.dtypes
]


def skip_unknown_dtypes(sizes: Mapping[str, Any]) -> None:
    if "float8" in str(sizes.get("quantized")) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")


@pytest.mark.parametrize(("cases", "case", "dtype"), ALL)
def test_computes_what_it_says(cases: conforming.Cases, case: conforming.Case, dtype: torch.dtype) -> None:
    skip_unknown_dtypes(case.sizes)
    conforming.check(cases, case, dtype, "cuda", slack=SLACK)


def error(kernel: Kernel, workload: Workload, dtype: torch.dtype) -> float:
    """How far off our result is, relative to its largest element; skips what the device has no memory for."""
    try:
        problem = Problem(Case(kernel, workload, dtype), torch.device("cuda"))
        truths, _ = problem.truth()
        results = next(p for p in providers_of(kernel.name) if p.name == OURS).prepare(problem).whole()
        torch.cuda.synchronize()
        return error_of(results, truths)
    except torch.OutOfMemoryError:
        pytest.skip("the device has too little memory")


WORKLOADS = [
    pytest.param(kernel, workload, dtype, id=f"{name}-{workload.name}-{str(dtype).removeprefix('torch.')}")
    for name in NAMES
    for kernel in [registry.load(name)]
    for workload in kernel.workloads
    for dtype in kernel.dtypes
    if dtype == torch.bfloat16 or workload is kernel.workloads[0]
]


@pytest.mark.parametrize(("kernel", "workload", "dtype"), WORKLOADS)
def test_computes_workloads_at_full_size(kernel: Kernel, workload: Workload, dtype: torch.dtype) -> None:
    """In the reference's digits, so within what sums of thousands of rounded products may be off by."""
    skip_unknown_dtypes(workload.sizes)
    assert error(kernel, workload, dtype) <= TOLERANCE[dtype]


def large_workload(kernel: Kernel, dtype: torch.dtype) -> Workload | None:
    """A workload with so many rows that a tensor has more than 2**31 elements; ``None`` if it has no number of rows."""
    for workload in kernel.workloads:
        name = next((name for name in SCALED if name in workload.sizes), None)
        if name is None:
            continue
        factor, grown = 1, workload.sizes
        while largest(kernel, dtype, grown) <= BEYOND and factor < 1 << 20:
            factor *= 2
            grown = {**workload.sizes, name: workload.sizes[name] * factor}
        if largest(kernel, dtype, grown) > BEYOND:
            return Workload(f"{workload.name} {name} x {factor}", grown)
    return None


def tensors(kernel: Kernel, dtype: torch.dtype, sizes: Any) -> list[torch.Tensor]:
    made = kernel.arguments(dtype, "meta", **sizes).values()
    return [v for v in (*made, *kernel.allocate(*made)) if isinstance(v, torch.Tensor)]


def largest(kernel: Kernel, dtype: torch.dtype, sizes: Any) -> int:
    return max(tensor.numel() for tensor in tensors(kernel, dtype, sizes))


@pytest.mark.parametrize("name", NAMES)
def test_offsets_may_exceed_32_bits(name: str) -> None:
    kernel = registry.load(name)
    dtype = torch.bfloat16 if torch.bfloat16 in kernel.dtypes else kernel.dtypes[0]
    workload = large_workload(kernel, dtype)
    if workload is None:
        pytest.skip("none of its sizes is a number of rows")
    free, _ = torch.cuda.mem_get_info()
    needed = sum(tensor.nbytes for tensor in tensors(kernel, dtype, workload.sizes))
    if needed > SHARE * free:
        pytest.skip(f"{workload.name} needs {needed / 2**30:.0f} GiB, and there are {free / 2**30:.0f}")
    assert error(kernel, workload, dtype) <= TOLERANCE[dtype]
