"""Cases of ``kernels/lora_backward_down.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.lora_backward_down import KERNEL
from tests.kernels.conforming import Case, Cases
from tests.kernels.lora import TOLERANCE, offsets_are, segments

#: As wide as the shipped tiles, for which scratch memory is allocated, but of fewer tokens.
_SMALL = Config({"block_m": 16, "block_n": 512, "block_r": 16})


def truth(
    grad_y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, ...]:
    rows, low = grad_y.double().flatten(0, -2), s.double().flatten(0, -2)
    grad_s, grad_b = torch.zeros_like(low), torch.zeros(b.shape, dtype=torch.float64)
    for adapter, own in segments(offsets, len(rows)):
        matrix, result = (b, grad_b) if offsets is None else (b[adapter], grad_b[adapter])
        grad_s[own] = scale * torch.einsum("tn,rn->tr", rows[own], matrix.double())
        result += scale * torch.einsum("tr,tn->rn", low[own], rows[own])
    return grad_s.view(s.shape), grad_b


def _sizes(tokens: int, columns: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "columns": columns, "rank": rank, **more}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(37, 67, 3), _SMALL),
        Case(_sizes(1, 1, 1)),
        Case(_sizes(65, 130, 64)),
        Case(_sizes(300, 513, 16)),
        Case(_sizes(270, 1030, 17), _SMALL, dtypes=(torch.bfloat16,)),
        Case(_sizes(40, 20, 80, scale=-2.0)),
        Case(_sizes(0, 8, 4)),
        Case(_sizes(3, 0, 4)),
        Case(_sizes(3, 8, 0)),
        Case(_sizes(50, 40, 17, adapters=3), _SMALL),
        Case(_sizes(400, 40, 5, adapters=4), None, offsets_are(3, 20, 20, 31, 391), label="gaps and none"),
        Case(_sizes(20, 24, 5, adapters=2), _SMALL, offsets_are(-4, 10, 99), label="offsets behind the tokens"),
        Case(_sizes(20, 24, 5, adapters=2), _SMALL, offsets_are(7, 7, 7), label="no token has an adapter"),
        Case(
            _sizes(6, 33, 4),
            _SMALL,
            lambda given: (
                given
                | {
                    "grad_y": given["grad_y"].view(2, 3, 33),
                    "s": given["s"].view(2, 3, 4),
                    "b": given["b"].contiguous(),
                }
            ),
            label="three dimensions and other strides",
        ),
    ),
    TOLERANCE,
)
