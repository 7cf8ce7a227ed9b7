"""What ``kernels/lora_down.py`` does besides numerics: refusals, cost, its reference against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.lora_down import CONFIGS, KERNEL

X, A, SEED = torch.zeros(6, 8), torch.zeros(8, 4), torch.zeros(1, dtype=torch.int64)

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "no dimension": ({"x": torch.zeros(())}, r"needs x \[any\]"),
        "float64": ({"x": X.double()}, r"of float32, float16, bfloat16 on cpu; got .*float64"),
        "columns first": ({"x": torch.zeros(8, 6).t()}, r"needs x row-major"),
        "another depth": ({"a": torch.zeros(7, 4)}, r"needs a \[8, any\]"),
        "mixed dtypes": ({"a": A.half()}, r"needs a .*float32.*got .*float16"),
        "one adapter, offsets": ({"offsets": torch.tensor([0, 6])}, r"needs a \[1, 8, any\]"),
        "offsets in floats": ({"offsets": torch.zeros(2)}, r"needs offsets \[any\] of int32, int64"),
        "no offsets": ({"offsets": torch.zeros(0, dtype=torch.int32)}, r"needs offsets of at least one adapter"),
        "negative p": ({"p": -0.1}, r"needs a dropout probability from 0 to 1; got -0.1"),
        "infinite p": ({"p": math.inf}, r"needs a dropout probability from 0 to 1; got inf"),
        "no seed": ({"p": 0.1, "seed": None}, r"needs a seed to drop out with p = 0.1"),
        "narrow seed": ({"seed": torch.zeros(1, dtype=torch.int32)}, r"needs seed \[1\] of int64"),
        "another device": ({"a": A.to("meta")}, r"needs a .* on cpu; got .* on meta"),
        "a result of another rank": ({"s": torch.zeros(6, 5)}, r"needs s \[6, 4\]"),
        "a strided result": ({"s": torch.zeros(6, 8)[:, ::2]}, r"needs s row-major"),
        "overlap": ({"s": X.view(-1)[:24].view(6, 4)}, r"needs s in memory of its own; it overlaps x"),
        "no device": ({}, r"needs tensors on a CUDA device; they are on cpu"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    given = {"x": X, "a": A, "seed": SEED, "offsets": None, "p": 0.5, "s": torch.zeros(6, 4)}
    with pytest.raises(ExecutionError, match=message):
        KERNEL.launch(**{**given, **changed})


def test_without_dropout_it_is_a_product() -> None:
    given = KERNEL.arguments(torch.float32, tokens=7, depth=33, rank=5)
    torch.testing.assert_close(KERNEL(*given.values()), KERNEL.eager(**given))
    several = KERNEL.arguments(torch.float32, tokens=7, depth=33, rank=5, adapters=3)
    torch.testing.assert_close(KERNEL(*several.values()), KERNEL.eager(**several))


def test_everything_is_dropped_for_p_of_one() -> None:
    given = KERNEL.arguments(torch.bfloat16, tokens=7, depth=33, rank=5, p=1.0)
    assert torch.equal(KERNEL(*given.values()), torch.zeros(7, 5, dtype=torch.bfloat16))


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("float16", tokens=3, depth=5, rank=2)
    assert (plain.flops, plain.traffic_bytes) == (2 * 3 * 5 * 2, 2 * (15 + 10 + 6))
    assert KERNEL.cost("float16", tokens=3, depth=5, rank=2, p=0.1).flops == plain.flops + 6
    assert KERNEL.cost("float32", tokens=3, depth=5, rank=2, adapters=4).traffic_bytes == 4 * (15 + 40 + 6)
    assert KERNEL.cost("float16", tokens=0, depth=5, rank=2).flops == 0


def test_configurations_are_chosen_by_layout_and_rank() -> None:
    rows = CONFIGS.of_architecture(90)
    for change, row in (
        ({}, rows[0]),
        ({"rank": 17}, rows[1]),
        ({"element_bytes": 4}, rows[-1]),
        ({"ragged": 1}, rows[-1]),
    ):
        sizes = {"tokens": 64, "depth": 64, "rank": 16, "element_bytes": 2, "ragged": 0, **change}
        assert CONFIGS.choose(torch.device("meta"), **sizes) is row
