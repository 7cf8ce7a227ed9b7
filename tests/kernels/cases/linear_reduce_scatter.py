"""Cases of ``kernels/linear_reduce_scatter.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.linear_reduce_scatter import KERNEL
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_HIGH = Config({"block_m": 32, "block_n": 16, "block_k": 32, "group_m": 3})


def truth(x: torch.Tensor, weight: torch.Tensor, programs: int) -> tuple[torch.Tensor]:
    """Rank by rank; partial products are rounded as they are sent."""
    partials = [torch.einsum("mk,kn->mn", *pair).to(x.dtype) for pair in zip(x.double(), weight.double(), strict=True)]
    total = torch.stack(partials).double().sum(0)
    return (total.view(len(x), x.shape[1] // len(x), weight.shape[2]),)


def _sizes(peers: int, rows: int, depth: int, columns: int, **more: int) -> dict[str, Any]:
    return {"peers": peers, "rows": rows, "depth": depth, "columns": columns, **more}


def _row_major_weight(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].contiguous()}


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].repeat_interleave(2, 2)[:, :, ::2]}


#: A partial product may round to the neighbour of what the truth rounds to; they are of the order of 1.
_TOLERANCE = {torch.float32: (2e-6, 4e-6), torch.float16: (2.0**-10, 2.0**-10), torch.bfloat16: (2.0**-7, 2.0**-7)}

CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1, 1)),
        Case(_sizes(2, 7, 31, 13, programs=1), config=_SMALL),
        Case(_sizes(3, 17, 20, 37, programs=4), config=_SMALL),
        Case(_sizes(2, 16, 16, 16), config=_SMALL),
        Case(_sizes(2, 33, 40, 67, programs=3), config=_HIGH),
        Case(_sizes(8, 3, 24, 18, programs=5)),
        Case(_sizes(2, 15, 15, 31, programs=3), config=_SMALL, change=_row_major_weight, label="row-major weight"),
        Case(_sizes(2, 9, 40, 35), config=_SMALL, change=_strided, label="strided weight"),
        Case(_sizes(2, 3, 0, 5)),
        Case(_sizes(2, 0, 8, 8)),
        Case(_sizes(2, 3, 8, 0)),
    ),
    _TOLERANCE,
)
