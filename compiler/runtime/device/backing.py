"""Host memory behind the device: where loads come from and stores go to, as statements of the host code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....hw_models.model import aligned_bytes
from ...plan import Load, Plan, Store
from .arena import ALIGNMENT_BYTES, ArenaPool
from .program import Origin, Program

__all__ = ["Backing", "SpillPool", "flat"]


class SpillPool(ArenaPool):
    """Lends host memory, pinned where the device is not the CPU, for work on the device's current stream."""

    def _empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")


class Backing:
    """The home of each storage that ``plan`` copies.

    Inputs in host memory are copied from, and to, where the caller has them; outputs that the caller gets in host
    memory, to a fresh tensor of each call; all others have a place in the spill area, ``spill_bytes`` long.
    """

    def __init__(self, program: Program, plan: Plan, table: Callable[[Any], str]) -> None:
        self.program = program
        self.table = table  # makes a global of a value
        self.homes: dict[str, str] = {}  # variables of the bytes that have one, by storage
        self.tensors: dict[str, str] = {}  # of the caller's tensors, and of those that it gets
        self.places: dict[str, int] = {}
        self.copied = {i.buffer for i in plan.instructions if isinstance(i, Load | Store)}
        self.spill_bytes = 0
        for name in dict.fromkeys(i.buffer for i in plan.instructions if isinstance(i, Store)):
            if program.storages[name].origin not in (Origin.HOST, Origin.RETURNED):
                self.places[name] = self.spill_bytes
                self.spill_bytes += aligned_bytes(self._nbytes(name), ALIGNMENT_BYTES)

    def receive(self, storage: str, variable: str) -> list[str]:
        """Statements that take in the caller's tensor of a storage in host memory."""
        self.tensors[storage] = f"host_{storage}"
        statements = [f"host_{storage} = {variable}"]
        if storage in self.copied:
            self.homes[storage] = f"home_{storage}"
            statements.append(f"home_{storage} = flat({variable}, {self._nbytes(storage)})")
        return statements

    def home(self, storage: str) -> tuple[str, list[str], list[str]]:
        """The variable of a storage's bytes in host memory, and the statements, once and in each call, that make it."""
        if storage in self.homes:
            return self.homes[storage], [], []
        variable = self.homes[storage] = f"home_{storage}"
        nbytes = self._nbytes(storage)
        if storage in self.places:
            first = self.places[storage]
            return variable, [f"{variable} = spill[{first}:{first + nbytes}]"], []
        tensor, each = self.output(storage)
        return variable, [], [*each, f"{variable} = flat({tensor}, {nbytes})"]

    def output(self, storage: str) -> tuple[str, list[str]]:
        """The variable of the tensor over a storage in host memory, and the statements that make it."""
        if storage in self.tensors:
            return self.tensors[storage], []
        variable = self.tensors[storage] = f"host_{storage}"
        view, known = self.program.views[storage], self.program.storages[storage]
        options = f"dtype={self.table(known.dtype)}, pin_memory={known.device.type != 'cpu'}"
        empty = self.table(torch.empty_strided)
        return variable, [f"{variable} = {empty}({view.shape}, {view.strides}, {options})"]

    def _nbytes(self, storage: str) -> int:
        nbytes = self.program.storages[storage].nbytes
        assert isinstance(nbytes, int)
        return nbytes


def flat(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    """The first ``nbytes`` of a tensor's memory as one row of bytes, from its first element on."""
    first = tensor.storage_offset() * tensor.itemsize
    row = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return row.set_(tensor.untyped_storage(), first, (nbytes,), (1,))
