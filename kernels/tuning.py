"""Results of tuning, stored in a file for each device and found again by kernel and sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ._configs import Config

__all__ = ["tuned"]


def tuned(kernel: str, device: torch.device, sizes: Mapping[str, int]) -> Config | None:
    """What tuning found fastest for a kernel on a device, for sizes in the same bucket; ``None`` if never tuned."""
    return None
