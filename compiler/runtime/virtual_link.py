"""Virtual ranks over a virtual link: an instrument that shows on one machine how much communication a program hides.

`virtual_link` makes this process one of many ranks that do not exist. A collective then costs what the link takes for
it, and no compute: it is put into the link's queue when it is started, and its wait sleeps until the link is done with
it. The link does one transfer after the other, each in ``alpha_s + nbytes / bandwidth_bytes_per_s`` seconds, where
``nbytes`` are those of the whole message, as in ``compiler.graph.Collective``; all groups share it. What a program
computes between start and wait is hidden in real time, and what it does not hide shows on a clock.

What it cannot show: contention. The link takes no cores, no memory bandwidth and no copy engine from the compute beside
it, so what is measured is what a schedule hides, not what a real link and its kernels would leave of that.

Values are those that come about if every virtual rank holds what this one does: a sum is ``ranks`` times the operand, a
gather repeats it. They are computed in the wait, from the operand as it is then, and until then a result is NaN: what
reads it too early, or writes an operand in flight, computes something else. Without ``values`` no element is touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import OptionError
from .virtual_group import BACKEND, VirtualGroup

__all__ = ["Transfer", "VirtualLink", "virtual_link"]

SPIN_S = 2e-4  # a sleep ends this much too late, about: the rest is waited for awake

_distributed: Any = dist
_link: ContextVar[VirtualLink] = ContextVar("virtual_link")


@dataclass(frozen=True)
class Transfer:
    """One collective: its ``kind``, the whole message's bytes, and when it was started, began and ended (seconds)."""

    kind: str
    nbytes: int
    posted_s: float
    start_s: float
    finish_s: float


@dataclass
class VirtualLink:
    """What ``ranks`` virtual ranks share; ``transfers`` is what it did since the last `reset`.

    ``waited_s`` are seconds spent in waits: what a program did not hide.
    """

    ranks: int
    alpha_s: float
    bandwidth_bytes_per_s: float
    values: bool = True
    transfers: list[Transfer] = field(default_factory=list)
    waited_s: float = 0.0
    _free_s: float = 0.0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def seconds(self, nbytes: int) -> float:
        """How long a message of ``nbytes`` occupies the link."""
        return self.alpha_s + nbytes / self.bandwidth_bytes_per_s

    @property
    def busy_s(self) -> float:
        """Seconds in which the link was busy."""
        return sum(transfer.finish_s - transfer.start_s for transfer in self.transfers)

    def reset(self) -> None:
        """Forget what was; the link is free."""
        with self._lock:
            self.transfers.clear()
            self.waited_s = self._free_s = 0.0

    def post(self, kind: str, nbytes: int, results: list[Tensor], write: Callable[[], None] | None) -> Any:
        """Put a message into the queue; ``write`` computes ``results``. Returns what waits for it."""
        now = time.perf_counter()
        with self._lock:
            start = max(now, self._free_s)
            self._free_s = start + self.seconds(nbytes)
            self.transfers.append(Transfer(kind, nbytes, now, start, self._free_s))
            return _Work(self, self._free_s, results, write if self.values else None)


class _Work(_distributed._Work):  # type: ignore[misc] # torch names no type for it
    """A collective in flight."""

    def __init__(
        self, link: VirtualLink, deadline_s: float, results: list[Tensor], write: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self.link, self.deadline_s, self.results, self.write = link, deadline_s, results, write
        self.future: torch.futures.Future[list[Tensor]] = torch.futures.Future()

    def wait(self, timeout: object = None) -> bool:
        """Sleep until the link is done with it."""
        begin = time.perf_counter()
        if self.deadline_s - begin > SPIN_S:
            time.sleep(self.deadline_s - begin - SPIN_S)
        while time.perf_counter() < self.deadline_s:
            pass
        self.link.waited_s += time.perf_counter() - begin
        write, self.write = self.write, None
        if write is not None:
            with torch.no_grad():
                write()
        if not self.future.done():
            self.future.set_result(self.results)
        return True

    def is_completed(self) -> bool:
        """Whether the link is done with it."""
        return time.perf_counter() >= self.deadline_s

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Set by the wait."""
        return self.future

    def result(self) -> list[Tensor]:
        """What the wait has written."""
        return self.results


@contextmanager
def virtual_link(
    ranks: int, alpha_s: float, bandwidth_bytes_per_s: float, *, rank: int = 0, values: bool = True
) -> Iterator[VirtualLink]:
    """Make this process rank ``rank`` of ``ranks`` virtual ones, in the default process group, until the block ends.

    Args:
        ranks: how many ranks there seem to be.
        alpha_s: seconds that each collective takes beside its bytes.
        bandwidth_bytes_per_s: bytes of a whole message that the link moves in a second.
        rank: which of them this process is.
        values: whether results are computed, as if every rank held what this one does; else they are left as they are.

    Raises:
        OptionError: there is no such rank, a negative time, no bandwidth, or this process has a process group already.
    """
    if ranks < 1 or not 0 <= rank < ranks:
        raise OptionError(f"there is no rank {rank} among {ranks}", hint="ranks count from 0 to ranks - 1")
    if alpha_s < 0 or not bandwidth_bytes_per_s > 0:
        raise OptionError(
            f"a link takes alpha_s={alpha_s} seconds and bandwidth_bytes_per_s={bandwidth_bytes_per_s}",
            hint="alpha_s is 0 or more, bandwidth_bytes_per_s above 0",
        )
    if dist.is_initialized():
        raise OptionError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already ({dist.get_backend()})",
            hint="virtual ranks are for a process that has none",
        )
    link = VirtualLink(ranks, alpha_s, bandwidth_bytes_per_s, values)
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _group, devices=["cpu", "cuda"])
    token = _link.set(link)
    try:
        dist.init_process_group(BACKEND, store=_distributed.HashStore(), rank=rank, world_size=ranks)
        yield link
    finally:
        _link.reset(token)
        if dist.is_initialized():
            dist.destroy_process_group()


def _group(store: object, rank: int, size: int, timeout: object) -> VirtualGroup:
    return VirtualGroup(_link.get(), rank, size)
