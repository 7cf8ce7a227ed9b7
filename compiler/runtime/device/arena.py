"""The bytes that programs share, one block for each device and stream at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

__all__ = ["ALIGNMENT_BYTES", "ArenaPool", "Pool", "TransientPool"]

ALIGNMENT_BYTES = 512  # what PyTorch's CUDA caching allocator aligns to; more than any vector load needs


class Pool(Protocol):
    """Lends blocks of bytes."""

    def lend(self, nbytes: int, device: torch.device) -> AbstractContextManager[torch.Tensor]:
        """A block of at least ``nbytes`` on ``device``, for work on the current stream."""


class TransientPool:
    """Lends one program a block for each call, and gives its memory back behind it; the tensor stays, without bytes.

    So a forward pass does not hold what its backward pass will need. Host code stays bound to the tensor.
    """

    def __init__(self) -> None:
        self._idle: list[tuple[torch.device, int, torch.Tensor]] = []

    @contextmanager
    def lend(self, nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
        """A block of ``nbytes`` on ``device``, for work on the current stream."""
        try:
            kept = self._idle.pop()
        except IndexError:
            kept = None
        if kept is not None and kept[:2] == (device, nbytes):
            block = kept[2]
            block.untyped_storage().resize_(nbytes)
        else:
            with torch.inference_mode(False):  # whoever is lent it may write to it in any mode
                block = torch.empty(nbytes, dtype=torch.uint8, device=device)
        try:
            yield block
        finally:
            _free(block)
            self._idle.append((device, nbytes, block))


class ArenaPool:
    """Lends one block of bytes to each call, and keeps the largest returned for the next one.

    All inference programs of a process share it. A second call at the same time gets a block of its own.
    ``allocated_bytes`` is what is kept or lent now.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._lock = threading.Lock()
        self._lent = 0

    @contextmanager
    def lend(self, nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
        """A block of at least ``nbytes`` on ``device``, for work on the current stream."""
        key = (device, _current_stream(device))
        with self._lock:
            block = self._idle.pop(key, None)
        if block is None or block.numel() < nbytes:
            if block is not None:
                _free(block)  # before its successor is allocated
            with torch.inference_mode(False):  # whoever is lent it may write to it in any mode
                block = self._allocate(nbytes, device)
        try:
            with self._lock:
                self._lent += block.numel()
            yield block
        finally:
            with self._lock:
                self._lent -= block.numel()
                kept = self._idle.get(key)
                if kept is None or kept.numel() < block.numel():
                    self._idle[key], block = block, kept
            if block is not None:
                _free(block)

    def _empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def _allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        block = self._empty(nbytes + ALIGNMENT_BYTES, device)
        skip = -block.data_ptr() % ALIGNMENT_BYTES
        return block[skip : skip + nbytes]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all blocks, lent and idle."""
        with self._lock:
            return self._lent + sum(block.numel() for block in self._idle.values())

    def clear(self) -> None:
        """Give back every idle block."""
        with self._lock:
            idle = list(self._idle.values())
            self._idle.clear()
        for block in idle:
            _free(block)


def _free(block: torch.Tensor) -> None:
    """Give back a block's memory now: host code that was bound to it may live on, and is bound anew when it runs."""
    block.untyped_storage().resize_(0)


def _current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
