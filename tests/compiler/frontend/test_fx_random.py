"""Random programs of views, copies and in-place writes over shared memory: the graph leaves what eager leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.frontend.eager_check import check

VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t[1:],
    lambda t: t[..., ::2],
    lambda t: t[..., 0],
    lambda t: t.transpose(0, -1),
    lambda t: t.unsqueeze(0),
    lambda t: t.chunk(2, -1)[0],
    lambda t: t.detach(),
]
MAYBE_COPIES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.reshape(-1),
    lambda t: t.contiguous(),
    lambda t: t.flatten(),
    lambda t: t.clone(),
    lambda t: t * 2,
    lambda t: t.to(torch.int16),
    lambda t: t + t.sum(),
]
WRITES: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda t, other: t.mul_(3),
    lambda t, other: t.add_(other.sum()),
    lambda t, other: t.fill_(7),
    lambda t, other: t.copy_(other.sum() % 100),
    lambda t, other: t.clamp_(max=5),
    lambda t, other: t.neg_(),
]
STEPS = st.lists(
    st.tuples(st.sampled_from([*VIEWS, *MAYBE_COPIES, *WRITES, *WRITES]), st.integers(0, 99), st.integers(0, 99)),
    min_size=1,
    max_size=10,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(STEPS)
def test_shared_memory_is_followed(steps: list[tuple[Any, int, int]]) -> None:
    """Each step takes one or two of the tensors made so far; all of them are returned, so every alias is looked at."""

    def forward(m: Any, x: torch.Tensor) -> list[torch.Tensor]:
        pool = [x, m.held]
        for step, first, second in steps:
            operand, other = pool[first % len(pool)], pool[second % len(pool)]
            if step in WRITES:
                step(operand, other)
            elif operand.dim() and operand.numel() > 1:
                pool.append(step(operand))
        return [tensor for tensor in pool if tensor.numel()]

    held = torch.arange(6, dtype=torch.int64).reshape(2, 3)
    check(forward, torch.arange(12, dtype=torch.int64).reshape(3, 4), sources={"held": held})
