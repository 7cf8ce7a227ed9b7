"""What ``kernels/grouped_linear.py`` does besides numerics: gradients, refusals, cost, matches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels._experts import count_tiles, sizes_of
from opweave.kernels.grouped_linear import CONFIGS, KERNEL, cost, launch
from tests.kernels.experts import check_gradients, check_refusal, inputs_for
from tests.kernels.matching import check_fusion, check_matches, exported


def test_is_torch_s_grouped_product() -> None:
    given = inputs_for(KERNEL, torch.bfloat16, tokens=32, hidden=64, intermediate=48)
    expected = torch._grouped_mm(given["x"], given["weight"], offs=given["ends"])
    torch.testing.assert_close(KERNEL(*given.values()), expected)
    torch.testing.assert_close(KERNEL.eager(*given.values()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_loop_over_experts(dtype: torch.dtype) -> None:
    given = inputs_for(KERNEL, dtype)
    given["ends"] = torch.tensor([0, 11, 11, 18], dtype=torch.int32)  # two experts without rows
    check_gradients(KERNEL, given, "x", "weight")
    given["weight"] = given["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    check_gradients(KERNEL, given, "x", "weight")


def test_cost_is_what_was_counted_by_hand() -> None:
    sizes = {"tokens": 3, "experts": 4, "top_k": 2, "hidden": 5, "intermediate": 7}
    assert cost("float32", **sizes).flops == 6 * 7 * 5 * 2
    assert cost("bfloat16", **sizes).traffic_bytes == 2 * (6 * 5 + 4 * 5 * 7 + 6 * 7) + 4 * 4
    assert cost("float32", **sizes | {"tokens": 1, "top_k": 1}).traffic_bytes == 4 * (5 + 5 * 7 + 7) + 4 * 4
    assert cost("float32", **sizes | {"tokens": 0}).flops == 0


def test_flops_are_counted_without_values() -> None:
    given = inputs_for(KERNEL)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        KERNEL(*given.values())
    assert counter.get_total_flops() == cost("float32", 9, 4, 2, 11, 7).flops


@pytest.mark.parametrize("block", [1, 16, 128])
@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 1, 1), (16, 0, 17), (0, 300, 0), (15, 31, 127), (128, 129, 1)])
def test_the_grid_has_a_program_for_every_tile(counts: tuple[int, ...], block: int) -> None:
    needed = sum(-(-count // block) for count in counts)
    assert needed <= count_tiles(sum(counts), len(counts), 5, block, 5) <= needed + len(counts)
    assert count_tiles(sum(counts), len(counts), 11, block, 5) == 3 * count_tiles(sum(counts), 3, 5, block, 5)


def test_configurations_follow_rows_dtype_and_layout() -> None:
    device = torch.device("cpu")
    narrow, wide = (torch.empty(8, 64, 32, dtype=d, device="meta") for d in (torch.bfloat16, torch.float32))
    chosen = [CONFIGS.choose(device, **sizes_of(rows, 8, narrow)) for rows in (128, 512, 10**5)]
    assert chosen == list(CONFIGS.rows[90][:3])
    assert CONFIGS.choose(device, **sizes_of(128, 8, wide)) is CONFIGS.rows[90][3]
    assert sizes_of(128, 8, narrow.transpose(1, 2))["ragged"] == 0
    for ragged in (narrow[:, 1:], narrow[..., 1:], narrow[..., ::2], narrow.transpose(1, 2)[:, :, 1:]):
        assert sizes_of(128, 8, ragged)["ragged"] == 1
        assert CONFIGS.choose(device, **sizes_of(128, 8, ragged)) is CONFIGS.rows[90][3]


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "three dimensions": ({"x": torch.zeros(2, 9, 11)}, r"needs x \[any, any\].*got \[2, 9, 11\]"),
        "float64": ({"x": torch.zeros(18, 11, dtype=torch.float64)}, r"got .*float64"),
        "mixed dtypes": ({"weight": torch.zeros(4, 11, 7, dtype=torch.float16)}, r"needs weight .*float32"),
        "another depth": ({"weight": torch.zeros(4, 10, 7)}, r"needs weight \[any, 11, any\]"),
        "long ends": ({"ends": torch.zeros(4, dtype=torch.int64)}, r"needs ends \[4\] of int32"),
        "ends that begin with zero": ({"ends": torch.zeros(5, dtype=torch.int32)}, r"needs ends \[4\]"),
        "no experts": (
            {"weight": torch.zeros(0, 11, 7), "ends": torch.zeros(0, dtype=torch.int32)},
            r"needs 1 to 512 experts; got 0",
        ),
        "columns first": ({"x": torch.zeros(11, 18).t()}, r"needs x row-major"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    check_refusal(KERNEL, inputs_for(KERNEL), *REFUSED[case])


def test_refuses_outputs_that_share_memory() -> None:
    given = inputs_for(KERNEL, hidden=7)
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps x"):
        launch(**given, out=given["x"])


def test_needs_a_device() -> None:
    given = inputs_for(KERNEL)
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device; they are on cpu"):
        launch(**given, out=torch.zeros(18, 7))


def product(x: Any, weight: Any, ends: Any) -> Any:
    return torch._grouped_mm(x, weight, offs=ends)


@pytest.mark.parametrize("decomposed", [False, True])
def test_matches_torch_s_grouped_product(decomposed: bool) -> None:
    given = inputs_for(KERNEL, torch.bfloat16, hidden=16, intermediate=24)
    check_fusion(KERNEL, product, [*given.values()], rtol=1e-2, atol=1e-2, decomposed=decomposed)
    given["weight"] = given["weight"].transpose(1, 2).contiguous()
    spelled = lambda x, w, ends: torch._grouped_mm(x, w.transpose(1, 2), offs=ends)  # noqa: E731
    check_fusion(KERNEL, spelled, [*given.values()], rtol=1e-2, atol=1e-2, decomposed=decomposed)


def test_does_not_match_what_it_cannot_compute() -> None:
    given = inputs_for(KERNEL, torch.bfloat16, tokens=8, hidden=16, intermediate=24)
    x, weight, ends = given.values()
    for function, inputs in (
        (lambda x, w, ends: product(x.t(), w, ends), (x.t().contiguous(), weight, ends)),  # columns first
        (lambda x, w, ends: product(x.t(), x, ends), (x, weight, ends)),  # a gradient of weights
        (lambda x, w, ends: torch.bmm(x, w), (x.view(4, 4, 16), weight, ends)),
    ):
        assert check_matches(KERNEL, exported(function, inputs, decomposed=False).graph) == ()
