"""The process group of virtual ranks: what PyTorch calls for each collective, put into a link's queue.

Its methods have PyTorch's names and arguments (``torch/csrc/distributed/c10d/PyProcessGroup.hpp``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ExecutionError

__all__ = ["BACKEND", "VirtualGroup"]

BACKEND = "opweave_virtual_link"
_ProcessGroup: Any = dist.ProcessGroup  # its stubs have overloads that are for Python callers only


class Link(Protocol):
    """Where messages go; ``values`` says whether results are computed."""

    values: bool

    def post(self, kind: str, nbytes: int, results: list[Tensor], write: Callable[[], None] | None) -> Any:
        """Put a message into the queue; ``write`` computes ``results``. Returns what waits for it."""


class VirtualGroup(_ProcessGroup):  # type: ignore[misc] # see there
    """Some of the virtual ranks; its methods are those that PyTorch calls for each collective."""

    def __init__(self, link: Link, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.link, self._rank, self._size = link, rank, size

    def size(self) -> int:
        """Ranks of the group."""
        return self._size

    def rank(self) -> int:
        """Number of this process in it."""
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802 # PyTorch's name
        """As it was registered."""
        return BACKEND

    @property
    def group_name(self) -> Any:
        """The name that functional collectives know it by."""
        return dist.distributed_c10d._world.pg_names[self]

    def __repr__(self) -> str:
        return f"virtual rank {self._rank} of {self._size}"

    def _reduction(self, options: Any) -> Callable[[Tensor], Tensor]:
        """What a reduction over ranks that all hold its argument returns. Raises ExecutionError."""
        kind, known = getattr(options, "reduceOp", dist.ReduceOp.SUM), dist.ReduceOp
        if kind == known.SUM:
            return lambda operand: operand * self._size
        if kind == known.PRODUCT:
            return lambda operand: operand**self._size
        if any(kind == same for same in (known.AVG, known.MAX, known.MIN, known.BAND, known.BOR)):
            return torch.clone
        raise ExecutionError(
            f"{self!r} cannot reduce by {getattr(kind, 'op', kind)}", hint="use sum, avg, max, min or product"
        )

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        """Every rank's tensors, reduced in place. Raises ExecutionError."""
        reduced = self._reduction(options)

        def write() -> None:
            for tensor in tensors:
                tensor.copy_(reduced(tensor))

        return self.link.post("all_reduce", _bytes(tensors), tensors, write)

    allreduce_coalesced = allreduce

    def all_gather_single(self, output: Tensor, operand: Tensor, options: Any = None) -> Any:
        """The ranks' tensors, one behind the other."""
        return self.all_gather_single_coalesced([output], [operand])

    def all_gather_single_coalesced(self, outputs: list[Tensor], operands: list[Tensor], options: Any = None) -> Any:
        """The same for several tensors."""

        def write() -> None:
            for output, operand in zip(outputs, operands, strict=True):
                output.view(self._size, -1).copy_(operand.reshape(1, -1).expand(self._size, -1))

        self._poison(outputs)
        return self.link.post("all_gather", _bytes(outputs), outputs, write)

    def allgather(self, outputs: list[list[Tensor]], operands: list[Tensor], options: Any = None) -> Any:
        """The ranks' tensors, each in one of its own."""
        flat = [output for each in outputs for output in each]

        def write() -> None:
            for each, operand in zip(outputs, operands, strict=True):
                for output in each:
                    output.copy_(operand)

        return self.link.post("all_gather", _bytes(flat), flat, write)

    def reduce_scatter_single(self, output: Tensor, operand: Tensor, options: Any = None) -> Any:
        """The part of this rank of what is reduced. Raises ExecutionError."""
        return self.reduce_scatter_single_coalesced([output], [operand], options)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], operands: list[Tensor], options: Any = None
    ) -> Any:
        """The same for several tensors. Raises ExecutionError."""
        reduced = self._reduction(options)

        def write() -> None:
            for output, operand in zip(outputs, operands, strict=True):
                own = operand.reshape(self._size, -1)[self._rank]
                output.view(-1).copy_(reduced(own))

        self._poison(outputs)
        return self.link.post("reduce_scatter", _bytes(operands), outputs, write)

    def all_to_all_single(
        self,
        output: Tensor,
        operand: Tensor,
        output_sizes: Sequence[int],
        operand_sizes: Sequence[int],
        options: Any = None,
    ) -> Any:
        """From every rank its block for this one: of ranks that are all alike, this rank's own, again and again.

        Raises:
            ExecutionError: with such sizes ranks that are all alike would not send what they receive.
        """
        sizes = list(operand_sizes) or [operand.shape[0] // self._size] * self._size
        received = list(output_sizes) or [output.shape[0] // self._size] * self._size
        own = sizes[self._rank]
        if self.link.values and received != [own] * self._size:
            raise ExecutionError(
                f"virtual ranks that are all alike send {sizes}, and this one would receive {own} from each, "
                f"not {received}",
                hint="send equally much to every rank, or measure with values=False",
            )

        def write() -> None:
            block = operand[sum(sizes[: self._rank]) :][:own].clone()
            for number in range(self._size):
                output[number * own : (number + 1) * own].copy_(block)

        self._poison([output])
        return self.link.post("all_to_all", _bytes([operand]), [output], write)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> Any:
        """One rank's tensors to all: what this one holds already."""
        return self.link.post("broadcast", _bytes(tensors), tensors, None)

    def scatter(self, outputs: list[Tensor], operands: list[list[Tensor]], options: Any = None) -> Any:
        """One rank's tensors, one to each: known only if this rank has them. Raises ExecutionError."""
        if not operands:
            raise ExecutionError(f"{self!r} cannot know what another rank scatters", hint="scatter from this rank")

        def write() -> None:
            for output, each in zip(outputs, operands, strict=True):
                output.copy_(each[self._rank])

        return self.link.post("scatter", _bytes([t for each in operands for t in each]), outputs, write)

    def barrier(self, options: Any = None) -> Any:
        """Nobody to wait for."""
        return self.link.post("barrier", 0, [], None)

    def _poison(self, outputs: list[Tensor]) -> None:
        if self.link.values:
            for output in outputs:
                output.fill_(float("nan") if output.is_floating_point() or output.is_complex() else 0)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
