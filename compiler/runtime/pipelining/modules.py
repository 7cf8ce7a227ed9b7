"""Modules as stages: what torch's runtime does wrong for some of them is put right here, or found and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ....errors import ExecutionError, ModelError
from ...pipelining.schedule import ActionKind, PipelineSchedule

__all__ = ["Seams", "can_split", "check_kinds", "check_ties", "forward", "is_compiled", "left_as_it_was", "splitter"]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module``, or a part of it, runs through ``torch.compile``."""
    compiled = torch._dynamo.OptimizedModule
    return any(
        isinstance(part, compiled) or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def splitter(module: nn.Module) -> Callable[[], Callable[[], None]] | None:
    """The module's own ``dw_builder``, for a stage that splits its backward itself; ``None`` if it does not.

    Called right behind a backward that left the weights' gradients out, it returns what computes them.
    """
    found = getattr(module, "dw_builder", None)
    return found if callable(found) else None


def can_split(module: nn.Module) -> bool:
    """Whether I and W are two computations: torch splits eager autograd, and a module may bring its own way."""
    return splitter(module) is not None or not is_compiled(module)


def check_kinds(modules: Mapping[int, nn.Module], schedule: PipelineSchedule) -> None:
    """Raises ExecutionError if a stage's backward is split that cannot be: torch would run it twice, or fail."""
    split = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
    for order in schedule.orders:
        for action in order:
            if action.stage in modules and action.kind in split and not can_split(modules[action.stage]):
                raise ExecutionError(
                    f"the schedule has {action}, but stage {action.stage} is compiled: torch.compile makes one graph "
                    "of its backward, which torch would run whole for I, and again for W",
                    hint="give such stages whole backwards (see `whole_backwards`), or modules that are split "
                    "before they are compiled (SplitStage)",
                )


def check_ties(modules: Sequence[nn.Module | None], ranks: Sequence[int]) -> None:
    """Raises ModelError if stages on different ``ranks`` share a parameter; on one rank they may.

    Each rank would keep a copy with half of the gradient, and the copies would drift apart. Only modules that this
    process has are seen.
    """
    owner: dict[int, tuple[int, str]] = {}
    for stage, module in enumerate(modules):
        for name, parameter in () if module is None else module.named_parameters():
            first, its_name = owner.setdefault(id(parameter), (stage, name))
            if ranks[first] != ranks[stage]:
                raise ModelError(
                    f"stage {first} on rank {ranks[first]} and stage {stage} on rank {ranks[stage]} share a weight, "
                    f"{its_name!r} and {name!r}: each rank would train its own copy",
                    hint="put both stages on one rank (a 'v' placement does so with the first and the last), or untie",
                )


def forward(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of ``module``; a data-parallel one reduces nothing, as in torch's runtime."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            outputs = module(*inputs)
    else:
        outputs = module(*inputs)
    return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)


@contextmanager
def left_as_it_was(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back afterwards what running ``module`` changes: buffers, gradients, gathered weights, random numbers."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = [device] if device.type != "cpu" else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


class _Owned(torch.autograd.Function):
    """The same bytes as a tensor that is no view: torch detaches a stage's outputs in place, which views refuse."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Packed(torch.autograd.Function):
    """The same tensor, with a gradient that is contiguous: what is sent must be, and expanded gradients are not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class Seams:
    """Hooks at both ends of a stage, so that what passes to its neighbours can be sent; `close` takes them off.

    Outputs are contiguous and no views, the gradients of inputs contiguous. No byte is copied where that is so already.
    """

    def __init__(self, module: nn.Module) -> None:
        self._handles = [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave),
        ]

    def close(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_Packed.apply(i) if isinstance(i, Tensor) and i.requires_grad else i for i in inputs)

    @staticmethod
    def _leave(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return tree_map_only(Tensor, _own, outputs)


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    if not tensor._is_view() or not tensor.requires_grad:
        return tensor
    apply: Any = _Owned.apply
    owned: Tensor = apply(tensor)
    return owned
