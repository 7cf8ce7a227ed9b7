"""Cases of ``kernels/add_layer_norm.py``."""

from __future__ import annotations

import torch

from opweave.kernels.add_layer_norm import KERNEL
from tests.kernels.conforming import Case, Cases

#: Leading dimensions and columns: one element, primes, full blocks, one less and more, a row walked in several blocks.
_SIZES = ((1, 1), (7, 1), (1, 31), (5, 257), (6, 256), (4, 1021), (2, 1025), (3, 4096), (1, 16384), (2, 16411))


def truth(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, ...]:
    hidden = (x + residual).double()
    normalized = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], weight.double(), bias.double(), epsilon)
    return hidden, normalized


CASES = Cases(
    KERNEL,
    truth,
    (
        *(Case({"rows": rows, "columns": columns}) for rows, columns in _SIZES),
        Case({"rows": 0, "columns": 8}),
        Case({"rows": 3, "columns": 0}),
        Case({"rows": 5, "columns": 257, "weight_dtype": "float32"}),
        Case(
            {"rows": 6, "columns": 33},
            change=lambda given: given | {name: given[name].view(2, 3, 33) for name in ("x", "residual")},
            label="three dimensions",
        ),
    ),
)
