"""Cases of ``kernels/lora_down.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.lora_down import KERNEL
from tests.kernels.conforming import Case, Cases
from tests.kernels.lora import TOLERANCE, dropped, offsets_are, segments

_SMALL = Config({"block_m": 16, "block_r": 16, "block_k": 16})


def truth(
    x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, offsets: torch.Tensor | None, p: float
) -> tuple[torch.Tensor, ...]:
    wide = dropped(x, p, seed)
    s = torch.zeros(len(wide), a.shape[-1], dtype=torch.float64)
    for adapter, rows in segments(offsets, len(wide)):
        s[rows] = wide[rows] @ (a if offsets is None else a[adapter]).double()
    return (s.view(*x.shape[:-1], a.shape[-1]),)


def _sizes(tokens: int, depth: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "rank": rank, **more}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(5, 67, 3), _SMALL),
        Case(_sizes(1, 1, 1)),
        Case(_sizes(33, 128, 16)),
        Case(_sizes(31, 129, 17, p=0.5)),
        Case(_sizes(32, 32, 20, p=0.9), _SMALL),
        Case(_sizes(17, 35, 4, p=0.25), _SMALL),
        Case(_sizes(4, 40, 4, p=1.0)),
        Case(_sizes(0, 8, 4)),
        Case(_sizes(3, 0, 4)),
        Case(_sizes(3, 8, 0)),
        Case(_sizes(50, 40, 17, adapters=3, p=0.3), _SMALL),
        Case(_sizes(50, 24, 5, adapters=4), _SMALL, offsets_are(3, 20, 20, 21, 41), label="gaps and none"),
        Case(_sizes(40, 24, 5, adapters=3), None, offsets_are(0, 0, 40, 40, kind=torch.int64), label="empty adapters"),
        Case(_sizes(20, 24, 5, adapters=2), _SMALL, offsets_are(-4, 10, 99), label="offsets behind the tokens"),
        Case(_sizes(20, 24, 5, adapters=2), _SMALL, offsets_are(0, 0, 0), label="no token has an adapter"),
        Case(
            _sizes(6, 33, 4, p=0.5),
            change=lambda given: given | {"x": given["x"].view(2, 3, 33), "a": given["a"].contiguous()},
            label="three dimensions",
        ),
        Case(
            _sizes(6, 33, 4),
            change=lambda given: given | {"a": given["a"].repeat(3, 5)[::3, ::5]},
            label="a weight with gaps",
        ),
    ),
    TOLERANCE,
)
