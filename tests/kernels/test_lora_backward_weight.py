"""What ``kernels/lora_backward_weight.py`` does besides numerics: refusals, cost, scratch memory, a plain product."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.lora_backward_weight import KERNEL

X, GRAD_S = torch.zeros(6, 8), torch.zeros(6, 4)

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "no dimension": ({"x": torch.zeros(())}, r"needs x \[any\]"),
        "columns first": ({"x": torch.zeros(8, 6).t()}, r"needs x row-major"),
        "fewer tokens": ({"grad_s": torch.zeros(5, 4)}, r"needs grad_s \[6, any\]"),
        "mixed dtypes": ({"grad_s": GRAD_S.half()}, r"needs grad_s .*float32.*got .*float16"),
        "no seed": ({"seed": None}, r"needs a seed to drop out with p = 0.5"),
        "p above 1": ({"p": 2.0}, r"needs a dropout probability from 0 to 1; got 2.0"),
        "offsets of three adapters": ({"offsets": torch.tensor([0, 6, 6, 6])}, r"needs grad_a \[3, 8, 4\]"),
        "offsets in a matrix": ({"offsets": torch.zeros(2, 2).int()}, r"needs offsets \[any\]"),
        "a result of another rank": ({"grad_a": torch.zeros(8, 5)}, r"needs grad_a \[8, 4\]"),
        "little scratch": ({"pieces": torch.zeros(31)}, r"needs pieces of 32 elements; got 31"),
        "overlap": ({"grad_a": X.view(-1)[:32].view(8, 4)}, r"needs grad_a in memory of its own; it overlaps x"),
        "no device": ({}, r"needs tensors on a CUDA device; they are on cpu"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    given = {"x": X, "grad_s": GRAD_S, "seed": torch.zeros(1, dtype=torch.int64), "offsets": None, "p": 0.5}
    given |= {"grad_a": torch.zeros(8, 4), "pieces": torch.zeros(32)}
    with pytest.raises(ExecutionError, match=message):
        KERNEL.launch(**{**given, **changed})


@pytest.mark.parametrize("adapters", [0, 3])
def test_without_dropout_it_is_a_product(adapters: int) -> None:
    given = KERNEL.arguments(torch.float32, tokens=7, depth=33, rank=5, adapters=adapters)
    torch.testing.assert_close(KERNEL(*given.values()), KERNEL.eager(**given))


def test_scratch_memory_is_enough_for_every_configuration() -> None:
    """The launcher itself says how much it needs; on a CPU the device is the next thing it refuses."""
    rows = [row for rows in KERNEL.configs.rows.values() for row in rows]
    for tokens, depth, adapters in ((1, 1, 0), (700, 3, 2), (513, 2049, 0), (300, 1025, 5)):
        given = KERNEL.arguments(torch.bfloat16, "cpu", tokens=tokens, depth=depth, rank=3, adapters=adapters)
        written = dict(zip(KERNEL.written, KERNEL.allocate(*given.values()), strict=True))
        for row in rows:
            with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
                KERNEL.launch(**given, **written, config=row)


def test_cost_is_what_was_counted_by_hand() -> None:
    plain = KERNEL.cost("float16", tokens=3, depth=5, rank=2)
    assert (plain.flops, plain.traffic_bytes) == (2 * 3 * 5 * 2, 2 * (15 + 6 + 10))
    more = KERNEL.cost("float16", tokens=3, depth=5, rank=2, adapters=4, p=0.1)
    assert (more.flops, more.traffic_bytes) == (plain.flops + 40, plain.traffic_bytes + 2 * 30)
