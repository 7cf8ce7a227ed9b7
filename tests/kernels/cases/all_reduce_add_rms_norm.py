"""Cases of ``kernels/all_reduce_add_rms_norm.py``."""

from __future__ import annotations

import torch

from opweave.kernels._configs import Config
from opweave.kernels.all_reduce_add_rms_norm import KERNEL
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block": 32}, num_warps=1)


def truth(
    partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, programs: int
) -> tuple[torch.Tensor, ...]:
    hidden = (partials.double().sum(0).to(residual.dtype) + residual).double()
    return hidden, hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight.double()


def sizes(peers: int, rows: int, columns: int, programs: int = 8) -> dict[str, int]:
    return {"peers": peers, "rows": rows, "columns": columns, "programs": programs}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(sizes(1, 1, 1)),
        Case(sizes(1, 7, 31)),
        Case(sizes(2, 5, 257, 3)),
        Case(sizes(3, 7, 1024, 2)),
        Case(sizes(8, 3, 1021, 1)),
        Case(sizes(4, 2, 4096)),
        Case(sizes(2, 1, 8197)),
        Case(sizes(2, 5, 32, 2), _SMALL),
        Case(sizes(3, 5, 33, 2), _SMALL),
        Case(sizes(5, 3, 101, 1), _SMALL),
        Case(sizes(2, 0, 8)),
        Case(sizes(2, 3, 0)),
        Case({**sizes(2, 5, 257), "weight_dtype": "float32"}),
        Case(
            sizes(2, 6, 33),
            change=lambda given: (
                given | {"partials": given["partials"].view(2, 2, 3, 33), "residual": given["residual"].view(2, 3, 33)}
            ),
            label="three dimensions",
        ),
    ),
)
