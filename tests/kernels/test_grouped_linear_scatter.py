"""What ``kernels/grouped_linear_scatter.py`` does besides numerics: gradients, refusals, cost, matches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.grouped_linear_scatter import KERNEL, cost, launch
from tests.kernels.experts import check_gradients, check_refusal, inputs_for


def test_is_what_a_loop_over_experts_computes() -> None:
    given = inputs_for(KERNEL)
    torch.testing.assert_close(KERNEL(*given.values()), KERNEL.eager(*given.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_loop_over_experts(dtype: torch.dtype) -> None:
    given = inputs_for(KERNEL, dtype)
    given["ends"] = torch.tensor([0, 11, 11, 18], dtype=torch.int32)  # two experts without rows
    check_gradients(KERNEL, given, "x", "weight", "weights")
    given["weights"] = given["weights"].to(dtype).view(3, 3, 2)
    given["weight"] = given["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    check_gradients(KERNEL, given, "x", "weight", "weights")


def test_cost_is_what_was_counted_by_hand() -> None:
    sizes = {"tokens": 3, "experts": 4, "top_k": 2, "hidden": 5, "intermediate": 7}
    # of each of 6 rows 5 columns of 7 products and sums and a share, of each of 3 tokens one sum of two
    assert cost("float32", **sizes).flops == 6 * 5 * (14 + 1) + 3 * 5
    traffic = 2 * (6 * 7 + 4 * 5 * 7 + 3 * 5) + 4 * 6 + 4 * 6 + 4 * 4
    assert cost("bfloat16", **sizes).traffic_bytes == traffic
    assert cost("bfloat16", **sizes | {"tokens": 0}).flops == 0


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "float64": ({"x": torch.zeros(18, 7, dtype=torch.float64)}, r"got .*float64"),
        "another depth": ({"weight": torch.zeros(4, 8, 11)}, r"needs weight \[any, 7, any\]"),
        "order of tokens": ({"order": torch.zeros(9, dtype=torch.int32)}, r"needs order \[18\]"),
        "order of floats": ({"order": torch.zeros(18)}, r"needs order .* of int32, int64"),
        "shares of too few": ({"weights": torch.zeros(8, 2)}, r"needs weights \[..., top_k\] for all 18 rows"),
        "shares of integers": ({"weights": torch.zeros(9, 2, dtype=torch.int32)}, r"needs weights .*got .*int32"),
        "transposed shares": ({"weights": torch.zeros(2, 9).t()}, r"needs weights row-major"),
        "ends that begin with zero": ({"ends": torch.zeros(5, dtype=torch.int32)}, r"needs ends \[4\]"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    check_refusal(KERNEL, inputs_for(KERNEL), *REFUSED[case])


def test_refuses_scratch_that_is_the_result() -> None:
    given = inputs_for(KERNEL, top_k=1)
    out, products = torch.zeros(2, 9, 11).unbind()
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps products"):
        launch(**given, out=out, products=out)
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
        launch(**given, out=out, products=products)
