"""What ``kernels/lora_linear.py`` does besides numerics: refusals, cost, its reference against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.lora_linear import KERNEL

X, W, S, B = torch.zeros(6, 8), torch.zeros(8, 10), torch.zeros(6, 4), torch.zeros(4, 10)

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "no dimension": ({"x": torch.zeros(())}, r"needs x \[any\]"),
        "float64": ({"x": X.double()}, r"of float32, float16, bfloat16 on cpu; got .*float64"),
        "columns first": ({"x": torch.zeros(8, 6).t()}, r"needs x row-major"),
        "another depth": ({"w": torch.zeros(7, 10)}, r"needs w \[8, any\]"),
        "another rank": ({"s": torch.zeros(6, 5)}, r"needs s \[6, 4\]"),
        "fewer tokens": ({"s": torch.zeros(5, 4)}, r"needs s \[6, 4\]"),
        "mixed dtypes": ({"b": B.half()}, r"needs b .*float32.*got .*float16"),
        "other columns": ({"b": torch.zeros(4, 9)}, r"needs b \[any, 10\]"),
        "a bias of other columns": ({"bias": torch.zeros(9)}, r"needs bias \[10\]"),
        "one adapter, offsets": ({"offsets": torch.tensor([0, 6])}, r"needs b \[1, any, 10\]"),
        "no offsets": ({"offsets": torch.tensor([0])}, r"needs offsets of at least one adapter"),
        "another device": ({"b": B.to("meta")}, r"needs b .* on cpu; got .* on meta"),
        "a result of other columns": ({"y": torch.zeros(6, 9)}, r"needs y \[6, 10\]"),
        "overlap": ({"y": W.view(-1)[:60].view(6, 10)}, r"needs y in memory of its own; it overlaps w"),
        "no device": ({}, r"needs tensors on a CUDA device; they are on cpu"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    given = {"x": X, "w": W, "s": S, "b": B, "bias": None, "offsets": None, "scale": 2.0, "y": torch.zeros(6, 10)}
    with pytest.raises(ExecutionError, match=message):
        KERNEL.launch(**{**given, **changed})


@pytest.mark.parametrize("adapters", [0, 3])
def test_it_is_two_linear_layers_and_a_sum(adapters: int) -> None:
    sizes = {"tokens": 7, "depth": 33, "columns": 12, "rank": 5, "adapters": adapters, "bias": True}
    given = KERNEL.arguments(torch.float32, **sizes)
    torch.testing.assert_close(KERNEL(*given.values()), KERNEL.eager(**given))


def test_rounds_once() -> None:
    """1, and twice three eighths of bfloat16's next step: added one by one, both are lost."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    part = one * 0.375 * 2.0**-7
    assert KERNEL(one, one, part, one, part[0], None, 1.0).item() == 1 + 2.0**-7
    assert (one + part + part).item() == 1
    assert KERNEL(one, one, part, one, None, None, 2.0).item() == 1 + 2.0**-7


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("float16", tokens=3, depth=5, columns=7, rank=2)
    assert plain.flops == 21 * (2 * 5 + 2 * 2 + 1)
    assert plain.traffic_bytes == 2 * (15 + 35 + 6 + 14 + 21)
    more = KERNEL.cost("float16", tokens=3, depth=5, columns=7, rank=2, adapters=4, bias=True)
    assert more.flops == plain.flops + 21
    assert more.traffic_bytes == plain.traffic_bytes + 2 * (3 * 14 + 7)
