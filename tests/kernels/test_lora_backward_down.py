"""What ``kernels/lora_backward_down.py`` does besides numerics: refusals, cost, scratch memory, PyTorch's gradients."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.lora_backward_down import KERNEL

GRAD_Y, S, B = torch.zeros(6, 10), torch.zeros(6, 4), torch.zeros(4, 10)

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "no dimension": ({"grad_y": torch.zeros(())}, r"needs grad_y \[any\]"),
        "columns first": ({"grad_y": torch.zeros(10, 6).t()}, r"needs grad_y row-major"),
        "other columns": ({"b": torch.zeros(4, 9)}, r"needs b \[any, 10\]"),
        "another rank": ({"s": torch.zeros(6, 5)}, r"needs s \[6, 4\]"),
        "mixed dtypes": ({"b": B.half()}, r"needs b .*float32.*got .*float16"),
        "one adapter, offsets": ({"offsets": torch.tensor([0, 6])}, r"needs b \[1, any, 10\]"),
        "a result of another rank": ({"grad_s": torch.zeros(6, 5)}, r"needs grad_s \[6, 4\]"),
        "a result columns first": ({"grad_b": torch.zeros(10, 4).t()}, r"needs grad_b row-major"),
        "little scratch": ({"pieces": torch.zeros(63)}, r"needs pieces of 64 elements; got 63"),
        "narrow scratch": ({"pieces": torch.zeros(64).half()}, r"needs pieces \[any\] of float32"),
        "overlap": ({"grad_s": S}, r"needs grad_s in memory of its own; it overlaps s"),
        "no device": ({}, r"needs tensors on a CUDA device; they are on cpu"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    given = {"grad_y": GRAD_Y, "s": S, "b": B, "offsets": None, "scale": 2.0, "grad_s": torch.zeros(6, 4)}
    given |= {"grad_b": torch.zeros(4, 10), "pieces": torch.zeros(64)}
    with pytest.raises(ExecutionError, match=message):
        KERNEL.launch(**{**given, **changed})


@pytest.mark.parametrize("adapters", [0, 3])
def test_it_is_two_products(adapters: int) -> None:
    given = KERNEL.arguments(torch.float32, tokens=7, columns=33, rank=5, adapters=adapters)
    for one, other in zip(KERNEL(*given.values()), KERNEL.eager(**given), strict=True):
        torch.testing.assert_close(one, other)


def test_scratch_memory_is_enough_for_every_configuration() -> None:
    """The launcher itself says how much it needs; on a CPU the device is the next thing it refuses."""
    rows = [row for rows in KERNEL.configs.rows.values() for row in rows]
    for tokens, columns, adapters in ((1, 1, 0), (700, 3, 2), (513, 2049, 0), (300, 1025, 5)):
        given = KERNEL.arguments(torch.bfloat16, "cpu", tokens=tokens, columns=columns, rank=3, adapters=adapters)
        written = dict(zip(KERNEL.written, KERNEL.allocate(*given.values()), strict=True))
        for row in rows:
            with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
                KERNEL.launch(**given, **written, config=row)


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("float16", tokens=3, columns=5, rank=2)
    assert plain.flops == 2 * (2 * 3 * 5 * 2) + 6 + 10
    assert plain.traffic_bytes == 2 * (15 + 6 + 10 + 6 + 10)
    more = KERNEL.cost("float16", tokens=3, columns=5, rank=2, adapters=4)
    assert more.flops == plain.flops + 30
    assert more.traffic_bytes == plain.traffic_bytes + 2 * 2 * 30
