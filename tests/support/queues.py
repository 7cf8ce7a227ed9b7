"""CUDA's streams and events without a GPU: what host code queues is run at once, and what may race is found.

Every launch gets a vector clock: how far each stream must be when it starts. Two launches that touch the same bytes,
one writing, must be ordered by their clocks, and so must the users of memory and those of what gets it next from the
pool of its stream, as PyTorch's caching allocator hands it out: at once, and to the same stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opweave.compiler.runtime.device.code import placed

__all__ = ["Driver", "Event", "Launches", "Stream", "queues"]

Clock = dict[int, int]
#: What queues nothing.
_HOST_WORK = (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.set_)


def _joined(*clocks: Clock) -> Clock:
    return {stream: max(clock.get(stream, 0) for clock in clocks) for clock in clocks for stream in clock}


class Stream:
    """A queue."""

    driver: Driver

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority = priority
        self.number = len(self.driver.streams)
        self.clock: Clock = {}
        self.driver.streams.append(self)

    def wait_event(self, event: Event) -> None:
        """Start nothing more before what the event was last recorded behind is done."""
        assert event.clock is not None, "an event is waited for that was never recorded"
        self.clock = _joined(self.clock, event.clock)


class Event:
    """A mark in a queue."""

    def __init__(self) -> None:
        self.clock: Clock | None = None

    def record(self, stream: Stream) -> None:
        """Mark what is queued on a stream now."""
        self.clock = dict(stream.clock)


@dataclass
class _Access:
    first: int
    last: int
    writes: bool
    stream: int
    tick: int


@dataclass
class _Block:
    """Memory from the pool of a stream, or from an unknown one: who has used it, and whom its users come behind."""

    memory: np.ndarray[Any, Any]
    pool: int | None
    behind: Clock
    users: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)  # streams that the allocator was told of


class Driver:
    """The streams of a device and all that has happened on them; ``races`` says what went wrong."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.races: list[str] = []
        self.launches = 0
        self.accesses: list[_Access] = []
        self.blocks: dict[int, _Block] = {}
        self.freed: dict[int | None, Clock] = {}
        self.current: Stream

    def set_stream(self, stream: Stream) -> None:
        """As ``torch.cuda.set_stream``."""
        self.current = stream

    def current_stream(self, device: object = None) -> Stream:
        """As ``torch.cuda.current_stream``."""
        return self.current

    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, *, known: bool = True
    ) -> torch.Tensor:
        """Memory from the current stream's pool, at addresses that are never used again; ``known``: the pool is."""
        elements = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        memory = np.zeros(elements * dtype.itemsize, np.uint8)
        pool = self.current.number if known else None
        behind = _joined(self.freed.get(None, {}), self.freed.get(pool, {}))
        block = self.blocks[memory.ctypes.data] = _Block(memory, pool, behind)
        lent = memory[:]  # what the tensor holds on to; its memory stays ours
        weakref.finalize(lent, self._free, block)
        return placed(torch.from_numpy(lent), 0, shape, strides, dtype)

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        """As ``torch.Tensor.record_stream``: nobody gets the memory before what is queued when it is freed is done."""
        block = self.blocks.get(tensor.untyped_storage().data_ptr())
        if block is not None:
            block.recorded.add(stream.number)

    def _free(self, block: _Block) -> None:
        done = _joined(*(self.streams[number].clock for number in block.recorded))
        users = {stream: tick for stream, tick in block.users.items() if tick > done.get(stream, 0)}
        self.freed[block.pool] = _joined(self.freed.get(block.pool, {}), users)

    def launch(self, name: str, tensors: list[tuple[torch.Tensor, bool]]) -> None:
        """Queue what touches ``tensors``, and writes some of them."""
        stream = self.current
        self.launches += 1
        tick = stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        for tensor, writes in tensors:
            first = tensor.data_ptr()
            span = 1 + sum((extent - 1) * by for extent, by in zip(tensor.shape, tensor.stride(), strict=True))
            access = _Access(first, first + span * tensor.itemsize, writes, stream.number, tick)
            self._check(name, access, stream.clock)
            self.accesses.append(access)
            block = self.blocks.get(tensor.untyped_storage().data_ptr())
            if block is not None:
                if any(stream.clock.get(other, 0) < done for other, done in block.behind.items()):
                    self.races.append(f"{name} uses memory that an earlier owner may still use")
                block.users = _joined(block.users, {stream.number: tick})

    def _check(self, name: str, access: _Access, clock: Clock) -> None:
        for other in self.accesses:
            meets = access.first < other.last and other.first < access.last
            if meets and (access.writes or other.writes) and clock.get(other.stream, 0) < other.tick:
                self.races.append(f"{name} on stream {access.stream} races with launch {other.tick} on {other.stream}")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call] # of a function of torch's
    """Tells a driver of every operator that computes; what operators make comes from its pools."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.driver = driver

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.overloadpacket in _HOST_WORK:
            return result
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        tensors = [(value, name in writes) for name, value in named.items() if isinstance(value, torch.Tensor)]
        if not writes and isinstance(result, torch.Tensor):
            made = self.driver.empty(tuple(result.shape), result.stride(), result.dtype)
            result = made.copy_(result)  # within the mode, and so unseen
            tensors.append((result, True))
        self.driver.launch(str(func), tensors)
        return result


@contextmanager
def queues() -> Iterator[tuple[Driver, Callable[[], TorchDispatchMode]]]:
    """``torch.cuda`` with a driver's streams and events, and a mode within which operators are queued on them."""
    driver = Driver()
    stream_class = type("_Stream", (Stream,), {"driver": driver})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", stream_class)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "set_stream", driver.set_stream)
        patch.setattr(torch.cuda, "current_stream", driver.current_stream)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: driver.record_stream(tensor, stream))
        driver.current = stream_class()
        yield driver, lambda: Launches(driver)
