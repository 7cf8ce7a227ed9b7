"""A planned program as a function of its inputs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from .arena import ArenaPool, Pool, TransientPool
from .backing import SpillPool
from .code import HostCode, write_host_code
from .kernels import load_kernels
from .layout import DevicePlan
from .program import Origin, Program, Ref, span_elements

__all__ = ["POOL", "SPILL_POOL", "Executor"]

#: Shared by all inference programs of the process.
POOL = ArenaPool()
SPILL_POOL = SpillPool()


class Executor:
    """Runs ``program``, whose sizes are integers, under ``device_plan`` in an arena lent by ``pool``.

    It is called with a list of inputs, which it empties so that those nobody else holds can be freed, and returns a
    tuple of outputs (the boxed convention of AOTAutograd). On a GPU the work is queued on the current stream; where
    that is captured in a CUDA graph, arenas are the graph's, which keeps their addresses as long as it lives.
    """

    def __init__(
        self,
        program: Program,
        device_plan: DevicePlan,
        *,
        device: torch.device,
        kernels: Mapping[str, Any] | None = None,
        pool: Pool = POOL,
    ) -> None:
        loaded = load_kernels(program) if kernels is None else kernels
        self.kernels = loaded
        self.code: HostCode = write_host_code(program, device_plan, loaded)
        self.device, self.pool, self.arena_bytes = device, pool, device_plan.arena_bytes
        #: The memory it ran in last, and the host code over it.
        self._bound: tuple[torch.Tensor, torch.Tensor | None, Any] | None = None
        #: Host memory that CUDA graphs of others replay on: nobody says when they are gone.
        self._captured: list[SpillPool] = []
        # Two calls at once would record each other's events.
        self._one_at_a_time = threading.Lock() if self.code.has_events else nullcontext()
        tensors = [(p, program.storage_of(i)) for p, i in enumerate(program.inputs) if isinstance(i, Ref)]
        written = {name for call in program.calls for name in call.writes}
        #: Positions of inputs that kernels take to be aligned, and whether they are written.
        self._aligned = [
            (p, storage.name in written)
            for p, storage in tensors
            if storage.device.type == "cuda" and storage.origin is not Origin.HOST
        ]

    def __call__(self, inputs: list[Any], pool: Pool | None = None) -> tuple[Any, ...]:
        """Run it, in an arena of another ``pool`` if one is given."""
        if self.device.type != "cuda":
            return self._call(inputs, pool or self.pool, SPILL_POOL)
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream), self._one_at_a_time:
            arenas, spills = self._pools()
            copies = [(inputs[p], _realigned(inputs, p), written) for p, written in self._aligned if _is_off(inputs[p])]
            outputs = self._call(inputs, pool or arenas, spills)
            for original, copy, written in copies:
                if written:
                    original.copy_(copy)
            originals = {id(copy): original for original, copy, _ in copies}
            return tuple(originals.get(id(item), item) for item in outputs)

    def _pools(self) -> tuple[Pool, SpillPool]:
        """Where memory comes from: what is captured in a CUDA graph must not run in blocks that others get, too."""
        if not torch.cuda.is_current_stream_capturing():
            return self.pool, SPILL_POOL
        if self.code.spill_bytes:
            self._captured.append(SpillPool())
            return TransientPool(), self._captured[-1]
        return TransientPool(), SPILL_POOL

    def _call(self, inputs: list[Any], pool: Pool, spills: SpillPool) -> tuple[Any, ...]:
        with pool.lend(self.arena_bytes, self.device) as arena:
            if not self.code.spill_bytes:
                return self._run(inputs, arena, None)
            with spills.lend(self.code.spill_bytes, self.device) as spill:
                return self._run(inputs, arena, spill)

    def _run(self, inputs: list[Any], arena: torch.Tensor, spill: torch.Tensor | None) -> tuple[Any, ...]:
        bound = self._bound
        if (
            bound is None or bound[0] is not arena or bound[1] is not spill
        ):  # an address may come back, a block does not
            with torch.inference_mode(False):
                bound = self._bound = (arena, spill, self.code.bind(arena, spill))
        result: tuple[Any, ...] = bound[2](inputs)
        return result


#: Bytes that vector loads of generated kernels are aligned to.
_VECTOR_BYTES = 16


def _is_off(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % _VECTOR_BYTES != 0


def _realigned(inputs: list[Any], position: int) -> torch.Tensor:
    """Puts an aligned copy of an input, with its strides, in its place."""
    tensor = inputs[position]
    row = torch.as_strided(tensor, (span_elements(tuple(tensor.shape), tensor.stride()),), (1,)).clone()
    inputs[position] = torch.as_strided(row, tensor.shape, tensor.stride(), 0)
    copy: torch.Tensor = inputs[position]
    return copy
