"""What ``all_reduce_add_rms_norm`` does besides numerics: shares of rows, refusals, cost, machine code of one rank."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels import all_reduce_add_rms_norm
from opweave.kernels.all_reduce_add_rms_norm import KERNEL, launch_on_rank, rows_of_rank
from opweave.kernels.bench.offline import compiled, resources
from tests.kernels.conforming import FLOAT_TOLERANCE

SIZES: dict[str, Any] = {"peers": 3, "rows": 4, "columns": 8}


@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE)
def test_reference_is_what_separate_operators_compute(dtype: torch.dtype) -> None:
    given = all_reduce_add_rms_norm.arguments(dtype, **SIZES)
    rtol, atol = FLOAT_TOLERANCE[dtype]
    for actual, expected in zip(
        all_reduce_add_rms_norm.reference(**given), all_reduce_add_rms_norm.eager(**given), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("peers", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 2**31 + 5])
def test_ranks_share_all_rows_almost_equally(peers: int, rows: int) -> None:
    shares = [rows_of_rank(rank, peers, rows) for rank in range(peers)]
    assert shares[0][0] == 0
    assert shares[-1][1] == rows
    assert all(one[1] == following[0] for one, following in pairwise(shares))
    extents = [end - first for first, end in shares]
    assert max(extents) - min(extents) <= 1


def test_cost_is_what_was_counted_by_hand() -> None:
    """For three ranks, four rows and eight columns."""
    rows = 2 * 8 + 8 + (8 + 7 + 1 + 1 + 1) + 8 + 8  # sums of ranks, residual, scale, two products
    assert all_reduce_add_rms_norm.cost("float32", **SIZES).flops == 4 * rows
    assert all_reduce_add_rms_norm.cost("bfloat16", **SIZES).traffic_bytes == 2 * ((3 + 1 + 2) * 32 + 8)


def test_refuses_what_it_cannot_compute() -> None:
    given = all_reduce_add_rms_norm.arguments(torch.float32, **SIZES)
    outputs = dict(zip(KERNEL.written, all_reduce_add_rms_norm.allocate(**given), strict=True))
    for changed, message in (
        ({"partials": torch.zeros(3, 4, 7)}, r"needs partials \[3, 4, 8\]"),
        ({"partials": torch.zeros(0, 4, 8)}, "needs partials of at least one rank"),
        ({"partials": torch.zeros(3, 4, 8).half()}, "needs partials .*of float32"),
        ({"programs": 0}, "needs at least one program; got 0"),
        ({"addresses": torch.zeros(4, dtype=torch.int64)}, r"needs addresses \[5\]"),
        ({"weight": torch.zeros(4)}, r"needs weight \[8\]"),
        ({"hidden": given["residual"]}, "needs hidden in memory of its own; it overlaps residual"),
        ({"out": given["partials"][1]}, "needs out in memory of its own; it overlaps partials"),
        ({}, "needs tensors on a CUDA device"),
    ):
        with pytest.raises(ExecutionError, match=message):
            all_reduce_add_rms_norm.launch(**{**given, **outputs, **changed})


def test_nothing_in_a_graph_of_one_rank_is_replaced() -> None:
    assert "launch_on_rank" in (all_reduce_add_rms_norm.matches.__doc__ or "")


def one_rank(
    partials: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    programs: int,
    *,
    config: Any,
    **_: torch.Tensor,
) -> None:
    """What rank 1 launches, for tables that nobody fills."""
    table = torch.empty(len(partials), dtype=torch.int64, device=residual.device)
    launch_on_rank(table, residual, weight, epsilon, 1, programs, hidden=table, out=table, config=config)


@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE)
def test_one_rank_of_eight_moves_16_bytes_at_once(dtype: torch.dtype) -> None:
    """Addresses out of a table are known to be aligned: every access of a whole row is a vector's, and none spills."""
    kernel: Any = SimpleNamespace(
        arguments=KERNEL.arguments, allocate=KERNEL.allocate, written=KERNEL.written, launch=one_rank
    )
    columns, config = 4096, KERNEL.configs.of_architecture(90)[1]
    assert config.constants["block"] == columns
    (made,) = compiled(kernel, {"peers": 8, "rows": 64, "columns": columns, "programs": 16}, dtype, config)
    used = resources(made)
    assert (used.stack_bytes, used.spills) == (0, 0)
    vectors = columns * dtype.itemsize // (16 * 32 * config.num_warps)
    code = made.asm["ptx"]
    assert code.count("ld.global.v4") == (8 + 1 + 1) * vectors  # partial sums, residual, weight
    assert code.count("st.global.v4") == (8 + 8) * vectors
