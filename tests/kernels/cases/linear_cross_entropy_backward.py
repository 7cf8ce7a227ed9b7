"""Cases of ``kernels/linear_cross_entropy_backward.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.linear_cross_entropy_backward import KERNEL
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_HIGH = Config({"block_m": 32, "block_n": 16, "block_k": 32, "group_m": 3})
_WIDE = Config({"block_m": 32, "block_n": 128, "block_k": 32, "group_m": 8})
_WIDER = Config({"block_m": 16, "block_n": 512, "block_k": 16, "group_m": 1})  # than a chunk


def truth(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    log_sum_exp: torch.Tensor,
    gradient: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
    needs_dweight: bool,
    scratch_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, by autograd of a loss that has the gradient of cross-entropy for any ``log_sum_exp``.

    Its part that normalises, sum(exp(logits - log_sum_exp)), is log(sum(exp(logits))) up to first order.
    """
    wide, weights = (t.detach().double().requires_grad_() for t in (x, weight))
    rows = wide.reshape(target.numel(), x.shape[-1])
    logits = rows @ weights.T
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    each, given, target = log_sum_exp.double().flatten(), gradient.double().flatten(), target.flatten()
    shares = torch.exp(logits - each[:, None]).sum(-1) * (1 + 2 * z_loss * each)
    known = (target >= 0) & (target < weight.shape[0])
    picked = logits.gather(1, torch.where(known, target, 0)[:, None])[:, 0] if weight.shape[0] else given
    smoothed = (1 - label_smoothing) * picked + label_smoothing * logits.sum(-1) / max(weight.shape[0], 1)
    is_valid = target != ignore_index
    loss = (shares - smoothed)[is_valid] * torch.where(known, given, torch.nan)[is_valid]
    total = loss.sum() + 0 * (rows.sum() + weights.sum())
    dx, dweight = torch.autograd.grad(total, (wide, weights))
    return dx, dweight if needs_dweight else dweight[:0]


def _sizes(tokens: int, depth: int, vocabulary: int, **factors: float) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "vocabulary": vocabulary, **factors}


def _transposed(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].t().contiguous().t()}


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].repeat_interleave(2, 1)[:, ::2]}


def _three_dimensions(given: dict[str, Any]) -> dict[str, Any]:
    flat = {name: given[name].view(2, -1) for name in ("target", "log_sum_exp", "gradient")}
    return given | flat | {"x": given["x"].view(2, -1, given["x"].shape[1])}


def _ignored_and_infinite(given: dict[str, Any]) -> dict[str, Any]:
    """What belongs to ignored targets has no effect, even if it is no number."""
    gradient = given["gradient"].clone()
    gradient[given["target"] == -100] = torch.inf
    return given | {"gradient": gradient}


def _outside(given: dict[str, Any]) -> dict[str, Any]:
    target = given["target"].clone()
    target[2] = given["weight"].shape[0]
    return given | {"target": target}


#: Gradients of logits are rounded to the dtype before they are summed, as are results behind that. They are of the
#: order of 1 at targets, times elements of the other operand of up to 4.
_TOLERANCE = {torch.float32: (4e-6, 6e-6), torch.float16: (2.0**-10, 2.0**-9), torch.bfloat16: (2.0**-7, 2.0**-6)}

CASES = Cases(
    KERNEL,
    truth,
    (
        Case(_sizes(1, 1, 1)),
        Case(_sizes(7, 31, 13, label_smoothing=0.1, z_loss=0.01, soft_cap=2.0), config=_SMALL),
        Case(_sizes(33, 16, 32), config=_SMALL),
        Case(_sizes(17, 53, 37, label_smoothing=0.1), config=_SMALL),
        Case(_sizes(16, 17, 47, z_loss=0.001), config=_HIGH),
        Case(_sizes(34, 24, 65, soft_cap=3.0), config=_HIGH),
        Case(_sizes(37, 33, 513), dtypes=(torch.bfloat16,)),
        Case(_sizes(9, 20, 700, scratch_bytes=0), config=_WIDE),
        Case(_sizes(9, 20, 512, scratch_bytes=2**13), config=_WIDE),
        Case(_sizes(17, 20, 300, needs_dweight=False, scratch_bytes=0), config=_WIDE),
        Case(_sizes(3, 16, 300, scratch_bytes=1), config=_WIDER),
        Case(_sizes(15, 15, 31), config=_SMALL, change=_transposed, label="weight columns first"),
        Case(_sizes(15, 24, 40), config=_SMALL, change=_strided, label="strided weight"),
        Case(_sizes(18, 24, 40), config=_SMALL, change=_three_dimensions, label="three dimensions"),
        Case(_sizes(18, 24, 40), config=_SMALL, change=_ignored_and_infinite, label="infinite where ignored"),
        Case(_sizes(9, 8, 21), config=_SMALL, change=_outside, label="target outside"),
        Case(_sizes(3, 0, 5)),
        Case(_sizes(0, 8, 5)),
        Case(_sizes(3, 8, 0)),
    ),
    _TOLERANCE,
)
