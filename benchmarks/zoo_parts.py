"""What an entry of the zoo is made of: arguments, sizes, and models from the configurations of published packages."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opweave.errors import OptionError

__all__ = ["Case", "Family", "Input", "Pretrained", "Size"]

Size = Literal["tiny", "small", "full"]
Family = Literal["transformer", "cnn", "branchy"]
Kind = Literal["tokens", "values", "mask"]

#: Fields of a configuration that drop something at random while training.
RANDOM = ("dropout", "pdrop", "drop_path", "layerdrop")


@dataclass(frozen=True)
class Input:
    """One argument: int64 tokens below ``vocabulary``, standard normal floats, or an int64 attention mask."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    vocabulary: int = 0

    @classmethod
    def tokens(cls, name: str, shape: tuple[int, ...], vocabulary: int) -> Input:
        """Whole numbers from 0 to ``vocabulary`` - 1, evenly."""
        return cls(name, "tokens", shape, vocabulary)

    @classmethod
    def values(cls, name: str, shape: tuple[int, ...]) -> Input:
        """Standard normal floats."""
        return cls(name, "values", shape)

    @classmethod
    def mask(cls, name: str, shape: tuple[int, int]) -> Input:
        """Ones, and zeros over the last quarter of the last row: padding."""
        return cls(name, "mask", shape)

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """The argument on the CPU; floats are drawn in float32 and rounded to ``dtype``."""
        if self.kind == "tokens":
            return torch.randint(self.vocabulary, self.shape, generator=generator)
        if self.kind == "values":
            return torch.randn(self.shape, generator=generator, dtype=torch.float32).to(dtype)
        mask = torch.ones(self.shape, dtype=torch.int64)
        mask[-1, -(self.shape[1] // 4) :] = 0
        return mask


@dataclass(frozen=True)
class Case:
    """One size: what differs from the configuration's defaults, and the inputs."""

    inputs: tuple[Input, ...]
    configuration: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pretrained:
    """``model`` of ``package``, made from ``configuration`` (diffusers: its keywords), random weights.

    ``common`` holds for all sizes; ``regression`` and ``kinks`` choose the loss and how gradients are compared.
    ``fields`` are the tensors kept of what the model returns.
    """

    name: str
    family: Family
    configuration: str
    model: str
    fields: tuple[str, ...]
    cases: Mapping[Size, Case]
    common: Mapping[str, Any] = field(default_factory=dict)
    package: str = "transformers"
    regression: bool = False
    kinks: bool = False
    note: str = ""

    def make(self, size: Size, dtype: torch.dtype, dropout: bool) -> nn.Module:
        """The model in ``dtype``; ``dropout`` keeps the configuration's random dropping, else every rate is 0."""
        module = _package(self)
        keywords = {**self.common, **self.cases[size].configuration}
        if not self.configuration:
            # torch's own `to`: that of diffusers warns of layers kept in float32 even where there are none.
            unet: nn.Module = getattr(module, self.model)(**keywords)
            return nn.Module.to(unet, dtype)
        configuration = getattr(module, self.configuration)(**keywords)
        if not dropout:
            _without_dropout(configuration)
        # Not `.to(dtype)`: that would round the buffers too that transformers keeps in float32, as rotary frequencies.
        model: nn.Module = getattr(module, self.model)._from_config(configuration, dtype=dtype)
        return model


def _package(entry: Pretrained) -> Any:
    try:
        return importlib.import_module(entry.package)
    except ImportError as error:
        raise OptionError(
            f"the model {entry.name} needs the package {entry.package}, which cannot be imported: {error}",
            hint=f"pip install {entry.package}",
        ) from error


def _without_dropout(configuration: Any) -> None:
    for name, value in configuration.to_dict().items():
        if isinstance(value, float) and any(part in name for part in RANDOM):
            setattr(configuration, name, 0.0)
