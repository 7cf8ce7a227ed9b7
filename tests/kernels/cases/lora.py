"""Cases of ``kernels/lora.py``: both launches one after the other. Each has more of its own."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.lora import KERNEL
from tests.kernels.conforming import Case, Cases
from tests.kernels.lora import TOLERANCE, dropped, offsets_are, segments

_SMALL = Config({"block_m": 16, "block_n": 32, "block_k": 16, "block_r": 16, "group_m": 2})


def truth(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    offsets: torch.Tensor | None,
    scale: float,
    p: float,
) -> tuple[torch.Tensor, ...]:
    wide = dropped(x, p, seed)
    s = torch.zeros(len(wide), a.shape[-1], dtype=torch.float64)
    y = x.double().flatten(0, -2) @ w.double()
    for adapter, own in segments(offsets, len(wide)):
        down, up = (a, b) if offsets is None else (a[adapter], b[adapter])
        s[own] = (wide[own] @ down.double()).to(x.dtype).double()  # rounded as it is written between the launches
        y[own] += scale * (s[own] @ up.double())
    return y if bias is None else y + bias.double(), s


def _sizes(tokens: int, depth: int, columns: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "columns": columns, "rank": rank, **more}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(37, 35, 67, 3, bias=True, p=0.3), _SMALL),
        Case(_sizes(1, 1, 1, 1)),
        Case(_sizes(65, 130, 129, 17, p=0.1)),
        Case(_sizes(0, 8, 8, 4)),
        Case(_sizes(50, 24, 40, 17, adapters=3, p=0.5), _SMALL),
        Case(_sizes(50, 24, 40, 5, adapters=4), _SMALL, offsets_are(3, 20, 20, 21, 41), label="gaps and none"),
    ),
    TOLERANCE,
)
