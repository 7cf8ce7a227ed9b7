"""Cases of ``kernels/grouped_linear_weight_gradient.py``."""

from __future__ import annotations

import torch

from opweave.kernels.grouped_linear_weight_gradient import KERNEL
from tests.kernels.cases._experts import SIZES, SMALL, concentrated, row_ranges, spread
from tests.kernels.conforming import Case, Cases

_USUAL = {"tokens": 20, "experts": 5, "top_k": 2, "hidden": 35, "intermediate": 37}


def truth(x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.stack([x[a:b].double().t() @ gradient[a:b].double() for a, b in row_ranges(ends)]),)


CASES = Cases(
    KERNEL,
    truth,
    (
        *(Case(sizes) for sizes in SIZES),
        *(Case(_USUAL | {name: 0}) for name in ("tokens", "hidden", "intermediate")),
        Case(_USUAL, SMALL, label="small tiles"),
        Case(_USUAL, SMALL, spread(0, 17, 0, 23, 0), label="empty experts"),
        Case(_USUAL, SMALL, spread(1, 15, 0, 16, 6), label="rows behind the last expert's"),
        Case(_USUAL, SMALL, concentrated, label="all to one expert"),
    ),
)
