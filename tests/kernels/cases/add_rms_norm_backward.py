"""Cases of ``kernels/add_rms_norm_backward.py``."""

from __future__ import annotations

import torch

from opweave.kernels._configs import Config
from opweave.kernels.add_rms_norm_backward import KERNEL
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_SMALL = Config({"block": 32}, num_warps=1)


def truth(
    out_gradient: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, ...]:
    """What autograd makes of PyTorch's normalisation in float64."""
    wide, factor = hidden.double().requires_grad_(), weight.double().requires_grad_()
    out = torch.nn.functional.rms_norm(wide, wide.shape[-1:], factor, epsilon)
    gradient, weight_gradient = torch.autograd.grad(out, (wide, factor), out_gradient.double())
    return gradient if hidden_gradient is None else gradient + hidden_gradient.double(), weight_gradient


CASES = Cases(
    KERNEL,
    truth,
    (
        *(
            Case({"rows": rows, "columns": columns})
            for rows, columns in ((1, 1), (7, 1), (3, 31), (5, 257), (6, 256), (2, 1021), (2, 4096))
        ),
        *(Case({"rows": rows, "columns": columns}, _SMALL) for rows, columns in ((3, 31), (5, 32), (4, 33), (3, 101))),
        Case({"rows": 2, "columns": 8209}, dtypes=(torch.bfloat16,)),
        # More rows than programs: some have one row more than others.
        Case({"rows": 264 + 2, "columns": 5}, _SMALL, dtypes=(torch.float32,)),
        Case(
            {"rows": 264 + 2, "columns": 5},
            Config({"block": 4}, num_warps=1),
            dtypes=(torch.float32,),
            label="266-5 in blocks",
        ),
        Case({"rows": 5, "columns": 67, "hidden_gradient": False}),
        Case({"rows": 5, "columns": 67, "hidden_gradient": False}, _SMALL, label="5-67-False in blocks"),
        Case({"rows": 0, "columns": 8}),
        Case({"rows": 3, "columns": 0}),
        Case({"rows": 5, "columns": 257, "weight_dtype": "float32"}),
        Case(
            {"rows": 6, "columns": 33},
            change=lambda given: (
                given | {n: given[n].view(2, 3, 33) for n in ("out_gradient", "hidden_gradient", "hidden")}
            ),
            label="three dimensions",
        ),
    ),
    {**FLOAT_TOLERANCE, torch.float32: (4e-6, 4e-6)},  # sums over many rows cancel
)
