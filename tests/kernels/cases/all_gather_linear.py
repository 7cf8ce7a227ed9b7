"""Cases of ``kernels/all_gather_linear.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.all_gather_linear import KERNEL
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_HIGH = Config({"block_m": 32, "block_n": 16, "block_k": 32, "group_m": 3})


def truth(x: torch.Tensor, weight: torch.Tensor, rank: int, programs: int) -> tuple[torch.Tensor]:
    return (torch.cat([torch.einsum("mk,kn->mn", one.double(), weight.double()) for one in x]),)


def _sizes(peers: int, rows: int, depth: int, columns: int, **more: int) -> dict[str, Any]:
    return {"peers": peers, "rows": rows, "depth": depth, "columns": columns, **more}


def _row_major_weight(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].contiguous()}


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].repeat_interleave(2, 1)[:, ::2]}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1, 1)),
        Case(_sizes(2, 7, 31, 13, rank=1, programs=1), config=_SMALL),
        Case(_sizes(3, 17, 20, 37, rank=2, programs=4), config=_SMALL),
        Case(_sizes(4, 16, 16, 16, rank=1), config=_SMALL),
        Case(_sizes(2, 33, 40, 35, programs=3), config=_HIGH),
        Case(_sizes(8, 5, 24, 18, rank=7, programs=5)),
        Case(_sizes(2, 15, 15, 31, programs=3), config=_SMALL, change=_row_major_weight, label="row-major weight"),
        Case(_sizes(2, 19, 40, 35), config=_SMALL, change=_strided, label="strided weight"),
        Case(_sizes(2, 3, 0, 5)),
        Case(_sizes(2, 0, 8, 8)),
        Case(_sizes(2, 3, 8, 0)),
    ),
    {**FLOAT_TOLERANCE, torch.float32: (2e-6, 4e-6)},
)
