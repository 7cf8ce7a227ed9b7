"""By which sizes a launcher chooses its configuration, and which it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from .. import _configs
from .._configs import Config, Configs

__all__ = ["Choice", "noted"]


@dataclass(frozen=True)
class Choice:
    """One call of ``Configs.choose``."""

    configs: Configs
    dtype: torch.dtype | None
    sizes: Mapping[str, int]
    config: Config


@contextmanager
def noted(architecture: int | None = None) -> Iterator[list[Choice]]:
    """Notes every choice made inside, which is by the rows alone: results of tuning are not looked at.

    With ``architecture``, choices are as on a GPU of that.
    """
    seen: list[Choice] = []
    choose, architecture_of = Configs.choose, _configs.architecture_of

    def noting(self: Configs, device: torch.device, dtype: torch.dtype | None = None, /, **sizes: int) -> Config:
        config = choose(self, device, dtype, **sizes)
        seen.append(Choice(self, dtype, sizes, config))
        return config

    def known(device: torch.device) -> int:
        return architecture_of(device) if architecture is None else architecture

    with (
        mock.patch.object(Configs, "choose", noting),
        mock.patch.object(_configs, "architecture_of", known),
        mock.patch("opweave.kernels.tuning.tuned", return_value=None),
    ):
        yield seen
