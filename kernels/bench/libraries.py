"""Other people's kernels for the same work, by the names of ours; used where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .problem import Problem

__all__ = ["LIBRARIES", "Library"]


@dataclass(frozen=True)
class Library:
    """``build`` makes a function of the launcher's inputs for a problem; ``needs`` names a module or an operator."""

    name: str
    needs: str
    kernels: tuple[str, ...]
    build: Callable[[Problem], Callable[..., Any]]

    def missing(self) -> str:
        """Why it cannot be used; empty if it can."""
        if self.needs.startswith("torch."):
            owner: Any = torch
            for part in self.needs.split(".")[1:]:
                owner = getattr(owner, part, None)
            return "" if owner is not None else f"torch {torch.__version__} has no {self.needs}"
        return "" if importlib.util.find_spec(self.needs) is not None else "not installed"


#: The first that computes a kernel is not the only one: all are measured.
LIBRARIES: tuple[Library, ...] = ()
