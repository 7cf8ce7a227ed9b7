"""Cases of ``kernels/grouped_gated_linear.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from opweave.kernels.grouped_gated_linear import KERNEL
from tests.kernels.cases._experts import SIZES, SMALL, concentrated, grouped, spread, strided, transposed
from tests.kernels.conforming import Case, Cases

_USUAL = {"tokens": 20, "experts": 5, "top_k": 2, "hidden": 35, "intermediate": 37}


def truth(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    rows = [x.reshape(len(order) // top_k, x.shape[-1])[assignment // top_k] for assignment in order.tolist()]
    gathered = torch.stack(rows) if rows else x.new_zeros(0, x.shape[-1])
    gate, up = grouped(gathered, gate_weight, ends), grouped(gathered, up_weight, ends)
    if activation == "silu":
        return (gate / (1 + torch.exp(-gate)) * up,)
    if activation == "relu":
        return (gate.clamp(min=0) * up,)
    return (functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up,)


def _two_leading(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"x": given["x"].view(4, 5, -1)}


def _one_of_each(given: dict[str, Any]) -> dict[str, Any]:
    """Halves of one weight that lies transposed, as Mixtral's and Qwen's checkpoints have it."""
    both = torch.cat([given["gate_weight"], given["up_weight"]], 2).transpose(1, 2).contiguous()
    gate, up = both.transpose(1, 2).chunk(2, dim=2)
    return given | {"gate_weight": gate, "up_weight": up}


CASES = Cases(
    KERNEL,
    truth,
    (
        *(Case(sizes) for sizes in SIZES),
        *(Case(_USUAL | {name: 0}) for name in ("tokens", "hidden", "intermediate")),
        *(Case(_USUAL | {"activation": name}) for name in ("gelu", "gelu_tanh", "relu")),
        Case(_USUAL, SMALL, label="small tiles"),
        Case(_USUAL, SMALL, spread(0, 17, 0, 23, 0), label="empty experts"),
        Case(_USUAL, SMALL, concentrated, label="all to one expert"),
        Case(_USUAL, SMALL, transposed("gate_weight"), label="one transposed"),
        Case(_USUAL, SMALL, _one_of_each, label="halves of one weight"),
        Case(_USUAL, SMALL, strided("gate_weight"), label="one strided"),
        Case(_USUAL, SMALL, strided("up_weight"), label="the other strided"),
        Case(_USUAL, SMALL, _two_leading, label="three dimensions"),
        Case(_USUAL, SMALL, lambda given: given | {"order": given["order"].long()}, label="PyTorch's own order"),
    ),
)
