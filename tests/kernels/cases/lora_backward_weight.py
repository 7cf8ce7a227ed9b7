"""Cases of ``kernels/lora_backward_weight.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.lora_backward_weight import KERNEL
from tests.kernels.conforming import Case, Cases
from tests.kernels.lora import TOLERANCE, dropped, offsets_are, segments

_SMALL = Config({"block_m": 16, "block_k": 128, "block_r": 16})


def truth(
    x: torch.Tensor, grad_s: torch.Tensor, seed: torch.Tensor | None, offsets: torch.Tensor | None, p: float
) -> tuple[torch.Tensor, ...]:
    wide, low = dropped(x, p, seed), grad_s.double().flatten(0, -2)
    grads = [torch.einsum("tk,tr->kr", wide[own], low[own]) for _, own in segments(offsets, len(wide))]
    return (grads[0] if offsets is None else torch.stack(grads),)


def _sizes(tokens: int, depth: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "rank": rank, **more}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(37, 67, 3, p=0.5), _SMALL),
        Case(_sizes(1, 1, 1)),
        Case(_sizes(65, 129, 64, p=0.1)),
        Case(_sizes(300, 130, 16)),
        Case(_sizes(270, 40, 17, p=0.9), _SMALL),
        Case(_sizes(40, 20, 80, p=1.0)),
        Case(_sizes(0, 8, 4)),
        Case(_sizes(3, 0, 4)),
        Case(_sizes(3, 8, 0)),
        Case(_sizes(50, 40, 17, adapters=3, p=0.3), _SMALL),
        Case(_sizes(400, 40, 5, adapters=4), None, offsets_are(3, 20, 20, 31, 391), label="gaps and none"),
        Case(_sizes(20, 24, 5, adapters=2, p=0.5), _SMALL, offsets_are(-4, 10, 99), label="offsets behind the tokens"),
        Case(
            _sizes(6, 33, 4, p=0.5),
            _SMALL,
            lambda given: given | {"x": given["x"].view(2, 3, 33), "grad_s": given["grad_s"].view(2, 3, 4)},
            label="three dimensions",
        ),
    ),
    TOLERANCE,
)
