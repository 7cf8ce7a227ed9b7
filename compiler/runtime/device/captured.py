"""A program's launches captured in a CUDA graph, so that a call is one launch.

A graph replays on the addresses it was captured with. Weights keep theirs, which is checked in each call; other inputs
are copied into tensors of the graph's own, and outputs out of its memory into fresh tensors, so that a caller sees
nothing of it. A program that writes what its caller keeps is not captured: a replay could not undo a warm-up.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from .arena import ArenaPool
from .code import placed
from .executor import Executor
from .program import Origin, Program, Ref, span_elements

__all__ = ["CapturedExecutor", "why_not_captured"]

log = logging.getLogger("opweave.cuda_graph")

WARM_UP_CALLS = 2  # Inductor's launchers choose their configurations in the first one
CAPTURES = 3  # a model whose weights move more often is not worth it
#: A launch costs the host about 4 microseconds, in which a GPU copies some 4 MiB.
COPIED_BYTES_FOR_EACH_CALL = 1 << 22


def why_not_captured(program: Program, static: Collection[int]) -> str:
    """Why a program of integer sizes is not replayed from a CUDA graph; empty if it is.

    ``static`` are positions of inputs whose addresses do not change.
    """
    for call in program.calls:
        if call.effect:
            return f"{call.target} draws random numbers, or acts outside its tensors"
        for name in call.writes:
            if program.storages[name].origin in (Origin.INPUT, Origin.CONSTANT):
                return f"{call.target} writes {name!r}, which the caller keeps"
    for storage in program.storages.values():
        if storage.device.type != "cuda":
            return f"{storage.name!r} lies on {storage.device}"
        if storage.origin in (Origin.HOST, Origin.RETURNED, Origin.GIVEN):
            return f"{storage.name!r} comes and goes with each call"
    copied = [item for position, item in enumerate(program.inputs) if position not in static]
    storages = {program.storage_of(item) for item in (*copied, *program.outputs) if isinstance(item, Ref)}
    nbytes = sum(int(storage.nbytes) for storage in storages)
    if nbytes > COPIED_BYTES_FOR_EACH_CALL * len(program.calls):
        return f"copying its inputs and outputs, {nbytes:,} bytes, takes longer than its {len(program.calls)} launches"
    return ""


class CapturedExecutor:
    """As the ``executor`` it wraps; from the third call on a CUDA graph of it, whose first replay must agree with it.

    ``static`` are positions of inputs whose addresses do not change; where they do, it is captured again. Where a graph
    cannot be captured, or disagrees, ``failure`` says why and the executor runs every call. Within a capture of the
    caller's own the executor runs, too, and becomes a part of that.
    """

    def __init__(self, executor: Executor, program: Program, static: Collection[int]) -> None:
        self.executor, self.kernels, self.code = executor, executor.kernels, executor.code
        self.failure = ""
        self._static = frozenset(static)
        self._tensors = [p for p, item in enumerate(program.inputs) if isinstance(item, Ref)]
        self._calls = self._captures = 0
        self._graph: _Graph | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Run it, by one launch where that is possible."""
        if self.failure or torch.cuda.is_current_stream_capturing():
            return self.executor(inputs)
        with self._lock:
            if self._graph is not None:
                if self._graph.matches(inputs):
                    return self._graph.replay(inputs)
                self._graph, self._calls = None, 0
            self._calls += 1
            if self._calls <= WARM_UP_CALLS or self.failure:
                return self.executor(inputs)
            return self._capture(inputs)

    def _capture(self, inputs: list[Any]) -> tuple[Any, ...]:
        self._captures += 1
        if self._captures > CAPTURES:
            return self._refused("its weights have moved too often for a CUDA graph", inputs)
        copied = [p for p in self._tensors if p not in self._static]
        try:
            graph = _Graph(self.executor, inputs, copied, sorted(self._static & set(self._tensors)))
        except RuntimeError as error:  # what CUDA raises for whatever cannot be captured
            return self._refused(f"its CUDA graph could not be captured: {error}", inputs)
        replayed = graph.replay(list(inputs))
        expected = self.executor(inputs)
        if all(_agree(a, b) for a, b in zip(replayed, expected, strict=True)):
            self._graph = graph
            if isinstance(self.executor.pool, ArenaPool):
                self.executor.pool.clear()  # the graph has an arena of its own
        else:
            self._refuse("a replay of its CUDA graph differs from its launches one by one")
        return expected

    def _refused(self, failure: str, inputs: list[Any]) -> tuple[Any, ...]:
        self._refuse(failure)
        return self.executor(inputs)

    def _refuse(self, failure: str) -> None:
        self.failure = failure
        log.warning(failure)


def _agree(a: Any, b: Any) -> bool:
    """Whether two results are one: to the bit, or but for the order in which atomic additions rounded."""
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    first, second = (_bits(tensor) for tensor in (a, b))
    if torch.equal(first, second):
        return True
    if not (a.is_floating_point() or a.is_complex()) or a.itemsize == 1:
        return False
    wide = torch.complex128 if a.is_complex() else torch.float64
    known = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    left, right = (torch.where(known, tensor, 0).to(wide) for tensor in (a, b))
    return float((left - right).norm()) <= math.sqrt(torch.finfo(a.dtype).eps) * float(right.norm())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class _Graph:
    """One capture: its own inputs, the addresses it relies on, and its outputs."""

    def __init__(self, executor: Executor, inputs: list[Any], copied: list[int], static: list[int]) -> None:
        device = executor.device
        self.copied, self.static = copied, static
        self.addresses = [inputs[p].data_ptr() for p in static]
        self.kept = [inputs[p] for p in static]  # so that nothing else gets their addresses
        mine = list(inputs)
        with torch.inference_mode(False):  # replays in any mode write to them
            for position in copied:
                mine[position] = _like(inputs[position])
        self.inputs = [mine[p] for p in copied]
        for tensor, position in zip(self.inputs, copied, strict=True):
            _copy(tensor, inputs[position])
        self.graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.current_stream(device)
        self.pool = ArenaPool()  # held, so that the allocator counts what replays use
        # Other threads may go on; and cuBLAS takes its workspaces from the graph's memory, where nobody frees them.
        with (
            torch.cuda.device(device),
            _own_workspaces(),
            torch.cuda.graph(self.graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
        ):
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
        stream = torch.cuda.current_stream(self._stream.device)
        if stream != self._stream:  # the memory is one for all calls
            stream.wait_stream(self._stream)
            self._stream = stream
        for mine, position in zip(self.inputs, self.copied, strict=True):
            _copy(mine, given[position])
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


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: each stream has workspaces of its own."""
    new: Any = torch.cuda.Stream
    stream: torch.cuda.Stream = new(device)
    return stream


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Forget the workspaces of cuBLAS before and behind a capture, as PyTorch's own graphs do."""
    forget: Any = torch._C._cuda_clearCublasWorkspaces
    forget()
    try:
        yield
    finally:
        forget()


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same strides, in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy; of an expanded tensor, whose elements share memory, that memory."""
    span = span_elements(tuple(to.shape), to.stride())
    if span < to.numel():
        to, source = (torch.as_strided(tensor, (span,), (1,)) for tensor in (to, source))
    to.copy_(source)
