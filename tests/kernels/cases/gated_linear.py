"""Cases of ``kernels/gated_linear.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.gated_linear import KERNEL
from tests.kernels.cases.linear_epilogue import activated
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_WIDE = Config({"block_m": 16, "block_n": 64, "block_k": 32, "group_m": 3})


def truth(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> tuple[torch.Tensor]:
    opened, passed = (torch.einsum("...k,kn->...n", x.double(), weight.double()) for weight in (gate, up))
    return (activated(opened, activation) * passed,)


def _sizes(rows: int, depth: int, columns: int, activation: str = "silu", **more: bool) -> dict[str, Any]:
    return {"rows": rows, "depth": depth, "columns": columns, "activation": activation, **more}


def _different_strides(given: dict[str, Any]) -> dict[str, Any]:
    """One weight row-major, the other every second row of a longer one."""
    up = given["up"].repeat_interleave(2, 0)[::2]
    return given | {"gate": given["gate"].contiguous(), "up": up}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1)),
        Case(_sizes(7, 31, 13, "gelu")),
        Case(_sizes(17, 53, 37, "silu", packed=True), config=_SMALL),
        Case(_sizes(16, 16, 16, "relu"), config=_SMALL),
        Case(_sizes(33, 48, 32, "gelu_tanh"), config=_SMALL),
        Case(_sizes(101, 33, 31, "gelu", packed=True), config=_WIDE),
        Case(_sizes(15, 15, 65, "silu"), config=_WIDE),
        Case(_sizes(34, 257, 130, "gelu_tanh", packed=True)),
        Case(_sizes(70, 64, 48, "silu")),
        Case(_sizes(19, 40, 35, "relu"), config=_SMALL, change=_different_strides, label="different strides"),
        Case(
            _sizes(22, 24, 17, "gelu"),
            config=_SMALL,
            change=lambda given: given | {"x": given["x"].view(2, 11, 24)},
            label="three dimensions",
        ),
        Case(_sizes(3, 0, 5)),
        Case(_sizes(0, 8, 8)),
        Case(_sizes(3, 8, 0)),
    ),
    # Sums of some hundred products, of which float32 rounds each, times another.
    {**FLOAT_TOLERANCE, torch.float32: (2e-6, 6e-6)},
)
