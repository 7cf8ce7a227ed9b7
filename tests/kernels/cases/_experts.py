"""What the cases of kernels over rows sorted by expert share: sizes, spreads of rows and a product in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opweave.kernels._configs import Config

__all__ = ["SIZES", "SMALL", "concentrated", "grouped", "row_ranges", "spread", "strided", "transposed"]

#: Three tiles or so an expert, several along every dimension, a band that is not full.
SMALL = Config({"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2}, num_warps=1)


def _sizes(tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> dict[str, int]:
    return {"tokens": tokens, "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}


#: One element; primes; full tiles, one less and more; as many experts as assignments; more experts than those.
SIZES = (
    _sizes(1, 1, 1, 1, 1), _sizes(7, 3, 2, 13, 5), _sizes(16, 4, 2, 64, 64), _sizes(33, 3, 1, 65, 63),
    _sizes(5, 8, 8, 17, 30), _sizes(2, 13, 4, 31, 67), _sizes(130, 2, 1, 33, 20),
)  # fmt: skip


def row_ranges(ends: torch.Tensor) -> list[tuple[int, int]]:
    """First row and the row behind the last, of each expert."""
    return list(zip([0, *ends.tolist()], ends.tolist(), strict=False))


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """In float64, each expert's rows times its weight."""
    parts = [x[a:b].double() @ weight[expert].double() for expert, (a, b) in enumerate(row_ranges(ends))]
    return torch.cat(parts)


def spread(*counts: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Gives each expert so many rows."""
    return lambda given: given | {"ends": torch.tensor(counts).cumsum(0).int()}


def concentrated(given: dict[str, Any]) -> dict[str, Any]:
    """All rows go to the last but one expert."""
    ends = torch.zeros_like(given["ends"])
    ends[-2:] = given["ends"][-1]
    return given | {"ends": ends}


def transposed(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Weights that lie with their last two dimensions swapped."""
    return lambda given: given | {n: given[n].transpose(1, 2).contiguous().transpose(1, 2) for n in names}


def strided(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Weights of which no dimension lies densely."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        wide = {n: torch.stack([given[n]] * 3, -1).repeat(2, 1, 1, 1)[::2] for n in names}
        return given | {n: w[..., 1].copy_(given[n]) for n, w in wide.items()}

    return change
