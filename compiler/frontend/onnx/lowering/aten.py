"""ATen operators that torch's typed functions do not reach, by name."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["aten", "aten_all"]


def aten(name: str, *arguments: Any) -> torch.Tensor:
    """The tensor that ``torch.ops.aten.<name>`` gives; ``name`` includes the overload, as in ``slice.Tensor``."""
    operator, _, overload = name.partition(".")
    result = getattr(getattr(torch.ops.aten, operator), overload or "default")(*arguments)
    assert isinstance(result, torch.Tensor), f"aten.{name} gives {type(result).__name__}"
    return result


def aten_all(name: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that ``torch.ops.aten.<name>`` gives, where there are several."""
    operator, _, overload = name.partition(".")
    results = getattr(getattr(torch.ops.aten, operator), overload or "default")(*arguments)
    return tuple(results)
