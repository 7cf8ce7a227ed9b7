"""What a library call allocates is counted, whether or not anybody reads it."""

from __future__ import annotations

import torch

import opweave
from opweave import torch_backend


def test_results_that_nobody_reads_are_counted() -> None:
    """The indices of a sort: 8 bytes for each of its elements, beside 4 of values."""

    def sorted_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ w).sort(1)[0] @ w

    x, w = torch.randn(64, 64), torch.randn(64, 64)
    torch_backend.reset()
    with torch.no_grad():
        out = torch.compile(sorted_products, backend=opweave.backend)(x, w)
    torch.testing.assert_close(out, sorted_products(x, w))
    (report,) = opweave.backend_reports()
    assert report.tier == "T1"
    matrix = 64 * 64 * 4
    assert report.allocated_bytes == report.bound_bytes == matrix + matrix + 2 * matrix  # product, values, indices
