"""Cases of ``kernels/lora_linear.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.lora_linear import KERNEL
from tests.kernels.conforming import Case, Cases
from tests.kernels.lora import TOLERANCE, offsets_are, segments

_SMALL = Config({"block_m": 16, "block_n": 32, "block_k": 16, "block_r": 16, "group_m": 2})


def truth(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    rows, low = x.double().flatten(0, -2), s.double().flatten(0, -2)
    y = torch.einsum("tk,kn->tn", rows, w.double())
    for adapter, own in segments(offsets, len(rows)):
        y[own] += scale * torch.einsum("tr,rn->tn", low[own], (b if offsets is None else b[adapter]).double())
    if bias is not None:
        y += bias.double()
    return (y.view(*x.shape[:-1], w.shape[1]),)


def _sizes(tokens: int, depth: int, columns: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "columns": columns, "rank": rank, **more}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(37, 35, 67, 3, bias=True), _SMALL),
        Case(_sizes(1, 1, 1, 1)),
        Case(
            _sizes(65, 64, 129, 16), Config({"block_m": 64, "block_n": 64, "block_k": 32, "block_r": 16, "group_m": 8})
        ),
        Case(_sizes(16, 32, 32, 64, scale=0.0), _SMALL),
        Case(_sizes(17, 15, 33, 33, scale=-7.0), _SMALL),
        Case(_sizes(130, 65, 257, 40)),
        Case(_sizes(0, 8, 8, 4)),
        Case(_sizes(3, 0, 8, 4, bias=True)),
        Case(_sizes(3, 8, 0, 4)),
        Case(_sizes(3, 8, 8, 0), _SMALL),
        Case(_sizes(50, 24, 40, 17, adapters=3, bias=True), _SMALL),
        Case(_sizes(50, 24, 40, 5, adapters=4), _SMALL, offsets_are(3, 20, 20, 21, 41), label="gaps and none"),
        Case(_sizes(40, 24, 8, 5, adapters=3), None, offsets_are(0, 0, 40, 40), label="empty adapters"),
        Case(_sizes(20, 24, 8, 5, adapters=2), _SMALL, offsets_are(-4, 10, 99), label="offsets behind the tokens"),
        Case(
            _sizes(6, 33, 40, 4, bias=True),
            _SMALL,
            lambda given: (
                given
                | {"x": given["x"].view(2, 3, 33), "s": given["s"].view(2, 3, 4), "w": given["w"].contiguous()}
                | {"b": given["b"].contiguous(), "bias": given["bias"].float().repeat(2)[::2]}
            ),
            label="three dimensions and other strides",
        ),
    ),
    TOLERANCE,
)
