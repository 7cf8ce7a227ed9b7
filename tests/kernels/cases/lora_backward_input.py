"""Cases of ``kernels/lora_backward_input.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels._dropout import mask
from opweave.kernels.lora_backward_input import KERNEL
from tests.kernels.conforming import Case, Cases
from tests.kernels.lora import TOLERANCE, offsets_are, segments

_SMALL = Config({"block_m": 16, "block_n": 32, "block_k": 16, "block_r": 16, "group_m": 2})


def truth(
    grad_y: torch.Tensor,
    w: torch.Tensor,
    grad_s: torch.Tensor,
    a: torch.Tensor,
    seed: torch.Tensor | None,
    offsets: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor, ...]:
    rows, low = grad_y.double().flatten(0, -2), grad_s.double().flatten(0, -2)
    part = torch.zeros(len(rows), w.shape[0], dtype=torch.float64)
    for adapter, own in segments(offsets, len(rows)):
        part[own] = torch.einsum("tr,kr->tk", low[own], (a if offsets is None else a[adapter]).double())
    if p > 0:
        assert seed is not None
        part *= mask(part.shape, p, seed) / max(1 - p, 1e-9) if p < 1 else 0
    total = torch.einsum("tn,kn->tk", rows, w.double()) + part
    return (total.view(*grad_y.shape[:-1], w.shape[0]),)


def _sizes(tokens: int, depth: int, columns: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "columns": columns, "rank": rank, **more}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(37, 67, 35, 3, p=0.5), _SMALL),
        Case(_sizes(1, 1, 1, 1)),
        Case(_sizes(33, 130, 64, 17, p=0.1)),
        Case(_sizes(16, 32, 32, 64), _SMALL),
        Case(_sizes(17, 33, 15, 33, p=0.9), _SMALL),
        Case(_sizes(9, 20, 15, 3, p=1.0), _SMALL),
        Case(_sizes(130, 257, 65, 40, p=0.3)),
        Case(_sizes(0, 8, 8, 4, p=0.3)),
        Case(_sizes(3, 0, 8, 4)),
        Case(_sizes(3, 8, 0, 4)),
        Case(_sizes(3, 8, 8, 0), _SMALL),
        Case(_sizes(50, 40, 24, 17, adapters=3, p=0.3), _SMALL),
        Case(_sizes(50, 40, 24, 5, adapters=4), _SMALL, offsets_are(3, 20, 20, 21, 41), label="gaps and none"),
        Case(
            _sizes(20, 24, 8, 5, adapters=2, p=0.5), _SMALL, offsets_are(-4, 10, 99), label="offsets behind the tokens"
        ),
        Case(
            _sizes(6, 33, 40, 4, p=0.5),
            _SMALL,
            lambda given: (
                given
                | {"grad_y": given["grad_y"].view(2, 3, 40), "grad_s": given["grad_s"].view(2, 3, 4)}
                | {"w": given["w"].contiguous(), "a": given["a"].contiguous()}
            ),
            label="three dimensions and other strides",
        ),
    ),
    TOLERANCE,
)
