"""A compiled graph of a model that stays on the host, with a device doing the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...runtime.device.host import HostExecutor, HostMemory, HostPlan
from ...runtime.device.layout import DevicePlan
from ...runtime.device.program import Program
from .planned import LOADING, PlannedGraph
from .report import GraphReport

__all__ = ["HostedGraph"]


class HostedGraph(PlannedGraph):
    """A program as ``on_host`` made it: inputs come from host memory, outputs go there, and some weights stay.

    Inputs at the positions ``weights`` stay where they are between calls. ``memory`` has their copies on the device; it
    is not stored, and set by the backend.
    """

    memory: HostMemory

    def __init__(
        self,
        program: Program,
        device: torch.device,
        report: GraphReport,
        key: str,
        weights: Sequence[int],
        *,
        memory: HostMemory,
    ) -> None:
        super().__init__(program, device, report, key)
        self.weights, self.memory = tuple(weights), memory

    def _made(self, program: Program, plan: DevicePlan, kernels: Mapping[str, Any] | None) -> HostExecutor:
        assert isinstance(plan, HostPlan)
        return HostExecutor(
            program,
            plan,
            plan.resident,
            weights=self.weights,
            memory=self.memory,
            kernels=kernels,
            room_bytes=plan.room_bytes,
        )

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """As without host memory, whose copies start afresh."""
        memory = LOADING.get().memory
        assert memory is not None  # the cache's key has the option that asked for it
        self.memory = memory
        super().post_compile(example_inputs, constants, graph_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        bare = PlannedGraph.__new__(type(self))
        bare.__dict__.update({name: value for name, value in self.__dict__.items() if name != "memory"})
        return PlannedGraph.__getstate__(bare)
