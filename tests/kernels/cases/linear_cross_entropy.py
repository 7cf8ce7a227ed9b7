"""Cases of ``kernels/linear_cross_entropy.py``."""

from __future__ import annotations

from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.linear_cross_entropy import KERNEL
from tests.kernels.conforming import Case, Cases

_SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2})
_HIGH = Config({"block_m": 32, "block_n": 16, "block_k": 32, "group_m": 3})
_WIDE = Config({"block_m": 16, "block_n": 128, "block_k": 32, "group_m": 8})


def truth(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float,
) -> tuple[torch.Tensor, ...]:
    """PyTorch's own cross-entropy, in float64; a target outside the vocabulary, which that refuses, gives NaN."""
    logits = torch.einsum("...k,vk->...v", x.double(), weight.double()).reshape(target.numel(), weight.shape[0])
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    known = ((target >= 0) & (target < weight.shape[0]) | (target == ignore_index)).flatten()
    losses = torch.nn.functional.cross_entropy(
        logits,
        torch.where(known, target.flatten(), ignore_index),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    log_sum_exp = torch.logsumexp(logits, -1)
    counts = target.flatten() != ignore_index
    losses = torch.where(counts, losses + z_loss * log_sum_exp**2, 0.0)
    losses = torch.where(known, losses, torch.nan)
    return losses.sum() / counts.sum(), losses.view(target.shape), log_sum_exp.view(target.shape)


def _sizes(tokens: int, depth: int, vocabulary: int, **factors: float) -> dict[str, Any]:
    return {"tokens": tokens, "depth": depth, "vocabulary": vocabulary, **factors}


def _transposed(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].t().contiguous().t()}


def _strided(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"weight": given["weight"].repeat_interleave(2, 1)[:, ::2]}


def _three_dimensions(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"x": given["x"].view(2, -1, given["x"].shape[1]), "target": given["target"].view(2, -1)}


def _one_row(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"x": given["x"][0], "target": given["target"][0]}


def _all_ignored(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"target": torch.full_like(given["target"], 3), "ignore_index": 3}


def _outside(given: dict[str, Any]) -> dict[str, Any]:
    """One behind the vocabulary, in the last tile and far away; one before it."""
    target = given["target"].clone()
    vocabulary = given["weight"].shape[0]
    target[:4] = torch.tensor([vocabulary, vocabulary + 2**40, -1, vocabulary - 1])
    return given | {"target": target}


def _unlikely(given: dict[str, Any]) -> dict[str, Any]:
    """Logits of up to 100, all negative in some rows: exponentials must be of differences."""
    x = given["x"].clone()
    x[:, 0] = torch.linspace(-100, 100, len(x)).to(x.dtype)
    weight = given["weight"].clone()
    weight[:, 0] = 1
    return given | {"x": x, "weight": weight}


#: float32 results of float32 sums, for all dtypes: operands are what they are. Losses are differences of logits and
#: their log-sum-exp, so errors are absolute: float32 tells logits of 100 apart by 8e-6.
_TOLERANCE = dict.fromkeys(KERNEL.dtypes, (4e-6, 2e-5))

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
        Case(_sizes(5, 20, 1025, label_smoothing=0.2), config=_WIDE),
        Case(_sizes(19, 33, 2111), config=_WIDE),
        Case(_sizes(67, 16, 2 * 1024), dtypes=(torch.bfloat16,)),
        Case(
            _sizes(3, 4, 33 * 1024 + 5),
            dtypes=(torch.float32,),
            config=Config({"block_m": 16, "block_n": 512, "block_k": 16, "group_m": 8}),
        ),
        Case(_sizes(15, 15, 31), config=_SMALL, change=_transposed, label="weight columns first"),
        Case(_sizes(15, 24, 40), config=_SMALL, change=_strided, label="strided weight"),
        Case(_sizes(18, 24, 40), config=_SMALL, change=_three_dimensions, label="three dimensions"),
        Case(_sizes(1, 24, 40), config=_SMALL, change=_one_row, label="one dimension"),
        Case(_sizes(9, 8, 21), config=_SMALL, change=_all_ignored, label="all ignored"),
        Case(_sizes(9, 8, 21, label_smoothing=0.1), config=_SMALL, change=_outside, label="targets outside"),
        Case(_sizes(18, 8, 40), dtypes=(torch.float32,), config=_SMALL, change=_unlikely, label="large logits"),
        Case(_sizes(3, 0, 5)),
        Case(_sizes(0, 8, 5)),
    ),
    _TOLERANCE,
)
