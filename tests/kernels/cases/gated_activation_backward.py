"""Cases of ``kernels/gated_activation_backward.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.gated_activation_backward import KERNEL
from tests.kernels.cases.linear_epilogue import activated
from tests.kernels.conforming import FLOAT_TOLERANCE, Case, Cases

_SMALL = Config({"block": 64})


def truth(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, activation: str, with_product: bool
) -> tuple[torch.Tensor, ...]:
    """By autograd of the formula, in float64."""
    with torch.enable_grad():
        wide_gate, wide_up = (t.double().requires_grad_() for t in (gate, up))
        product = activated(wide_gate, activation) * wide_up
        gate_gradient, up_gradient = torch.autograd.grad(product, (wide_gate, wide_up), gradient.double())
    return gate_gradient, up_gradient, product.detach() if with_product else product.new_empty(0)


def _sizes(rows: int, columns: int, activation: str, *, with_product: bool = True) -> dict[str, Any]:
    return {"rows": rows, "columns": columns, "activation": activation, "with_product": with_product}


def _extreme(given: dict[str, Any]) -> dict[str, Any]:
    """Where activations are flat, and at zero, where only ReLU has a corner."""
    gate = torch.tensor([-60.0, -30.0, -9.0, -3.0, -1e-6, 1e-6, 3.0, 9.0, 30.0, 60.0])
    return given | {"gate": gate.repeat(3, 1).to(given["gate"].dtype)}


CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, "silu")),
        *(Case(_sizes(7, 67, activation), config=_SMALL) for activation in ("silu", "gelu", "gelu_tanh", "relu")),
        Case(_sizes(4, 16, "silu", with_product=False), config=_SMALL),
        Case(_sizes(1, 2049, "gelu_tanh", with_product=False)),
        Case(_sizes(3, 683, "relu")),
        *(
            Case(_sizes(3, 10, activation), change=_extreme, label=f"extreme {activation}")
            for activation in ("silu", "gelu", "gelu_tanh", "relu")
        ),
        Case(
            _sizes(6, 11, "gelu"),
            change=lambda given: given | {n: given[n].view(2, 3, 11) for n in ("gate", "up", "gradient")},
            label="three dimensions",
        ),
        Case(_sizes(0, 8, "silu")),
        Case(_sizes(8, 0, "silu")),
    ),
    # The tails of a derivative cancel in float32: errors there are those of its largest terms.
    {**FLOAT_TOLERANCE, torch.float32: (4e-6, 2e-6)},
)
