"""Memory that tells on whoever reads what was not written, or writes where it may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from opweave.compiler.runtime.device.arena import ALIGNMENT_BYTES, ArenaPool, Pool
from opweave.compiler.runtime.device.executor import Executor
from opweave.compiler.runtime.device.layout import DevicePlan
from opweave.compiler.runtime.device.program import Program

GUARD_BYTES = 4096
POISON = 0xFF  # as any floating-point type: not a number; as any signed integer: -1
GUARD = 0xA5


class PoisonedPool(ArenaPool):
    """Lends exactly what was asked for, poisoned, between guards; blocks of one size take turns at two addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = 0
        self.faults: list[str] = []
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}

    @contextmanager
    def lend(self, nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
        turn = self.lent % 2
        self.lent += 1
        whole = self._blocks.pop((nbytes, turn), None)
        with torch.inference_mode(False):
            if whole is None:
                whole = torch.empty(nbytes + 2 * GUARD_BYTES + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
            first = GUARD_BYTES + -(whole.data_ptr() + GUARD_BYTES) % ALIGNMENT_BYTES
            block = whole[first : first + nbytes]
            whole.fill_(GUARD)
            block.fill_(POISON)
        try:
            yield block
        finally:
            before, after = whole[:first], whole[first + nbytes :]
            if not bool((before == GUARD).all()) or not bool((after == GUARD).all()):
                self.faults.append(f"bytes beside an arena of {nbytes} bytes were written")
            block.fill_(POISON)  # what was returned must not lie here
            self._blocks[nbytes, turn] = whole


class PoisonedExecutor(Executor):
    """Runs in the arena of a ``PoisonedPool``; what is allocated apart is poisoned, too."""

    shared: PoisonedPool

    def __init__(
        self,
        program: Program,
        device_plan: DevicePlan,
        *,
        device: torch.device,
        kernels: Mapping[str, Any] | None = None,
        pool: Pool | None = None,
    ) -> None:
        super().__init__(program, device_plan, device=device, kernels=kernels, pool=self.shared)
        names = self.code.names
        assert isinstance(names, dict)
        names["empty_cpu"] = _poisoned


def _poisoned(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty_strided(shape, strides, dtype=dtype)
    torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).fill_(POISON)
    return tensor
