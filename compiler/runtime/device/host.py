"""Programs whose tensors stay in host memory: weights that are copied once or in each call, results that come back.

A program made for a device is turned into one whose inputs and outputs lie in host memory (``on_host``). Its plan loads
what it reads and stores what the caller gets. Weights that stay on the device between calls (``with_resident``) are
copied when they are first needed and again when they have changed.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from .arena import ArenaPool
from .backing import flat
from .code import placed
from .executor import POOL, Executor
from .layout import DevicePlan
from .program import Origin, Program, Ref, span_elements

__all__ = ["HostExecutor", "HostMemory", "HostPlan", "on_host", "residents", "with_resident"]

_HOST = torch.device("cpu")
#: What a tensor's copy is known by: address, dtype, shape and strides.
Key = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


def on_host(program: Program) -> Program:
    """``program`` with its inputs and outputs in host memory: the plan loads the former and stores the latter."""
    moved = {Origin.INPUT: Origin.HOST, Origin.OUTPUT: Origin.RETURNED}
    return replace(
        program,
        storages={n: replace(s, origin=moved.get(s.origin, s.origin)) for n, s in program.storages.items()},
    )


def residents(program: Program, weights: Collection[int]) -> frozenset[str]:
    """Storages in host memory, of those at the positions ``weights`` among the inputs, that no call writes."""
    written = {name for call in program.calls for name in call.writes}
    inputs = (item for position, item in enumerate(program.inputs) if position in weights)
    names = {program.storage_of(item).name for item in inputs if isinstance(item, Ref)}
    return frozenset(n for n in names - written if program.storages[n].origin is Origin.HOST)


def with_resident(program: Program, resident: Collection[str]) -> Program:
    """``program`` with the storages ``resident`` on the device, where the caller has copies of what is on the host."""
    storages = {
        name: replace(storage, origin=Origin.INPUT) if name in resident else storage
        for name, storage in program.storages.items()
    }
    return replace(program, storages=storages)


def key_of(tensor: torch.Tensor) -> Key:
    """What tells apart the tensors that have copies."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _span_bytes(tensor: torch.Tensor) -> int:
    return span_elements(tuple(tensor.shape), tensor.stride()) * tensor.itemsize


@dataclass(frozen=True)
class HostPlan(DevicePlan):
    """A plan for a program ``on_host``, made with the weights ``resident`` on the device.

    They take ``resident_bytes``; all weights that stay, those of other programs included, may take ``room_bytes``. A
    call loads ``loaded_bytes``, and takes ``bound_s`` seconds at least, whatever stays, in the plan's order.
    """

    resident: frozenset[str] = frozenset()
    resident_bytes: int = 0
    room_bytes: int = 0
    loaded_bytes: int = 0
    bound_s: float = 0.0


@dataclass(frozen=True)
class _Copy:
    """A tensor on the device, and what it was copied from; holding on to that keeps its address from being reused."""

    source: torch.Tensor
    version: int
    tensor: torch.Tensor
    nbytes: int


class HostMemory:
    """Copies on ``device`` of tensors in host memory, and their pinning; shared by all programs of a model.

    A copy is made again when its tensor has another address, or has been changed in place since. Changes that PyTorch
    does not count, as those through ``tensor.data``, are not seen: ``forget`` makes every copy anew. Tensors made in
    inference mode have no such count and are copied each time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[Key, _Copy] = {}
        self._seen: set[int] = set()
        self._registered: dict[int, torch.UntypedStorage] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _unregister, self._registered)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device, with the same strides."""
        key = key_of(tensor)
        version = -1 if tensor.is_inference() else tensor._version
        with self._lock:
            known = self._copies.get(key)
            if known is not None and known.version == version >= 0:
                return known.tensor
            nbytes = _span_bytes(tensor)
            if known is None:
                row = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
                copy = placed(row, 0, tuple(tensor.shape), tensor.stride(), tensor.dtype)
                known = _Copy(tensor.detach(), version, copy, nbytes)
            flat(known.tensor, nbytes).copy_(flat(tensor.detach(), nbytes))
            self._copies[key] = replace(known, version=version)
            return known.tensor

    def pin(self, tensor: torch.Tensor) -> None:
        """Lock a tensor's host memory in place, so that copy engines reach it by themselves; once for each storage.

        Where that is refused, as for memory that maps a file, copies go through a buffer of the driver's: slower, and
        warned of once.
        """
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if self.device.type != "cuda" or not address:
            return
        with self._lock:
            if address in self._seen or tensor.is_pinned():
                return
            self._seen.add(address)
            refusal = _register(storage)
            if refusal:
                _forget_error(self.device)
            else:
                self._registered[address] = storage
        if refusal:
            warnings.warn(f"host memory of a weight cannot be pinned ({refusal}): it is copied slower", stacklevel=2)

    def make_room(self, keys: Collection[Key], nbytes: int) -> None:
        """Drop copies other than ``keys``, the oldest first, until these others take no more than ``nbytes``."""
        with self._lock:
            others = {key: copy.nbytes for key, copy in self._copies.items() if key not in keys}
            taken = sum(others.values())
            for key, freed in others.items():
                if taken <= nbytes:
                    return
                del self._copies[key]
                taken -= freed

    def forget(self, key: Key | None = None) -> None:
        """Drop the copy of one tensor, or all of them."""
        with self._lock:
            if key is None:
                self._copies.clear()
            else:
                self._copies.pop(key, None)

    @property
    def copied_bytes(self) -> int:
        """Bytes of all copies on the device."""
        with self._lock:
            return sum(copy.nbytes for copy in self._copies.values())


def _register(storage: torch.UntypedStorage) -> str:
    """Pin a storage's memory; returns why that was refused, or nothing."""
    try:
        code = int(_cudart().cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return f"CUDA error {code}" if code else ""


def _forget_error(device: torch.device) -> None:
    """Let a launch find the error that a refusal leaves behind, which the next one would be blamed for."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).fill_(1)


def _unregister(registered: Mapping[int, torch.UntypedStorage]) -> None:
    for address in registered:
        _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class HostExecutor:
    """Runs ``program``, as ``on_host`` made it, under a plan made for it with the weights ``resident``.

    Inputs at the positions ``weights`` are expected to stay where they are between calls. Called with a list of inputs
    in host memory, which it empties; returns a tuple of outputs there, complete. ``memory`` holds the copies; those of
    other programs go before a call where all would take more than ``room_bytes``.
    """

    def __init__(
        self,
        program: Program,
        device_plan: DevicePlan,
        resident: Collection[str],
        *,
        weights: Sequence[int],
        memory: HostMemory,
        kernels: Mapping[str, Any] | None = None,
        pool: ArenaPool = POOL,
        room_bytes: int | None = None,
    ) -> None:
        self.memory, self.room_bytes = memory, room_bytes
        planned = with_resident(program, resident)
        self.executor = Executor(planned, device_plan, device=memory.device, kernels=kernels, pool=pool)
        self.kernels, self.code = self.executor.kernels, self.executor.code
        origins = [planned.storage_of(item).origin if isinstance(item, Ref) else None for item in planned.inputs]
        self._resident = [i for i, origin in enumerate(origins) if origin is Origin.INPUT]
        self._keys: dict[int, Key] = {}
        self._streamed = [i for i, origin in enumerate(origins) if origin is Origin.HOST and i in weights]

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Run it."""
        for position in self._streamed:
            self.memory.pin(inputs[position])
        keys = {position: key_of(inputs[position]) for position in self._resident}
        for position, before in self._keys.items():
            if before != keys[position]:  # the weight has moved: what it was is not needed any more
                self.memory.forget(before)
        self._keys = keys
        if self.room_bytes is not None:
            own = sum(_span_bytes(inputs[position]) for position in keys)
            self.memory.make_room(set(keys.values()), self.room_bytes - own)
        for position in self._resident:
            inputs[position] = self.memory.copy_of(inputs[position])
        outputs = tuple(_to_host(output) for output in self.executor(inputs))
        if self.memory.device.type == "cuda":
            torch.cuda.current_stream(self.memory.device).synchronize()
        return outputs


def _to_host(output: Any) -> Any:
    if isinstance(output, torch.Tensor) and output.device != _HOST:
        return output.to(_HOST)
    return output
