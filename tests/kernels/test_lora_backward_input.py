"""What ``kernels/lora_backward_input.py`` does besides numerics: refusals, cost, its reference against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.lora_backward_input import KERNEL

GRAD_Y, W, GRAD_S, A = torch.zeros(6, 10), torch.zeros(8, 10), torch.zeros(6, 4), torch.zeros(8, 4)

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "no dimension": ({"grad_y": torch.zeros(())}, r"needs grad_y \[any\]"),
        "columns first": ({"grad_y": torch.zeros(10, 6).t()}, r"needs grad_y row-major"),
        "other columns": ({"w": torch.zeros(8, 9)}, r"needs w \[any, 10\]"),
        "another depth": ({"a": torch.zeros(7, 4)}, r"needs a \[8, any\]"),
        "another rank": ({"grad_s": torch.zeros(6, 5)}, r"needs grad_s \[6, 4\]"),
        "mixed dtypes": ({"a": A.half()}, r"needs a .*float32.*got .*float16"),
        "no seed": ({"seed": None}, r"needs a seed to drop out with p = 0.5"),
        "p above 1": ({"p": 2.0}, r"needs a dropout probability from 0 to 1; got 2.0"),
        "one adapter, offsets": ({"offsets": torch.tensor([0, 6])}, r"needs a \[1, 8, any\]"),
        "a result of another depth": ({"grad_x": torch.zeros(6, 9)}, r"needs grad_x \[6, 8\]"),
        "overlap": ({"grad_x": W.view(-1)[:48].view(6, 8)}, r"needs grad_x in memory of its own; it overlaps w"),
        "no device": ({}, r"needs tensors on a CUDA device; they are on cpu"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    given: dict[str, Any] = {
        "grad_y": GRAD_Y,
        "w": W,
        "grad_s": GRAD_S,
        "a": A,
        "seed": torch.zeros(1, dtype=torch.int64),
    }
    given |= {"offsets": None, "p": 0.5, "grad_x": torch.zeros(6, 8)}
    with pytest.raises(ExecutionError, match=message):
        KERNEL.launch(**{**given, **changed})


@pytest.mark.parametrize("adapters", [0, 3])
def test_without_dropout_it_is_two_products(adapters: int) -> None:
    given = KERNEL.arguments(torch.float32, tokens=7, depth=33, columns=12, rank=5, adapters=adapters)
    torch.testing.assert_close(KERNEL(*given.values()), KERNEL.eager(**given))


def test_dropout_of_all_leaves_the_base_layer_s_gradient() -> None:
    given = KERNEL.arguments(torch.float32, tokens=7, depth=33, columns=12, rank=5, p=1.0)
    torch.testing.assert_close(KERNEL(*given.values()), given["grad_y"] @ given["w"].t())


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("float16", tokens=3, depth=5, columns=7, rank=2)
    assert plain.flops == 15 * (2 * 7 + 2 * 2)
    assert plain.traffic_bytes == 2 * (21 + 35 + 6 + 10 + 15)
    more = KERNEL.cost("float16", tokens=3, depth=5, columns=7, rank=2, adapters=4, p=0.1)
    assert more.flops == plain.flops + 15
    assert more.traffic_bytes == plain.traffic_bytes + 2 * 3 * 10
