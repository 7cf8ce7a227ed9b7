"""What the cases of the LoRA kernels share: dropout and segments in plain steps, and tolerances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from opweave.kernels._dropout import mask

__all__ = ["TOLERANCE", "dropped", "offsets_are", "segments"]

#: Sums of up to a few hundred products of order one: float32 rounds each, the others once at the end.
TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2.0**-10, 2.0**-12),
    torch.bfloat16: (2.0**-7, 2.0**-10),
}


def dropped(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """``x`` as a float64 matrix with the kernels' dropout."""
    wide = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).double()
    if p == 0:
        return wide
    assert seed is not None
    return wide * mask(wide.shape, p, seed) / (1 - p) if p < 1 else torch.zeros_like(wide)


def segments(offsets: torch.Tensor | None, tokens: int) -> Iterator[tuple[int, slice]]:
    """Each adapter with its tokens."""
    bounds = [0, tokens] if offsets is None else offsets.clamp(0, tokens).tolist()
    for adapter, (begin, end) in enumerate(itertools.pairwise(bounds)):
        yield adapter, slice(begin, end)


def offsets_are(*values: int, kind: torch.dtype = torch.int32) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A case's change: these offsets."""
    return lambda given: given | {"offsets": torch.tensor(values, dtype=kind)}
