"""What passes between stages: shapes, strides and dtypes, found once by running each stage where its weights are.

torch finds them itself in the first step otherwise, with a real forward and backward that leave traces: batch norms
count a microbatch too many, and modules that keep something for their W keep too much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ....errors import ExecutionError, OpweaveError
from .modules import forward, left_as_it_was, why_whole
from .together import Group, together

__all__ = ["Boundary", "Chain", "TensorFacts", "buffer_bytes", "chain_of"]

_T = TypeVar("_T")


class TensorFacts(msgspec.Struct, frozen=True):
    """A tensor without its values; ``dtype`` is torch's name of it, without ``torch.``."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorFacts:
        """Those of ``tensor``."""
        name = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), tuple(tensor.stride()), name, tensor.requires_grad)

    def zeros(self, device: torch.device) -> Tensor:
        """Such a tensor, of zeros, that depends on nothing."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=getattr(torch, self.dtype), device=device).zero_()
        return tensor.requires_grad_(self.requires_grad)

    @property
    def nbytes(self) -> int:
        """What one takes."""
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        size: int = getattr(torch, self.dtype).itemsize
        return 0 if 0 in self.shape else span * size

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Boundary = tuple[TensorFacts, ...]


@dataclass(frozen=True)
class Chain:
    """What is known of all stages on every rank.

    ``boundaries`` are the inputs of each stage, and at the end the outputs of the last, for one microbatch. ``whole``
    are the stages whose backward cannot be split into I and W, with the reason.
    """

    boundaries: tuple[Boundary, ...]
    whole: Mapping[int, str]


def chain_of(
    modules: Mapping[int, nn.Module],
    inputs: Sequence[Tensor] | None,
    ranks: Sequence[int],
    device: torch.device,
    group: Group = None,
) -> Chain:
    """What passes between the stages, found on their ranks and told to all.

    ``modules`` are this rank's stages, ``ranks`` the rank of every stage, ``inputs`` one microbatch's for stage 0,
    needed on its rank. Each stage runs forward once; what that changes is put back.

    Raises:
        ExecutionError: on every rank: a stage fails, or hands on something that cannot be sent.
    """
    here = dist.get_rank(group)
    given = together(lambda: tuple(map(TensorFacts.of, inputs or ())) if here == ranks[0] else (), group)
    chain: list[Boundary] = [_told(given, ranks[0], group)]
    whole: dict[int, str] = {}
    for stage, rank in enumerate(ranks):

        def found(stage: int = stage, rank: int = rank) -> tuple[Boundary, str]:
            if rank != here:
                return (), ""
            values = inputs if stage == 0 else [facts.zeros(device) for facts in chain[-1]]
            return _outputs(stage, modules[stage], values or (), device, stage == len(ranks) - 1)

        boundary, reason = _told(together(found, group), rank, group)
        chain.append(boundary)
        if reason:
            whole[stage] = reason
    return Chain(tuple(chain), whole)


def _told(value: _T, rank: int, group: Group) -> _T:
    """The value that ``rank`` has."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=rank)
    return box[0]


def _outputs(
    stage: int, module: nn.Module, inputs: Sequence[Tensor], device: torch.device, last: bool
) -> tuple[Boundary, str]:
    try:
        with left_as_it_was(module, device), torch.enable_grad():
            outputs = forward(module, inputs)
            found = tuple(TensorFacts.of(out) if _plain(out) else out for out in outputs)
            tensors = [out for out in outputs if isinstance(out, Tensor)]
            reason = why_whole(module, stage, inputs, tensors)
    except OpweaveError:
        raise
    except Exception as error:
        shapes = ", ".join(str(TensorFacts.of(tensor)) for tensor in inputs)
        raise ExecutionError(
            f"stage {stage} fails on inputs {shapes}: {error}",
            hint="each stage is called with what the one before it returns, tensors only",
        ) from error
    for out in found:
        if not isinstance(out, TensorFacts) and not last:
            what = "a DTensor" if isinstance(out, DTensor) else f"a {type(out).__name__}"
            raise ExecutionError(
                f"stage {stage} returns {what}; stages hand on plain tensors",
                hint="return a tensor or a tuple of tensors; gather DTensors at the end of the stage (`to_local`)",
            )
    return tuple(out for out in found if isinstance(out, TensorFacts)), reason


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor)


def buffer_bytes(boundaries: Sequence[Boundary], ranks: Sequence[int], microbatches: int, number: int) -> list[int]:
    """What torch's runtime holds of messages on each of ``number`` ranks at the end of a step.

    For every microbatch, and for what passes a boundary between ranks, that is on either side a buffer to receive into,
    made before the first step and kept, and what was sent, kept until all of the step is done. What passes between two
    stages of a rank is held once, until the next step replaces it.
    """
    held = [0] * number
    for stage, (before, behind) in enumerate(pairwise(ranks), 1):
        there = sum(facts.nbytes for facts in boundaries[stage])
        back = sum(facts.nbytes for facts in boundaries[stage] if facts.requires_grad)
        for rank in {before, behind}:
            held[rank] += microbatches * (there + back)
    return held
