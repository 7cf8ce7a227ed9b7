"""A planned program as a function of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .arena import ArenaPool
from .backing import SpillPool
from .code import HostCode, write_host_code
from .kernels import load_kernels
from .layout import DevicePlan
from .program import Program

__all__ = ["POOL", "SPILL_POOL", "Executor"]

#: Shared by all programs of the process.
POOL = ArenaPool()
SPILL_POOL = SpillPool()


class Executor:
    """Runs ``program``, whose sizes are integers, under ``device_plan`` in an arena lent by ``pool``.

    It is called with a list of inputs, which it empties so that those nobody else holds can be freed, and returns a
    tuple of outputs (the boxed convention of AOTAutograd).
    """

    def __init__(
        self,
        program: Program,
        device_plan: DevicePlan,
        *,
        device: torch.device,
        kernels: Mapping[str, Any] | None = None,
        pool: ArenaPool = POOL,
    ) -> None:
        loaded = load_kernels(program) if kernels is None else kernels
        self.kernels = loaded
        self.code: HostCode = write_host_code(program, device_plan, loaded)
        self.device, self.pool, self.arena_bytes = device, pool, device_plan.arena_bytes
        self._bound: tuple[tuple[int, int], Any] | None = None  # addresses of its memory, and the host code over it

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        with self.pool.lend(self.arena_bytes, self.device) as arena:
            if not self.code.spill_bytes:
                return self._run(inputs, arena, None)
            with SPILL_POOL.lend(self.code.spill_bytes, self.device) as spill:
                return self._run(inputs, arena, spill)

    def _run(self, inputs: list[Any], arena: torch.Tensor, spill: torch.Tensor | None) -> tuple[Any, ...]:
        addresses = arena.data_ptr(), 0 if spill is None else spill.data_ptr()
        bound = self._bound
        if bound is None or bound[0] != addresses:
            bound = self._bound = (addresses, self.code.bind(arena, spill))
        result: tuple[Any, ...] = bound[1](inputs)
        return result
