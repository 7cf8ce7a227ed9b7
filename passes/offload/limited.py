"""What planning within a memory limit decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.runtime.device.layout import DevicePlan, allocated_bytes

__all__ = ["LimitedPlan"]


@dataclass(frozen=True)
class LimitedPlan:
    """A plan within ``limit_bytes``, and what it was decided by.

    ``resident`` are the sources that stay on the device; ``device_plan`` is of the graph without them.
    ``resident_bytes``, ``kept_bytes``, the arena and what is allocated apart never exceed the limit together. A call
    takes ``latency_s`` as simulated. ``bound_s`` is what no choice of residents and no plan of this order undercuts;
    ``compute_s`` and ``transfer_s`` are what compute and copy engines take at least for the plan chosen.
    """

    device_plan: DevicePlan
    resident: frozenset[str]
    limit_bytes: int
    least_bytes: int
    resident_bytes: int
    kept_bytes: int
    latency_s: float
    bound_s: float
    compute_s: float
    transfer_s: float
    loaded_bytes: int

    @property
    def occupied_bytes(self) -> int:
        """Most bytes of the device in use at any step."""
        peak = max(allocated_bytes(self.device_plan), default=self.device_plan.arena_bytes)
        return self.kept_bytes + self.resident_bytes + peak

    @property
    def room_bytes(self) -> int:
        """What weights may take on the device beside everything else: of this program, and of others between calls."""
        return self.limit_bytes - self.occupied_bytes + self.resident_bytes

    @property
    def gap(self) -> float:
        """``(latency - bound) / latency``."""
        return max(0.0, 1 - self.bound_s / self.latency_s) if self.latency_s else 0.0
