"""A program's launches captured in a CUDA graph, so that a call is one launch.

A graph replays on the addresses it was captured with. Weights keep theirs, which is checked in each call; other inputs
are copied into tensors of the graph's own, and outputs out of its memory into fresh tensors, so that a caller sees
nothing of it. A program that writes what its caller keeps is not captured: a replay could not undo a warm-up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Any

import torch

from .arena import ArenaPool
from .code import placed
from .executor import Executor
from .program import Origin, Program, Ref

__all__ = ["CapturedExecutor", "why_not_captured"]

log = logging.getLogger("opweave.cuda_graph")

WARM_UP_CALLS = 2  # Inductor's launchers choose their configurations in the first one


def why_not_captured(program: Program) -> str:
    """Why a program cannot be replayed from a CUDA graph; empty if it can."""
    for call in program.calls:
        for name in call.writes:
            if program.storages[name].origin in (Origin.INPUT, Origin.CONSTANT):
                return f"{call.target} writes {name!r}, which the caller keeps"
    for storage in program.storages.values():
        if storage.device.type != "cuda":
            return f"{storage.name!r} lies on {storage.device}"
        if storage.origin in (Origin.HOST, Origin.RETURNED, Origin.GIVEN):
            return f"{storage.name!r} comes and goes with each call"
    return ""


class CapturedExecutor:
    """As the ``executor`` it wraps; from the third call on a CUDA graph of it, whose first replay must agree with it.

    ``static`` are positions of inputs whose addresses do not change. Where a graph cannot be captured, or disagrees,
    ``failure`` says why and the executor runs every call.
    """

    def __init__(self, executor: Executor, program: Program, static: Collection[int]) -> None:
        self.executor, self.kernels, self.code = executor, executor.kernels, executor.code
        self.failure = ""
        self._static = frozenset(static)
        self._tensors = [p for p, item in enumerate(program.inputs) if isinstance(item, Ref)]
        self._calls = 0
        self._graph: _Graph | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Run it, by one launch where that is possible."""
        if self.failure:
            return self.executor(inputs)
        with self._lock:
            graph = self._graph
            if graph is not None and graph.matches(inputs):
                return graph.replay(inputs)
            self._calls += 1
            if self._calls <= WARM_UP_CALLS or graph is not None:  # addresses of weights have changed: not for long
                return self.executor(inputs)
            return self._capture(inputs)

    def _capture(self, inputs: list[Any]) -> tuple[Any, ...]:
        copied = [p for p in self._tensors if p not in self._static]
        try:
            graph = _Graph(self.executor, inputs, copied, sorted(self._static & set(self._tensors)))
        except RuntimeError as error:  # what CUDA raises for whatever cannot be captured
            self.failure = f"its CUDA graph could not be captured: {error}"
            log.warning(self.failure)
            return self.executor(inputs)
        replayed = graph.replay(list(inputs))
        expected = self.executor(inputs)
        if all(_equal(a, b) for a, b in zip(replayed, expected, strict=True)):
            self._graph = graph
        else:
            self.failure = "a replay of its CUDA graph differs from its launches one by one, as with random numbers"
            log.warning(self.failure)
        return expected


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


class _Graph:
    """One capture: its own inputs, the addresses it relies on, and its outputs."""

    def __init__(self, executor: Executor, inputs: list[Any], copied: list[int], static: list[int]) -> None:
        device = executor.device
        self.copied, self.static = copied, static
        self.addresses = [inputs[p].data_ptr() for p in static]
        self.kept = [inputs[p] for p in static]  # so that nothing else gets their addresses
        mine = list(inputs)
        for position in copied:
            mine[position] = torch.empty_strided(
                inputs[position].shape, inputs[position].stride(), dtype=inputs[position].dtype, device=device
            ).copy_(inputs[position])
        self.inputs = [mine[p] for p in copied]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        self.pool = ArenaPool()  # an arena of the graph's own: replays write to the addresses of the capture
        with torch.cuda.graph(self.graph):
            self.outputs = executor(list(mine), self.pool)
        self.passed = {id(tensor): position for position, tensor in zip(copied, self.inputs, strict=True)}
        self.passed |= {id(tensor): position for position, tensor in zip(static, self.kept, strict=True)}

    def matches(self, inputs: list[Any]) -> bool:
        """Whether the weights are where they were."""
        return all(inputs[p].data_ptr() == address for p, address in zip(self.static, self.addresses, strict=True))

    def replay(self, inputs: list[Any]) -> tuple[Any, ...]:
        """One call; outputs in fresh memory, those that share a storage in one."""
        given = list(inputs)
        inputs.clear()
        for mine, position in zip(self.inputs, self.copied, strict=True):
            mine.copy_(given[position])
        self.graph.replay()
        storages: dict[int, torch.Tensor] = {}
        return tuple(self._fresh(item, given, storages) for item in self.outputs)

    def _fresh(self, item: Any, given: list[Any], storages: dict[int, torch.Tensor]) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        if id(item) in self.passed:
            return given[self.passed[id(item)]]
        storage = item.untyped_storage()
        if storage.data_ptr() not in storages:
            row = torch.empty(0, dtype=torch.uint8, device=item.device).set_(storage, 0, (storage.nbytes(),), (1,))
            storages[storage.data_ptr()] = row.clone()
        first = int(item.storage_offset()) * item.itemsize
        return placed(storages[storage.data_ptr()], first, tuple(item.shape), item.stride(), item.dtype)
