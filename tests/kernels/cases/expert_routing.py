"""Cases of ``kernels/expert_routing.py``."""

from __future__ import annotations

import math
from typing import Any

import torch

from opweave.kernels._configs import Config
from opweave.kernels.expert_routing import KERNEL
from tests.kernels.conforming import Case, Cases

#: Tokens, experts, top_k. Sixteen tokens are a block.
_SIZES = (
    (1, 1, 1), (1, 2, 2), (3, 7, 5), (15, 8, 2), (16, 8, 2), (17, 8, 2), (50, 13, 3), (37, 128, 8), (64, 4, 1),
    (33, 61, 6), (5, 8, 8), (200, 3, 2), (2, 509, 10),
)  # fmt: skip
#: Two blocks of tokens at a time, so that a sum goes over several steps and several programs.
_SMALL = Config({"block_rows": 2, "block_columns": 4}, num_warps=1)


def truth(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, ...]:
    rows = logits.reshape(-1, logits.shape[-1]).double()
    experts = rows.shape[1]
    indices = torch.zeros(len(rows), top_k, dtype=torch.int64)
    assigned: list[list[int]] = [[] for _ in range(experts)]
    for token, row in enumerate(rows.tolist()):
        ranked = [(-math.inf if math.isnan(value) else -value, expert) for expert, value in enumerate(row)]
        chosen = [expert for _, expert in sorted(ranked)][:top_k]
        indices[token] = torch.tensor(chosen)
        for choice, expert in enumerate(chosen):
            assigned[expert].append(token * top_k + choice)
    shares = rows.exp().gather(1, indices) / rows.exp().sum(1, keepdim=True)
    if normalize:
        shares = shares / shares.sum(1, keepdim=True)
    ends = torch.tensor([sum(map(len, assigned[: expert + 1])) for expert in range(experts)])
    order = [assignment for of_expert in assigned for assignment in of_expert]
    shape = (*logits.shape[:-1], top_k)
    return shares.view(shape), indices.view(shape), torch.tensor(order, dtype=torch.int64), ends


def _ties(given: dict[str, Any]) -> dict[str, Any]:
    """Few distinct values, zeros of both signs among them."""
    logits = (given["logits"].float() * 2).round().clamp(-1, 1)
    return given | {"logits": logits.to(given["logits"].dtype)}


def _masked(given: dict[str, Any]) -> dict[str, Any]:
    """Experts that cannot be chosen, too many for the last tokens, and one token of which nothing is known."""
    logits = given["logits"].clone()
    logits[:, 1:3] = -math.inf
    logits[-3:, 2:] = -math.inf
    logits[4, 5] = math.nan
    return given | {"logits": logits}


def _one_expert(given: dict[str, Any]) -> dict[str, Any]:
    logits = given["logits"].clone()
    logits[:, 3] = 20
    return given | {"logits": logits}


CASES = Cases(
    KERNEL,
    truth,
    (
        *(Case({"tokens": t, "experts": e, "top_k": k}) for t, e, k in _SIZES),
        Case({"tokens": 90, "experts": 11, "top_k": 3}, _SMALL, label="sums in steps"),
        Case({"tokens": 23, "experts": 10, "top_k": 4, "normalize": False}),
        Case({"tokens": 40, "experts": 9, "top_k": 4}, change=_ties, label="ties"),
        Case({"tokens": 35, "experts": 6, "top_k": 1}, change=_one_expert, label="all to one expert"),
        Case({"tokens": 20, "experts": 6, "top_k": 3}, change=_masked, label="masked experts"),
        Case({"tokens": 0, "experts": 8, "top_k": 2}),
        Case(
            {"tokens": 18, "experts": 8, "top_k": 2},
            change=lambda given: given | {"logits": given["logits"].view(2, 9, 8)},
            label="three dimensions",
        ),
    ),
)
