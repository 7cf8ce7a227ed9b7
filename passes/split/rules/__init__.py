"""Rules by operator. Each family is a module with a ``RULES``: operator name without overload to ``Rule``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ..rule import Rule

__all__ = ["FAMILIES", "default_rules"]

#: Modules of this folder; a later one wins where two know an operator.
FAMILIES: tuple[str, ...] = (
    "elementwise",
    "matmul",
    "reduction",
    "views",
    "collective",
    "creation",
    "attention",
    "attention_backward",
    "backward",
    "losses",
    "routing",
    "indexing",
)


def default_rules() -> Mapping[str, Rule]:
    """All rules of the families, by operator name, such as ``aten::mm``."""
    merged: dict[str, Rule] = {}
    for family in FAMILIES:
        merged.update(importlib.import_module(f"{__name__}.{family}").RULES)
    return merged
