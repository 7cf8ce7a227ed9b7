"""Cases of ``kernels/grouped_linear_scatter.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.grouped_linear_scatter import KERNEL
from tests.kernels.cases._experts import SIZES, SMALL, concentrated, grouped, spread, strided, transposed
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_USUAL = {"tokens": 20, "experts": 5, "top_k": 2, "hidden": 35, "intermediate": 37}


def truth(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    top_k = weights.shape[-1]
    products = grouped(x, weight, ends)
    out = torch.zeros(weights.numel() // top_k, weight.shape[2], dtype=torch.float64)
    for row, assignment in enumerate(order.tolist()):
        out[assignment // top_k] += products[row] * weights.reshape(-1)[assignment].double()
    return (out.view(*weights.shape[:-1], -1) if out.numel() else out,)


def _narrow(given: dict[str, Any]) -> dict[str, Any]:
    """Shares in the dtype of x, tokens in two dimensions."""
    return given | {"weights": given["weights"].to(given["x"].dtype).view(2, 10, 2)}


CASES = Cases(
    KERNEL,
    truth,
    (
        *(Case(sizes) for sizes in SIZES),
        *(Case(_USUAL | {name: 0}) for name in ("tokens", "hidden", "intermediate")),
        Case(_USUAL, SMALL, label="small tiles"),
        Case(
            {"tokens": 3, "experts": 2, "top_k": 2, "hidden": 1030, "intermediate": 4},
            Config({"block_m": 16, "block_n": 512, "block_k": 16, "group_m": 1}),
            label="sums over two blocks",
        ),
        Case(_USUAL, SMALL, spread(0, 17, 0, 23, 0), label="empty experts"),
        Case(_USUAL, SMALL, concentrated, label="all to one expert"),
        Case(_USUAL, SMALL, transposed("weight"), label="transposed"),
        Case(_USUAL, SMALL, strided("weight"), label="strided"),
        Case(_USUAL, SMALL, _narrow, label="narrow shares of tokens in two dimensions"),
        Case(_USUAL, SMALL, lambda given: given | {"order": given["order"].long()}, label="PyTorch's own order"),
    ),
    # Each choice is rounded before they are summed: absolute errors are of the choices, not of their sum.
    tolerance={
        dtype: (rtol, atol if dtype == torch.float32 else rtol * 2) for dtype, (rtol, atol) in FLOAT_TOLERANCE.items()
    },
)
