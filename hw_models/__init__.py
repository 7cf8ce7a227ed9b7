"""Machines: typed descriptions with units, and their cost model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collectives import CollectiveMode, collective_modes, collective_seconds
    from .cost import op_seconds, transfer_seconds
    from .fabric import CollectiveKind, CollectiveRate, Fabric, Interference
    from .model import Concurrency, Engine, EngineKind, HardwareModel, Link, Memory, Tiling
    from .registry import load, names, parse_bytes

__all__ = [
    "CollectiveKind",
    "CollectiveMode",
    "CollectiveRate",
    "Concurrency",
    "Engine",
    "EngineKind",
    "Fabric",
    "HardwareModel",
    "Interference",
    "Link",
    "Memory",
    "Tiling",
    "collective_modes",
    "collective_seconds",
    "load",
    "names",
    "op_seconds",
    "parse_bytes",
    "transfer_seconds",
]

_MODULE = {"op_seconds": "cost", "transfer_seconds": "cost", "load": "registry", "names": "registry"}
_MODULE |= dict.fromkeys(("CollectiveMode", "collective_modes", "collective_seconds"), "collectives")
_MODULE |= dict.fromkeys(("CollectiveKind", "CollectiveRate", "Fabric", "Interference"), "fabric")
_MODULE |= {"parse_bytes": "registry"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE.get(name, 'model')}", __name__), name)
