"""Reads ONNX models: ``load`` gives a torch.fx module of ATen operators, ``randomize_weights`` fills empty weights."""

from __future__ import annotations

from .model import ImportedModel, load
from .operands import Definition
from .randomize import randomize_weights
from .reading import InputSpec

__all__ = ["Definition", "ImportedModel", "InputSpec", "load", "randomize_weights"]
