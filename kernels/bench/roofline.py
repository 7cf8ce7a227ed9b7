"""The least time that a launch can take on a device: the roofline of Williams, Waterman and Patterson (2009)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...hw_models.model import EngineKind, HardwareModel
from ...hw_models.registry import load, names
from .._match import Cost

__all__ = ["Roofline", "machine_of", "roofline_of"]


@dataclass(frozen=True)
class Roofline:
    """What a device does at most; ``source`` says who says so: a machine's data sheet, or our own measurement."""

    source: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def rate(self, dtype: str) -> float:
        """Arithmetic in ``dtype``, a second."""
        return self.flops_per_s.get(dtype) or self.flops_per_s["default"]

    def seconds(self, cost: Cost, dtype: str) -> float:
        """The slower of arithmetic and traffic."""
        return max(cost.flops / self.rate(dtype), cost.traffic_bytes / self.bytes_per_s)

    def bound_by_memory(self, cost: Cost, dtype: str) -> bool:
        """Whether traffic is what takes the least time."""
        return cost.traffic_bytes / self.bytes_per_s >= cost.flops / self.rate(dtype)


def machine_of(device_name: str) -> HardwareModel | None:
    """The machine in ``hw_models/`` that CUDA calls ``device_name``; ``None`` if it is not there."""
    words = device_name.lower().replace("-", " ").split()
    for name in names():
        model, _, form = name.partition("-")
        if model in words and not (form == "sxm" and "pcie" in words):
            return load(name)
    return None


def roofline_of(machine: HardwareModel) -> Roofline:
    """Of a GPU, whose scratchpad is its memory."""
    (engine, *_) = machine.engines_of(EngineKind.COMPUTE)
    return Roofline(machine.name, machine.scratchpad_memory.bandwidth_bytes_per_s, engine.flops_per_s)
