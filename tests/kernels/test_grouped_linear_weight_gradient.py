"""What ``kernels/grouped_linear_weight_gradient.py`` does besides numerics: refusals, cost, matches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.kernels._experts import sizes_of
from opweave.kernels.grouped_linear_weight_gradient import CONFIGS, KERNEL, cost
from tests.kernels.experts import check_refusal, inputs_for
from tests.kernels.matching import check_fusion, check_matches, exported


def test_is_torch_s_grouped_product_over_rows() -> None:
    given = inputs_for(KERNEL, torch.bfloat16, tokens=32, hidden=64, intermediate=48)
    expected = torch._grouped_mm(given["x"].t(), given["gradient"], offs=given["ends"])
    torch.testing.assert_close(KERNEL(*given.values()), expected)
    torch.testing.assert_close(KERNEL.eager(*given.values()), expected)


def test_an_expert_without_rows_gets_zeros() -> None:
    given = inputs_for(KERNEL)
    given["ends"] = torch.tensor([0, 18, 18, 18], dtype=torch.int32)
    out = KERNEL(*given.values())
    assert not out[[0, 2, 3]].any()
    torch.testing.assert_close(out[1], given["x"].t() @ given["gradient"])


def test_cost_is_what_was_counted_by_hand() -> None:
    sizes = {"tokens": 3, "experts": 4, "top_k": 2, "hidden": 5, "intermediate": 7}
    assert cost("float32", **sizes).flops == 6 * 7 * 5 * 2
    assert cost("bfloat16", **sizes).traffic_bytes == 2 * (6 * 5 + 4 * 5 * 7 + 6 * 7) + 4 * 4
    assert cost("float32", **sizes | {"tokens": 0}).traffic_bytes == 4 * 4 * 5 * 7 + 4 * 4


def test_configurations_follow_dtype_and_layout() -> None:
    def row(hidden: int, intermediate: int, dtype: torch.dtype) -> int:
        x, gradient = (torch.empty(64, extent, dtype=dtype, device="meta") for extent in (hidden, intermediate))
        return CONFIGS.rows[90].index(CONFIGS.choose(torch.device("cpu"), **sizes_of(64, 8, x, gradient)))

    assert row(64, 32, torch.float16) == 0
    assert row(64, 32, torch.float32) == row(63, 32, torch.float16) == row(64, 31, torch.float16) == 1


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "other rows": ({"gradient": torch.zeros(17, 7)}, r"needs gradient \[18, any\].*got \[17, 7\]"),
        "mixed dtypes": ({"gradient": torch.zeros(18, 7, dtype=torch.float16)}, r"needs gradient .*float32"),
        "columns first": ({"gradient": torch.zeros(7, 18).t()}, r"needs gradient row-major"),
        "ends of two dimensions": ({"ends": torch.zeros(2, 2, dtype=torch.int32)}, r"needs ends \[4\]"),
        "many experts": ({"ends": torch.zeros(513, dtype=torch.int32)}, r"needs 1 to 512 experts; got 513"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    check_refusal(KERNEL, inputs_for(KERNEL), *REFUSED[case])


def product(x: Any, gradient: Any, ends: Any) -> Any:
    return torch._grouped_mm(x.t(), gradient, offs=ends)


@pytest.mark.parametrize("decomposed", [False, True])
def test_matches_torch_s_grouped_product_over_rows(decomposed: bool) -> None:
    given = inputs_for(KERNEL, torch.bfloat16, tokens=8, hidden=16, intermediate=24)
    check_fusion(KERNEL, product, [*given.values()], rtol=1e-2, atol=1e-2, decomposed=decomposed)


def test_does_not_match_what_it_cannot_compute() -> None:
    x, gradient, ends = inputs_for(KERNEL, torch.bfloat16, tokens=8, hidden=16, intermediate=24).values()
    weight = torch.zeros(4, 16, 24, dtype=x.dtype)
    for function, inputs in (
        (lambda x, g, ends: torch._grouped_mm(x, g, offs=ends), (x.t().contiguous(), gradient, ends)),  # columns first
        (lambda x, w, ends: torch._grouped_mm(x, w, offs=ends), (x, weight, ends)),  # rows by weights
    ):
        assert check_matches(KERNEL, exported(function, inputs, decomposed=False).graph) == ()
