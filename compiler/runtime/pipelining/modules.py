"""Modules as stages: what torch's runtime does wrong for some of them is put right here, or found and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ....errors import ExecutionError, ModelError
from ...pipelining.schedule import ActionKind, PipelineSchedule
from .halves import SplitStage

__all__ = [
    "Seams",
    "check_kinds",
    "check_ties",
    "evaluating",
    "forward",
    "left_as_it_was",
    "split_stage",
    "splitter",
    "why_whole",
]


def split_stage(module: nn.Module) -> SplitStage | None:
    """The SplitStage that ``module`` is, also under fully_shard or inside of DDP; ``None`` if torch splits it.

    Raises:
        ModelError: a part of the module splits its backward, where torch would never ask for the other half; or DDP
            looks for unused parameters, which it does in the graph of a backward that has no weights.
    """
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    if isinstance(inner, SplitStage):
        if isinstance(module, DistributedDataParallel) and module.find_unused_parameters:
            raise ModelError(
                "DDP looks for unused parameters in a backward that has no weights",
                hint="leave out find_unused_parameters, or do not split the stage",
            )
        return inner
    name = next((name for name, part in module.named_modules() if isinstance(part, SplitStage)), None)
    if name is not None:
        raise ModelError(
            f"{name!r} of a {type(module).__name__} is a SplitStage, whose W torch would never ask for",
            hint="a SplitStage is a stage itself: wrap the whole stage's module, then shard or replicate it",
        )
    return None


def splitter(module: nn.Module) -> Callable[[], Callable[[], None]] | None:
    """What torch calls ``dw_builder``: right behind a backward that left out the weights' gradients, it returns what
    computes them. ``None`` if the stage has none of its own. Raises ModelError, as `split_stage`.
    """
    split = split_stage(module)
    if split is not None:
        return split.dw_builder
    found = getattr(module, "dw_builder", None)
    return found if callable(found) else None


def why_whole(module: nn.Module, stage: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """Why the backward of ``module`` must not be split into I and W by torch; empty if it may be.

    ``outputs`` are of one forward from ``inputs``. The first stage's I does nothing, and its W everything.
    """
    if splitter(module) is not None:
        return ""
    if _is_compiled(module):
        return "torch.compile makes one graph of its backward, which would run whole for I, and again for W"
    if stage == 0:
        return ""
    if (
        isinstance(module, DistributedDataParallel | FullyShardedDataParallel)
        and dist.get_world_size(_group(module)) > 1
    ):
        return f"{type(module).__name__} reduces gradients in hooks of autograd, which W does not call"
    for number, output in enumerate(outputs):
        if output.requires_grad and not _depends(output, inputs):
            return (
                f"its output {number} does not depend on an input that needs a gradient, and what its weights get from "
                "there would be lost in W"
            )
    return ""


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``module``, or a part of it, runs through ``torch.compile``."""
    compiled = torch._dynamo.OptimizedModule
    return any(
        isinstance(part, compiled) or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def _group(module: nn.Module) -> Any:
    return module.process_group


def _depends(output: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether a backward from ``output`` reaches one of ``inputs``."""
    wanted = {id(tensor) for tensor in inputs if tensor.requires_grad}
    seen: set[Any] = set()
    stack = [output.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        stack += [behind for behind, _ in node.next_functions]
    return False


def check_kinds(whole: Mapping[int, str], schedule: PipelineSchedule) -> None:
    """Raises ExecutionError if ``schedule`` splits a backward that is ``whole``, by stage, for a reason."""
    split = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
    for order in schedule.orders:
        for action in order:
            if action.stage in whole and action.kind in split:
                raise ExecutionError(
                    f"the schedule has {action}, but the backward of stage {action.stage} cannot be split: "
                    f"{whole[action.stage]}",
                    hint="let this stage do B (see `whole_backwards`), or make a SplitStage of its module",
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


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """``modules`` in evaluation; every part of them is in the mode that it was in afterwards."""
    parts = [(part, part.training) for module in modules for part in module.modules()]
    for module, training in parts:
        if training:
            module.eval()
    try:
        yield
    finally:
        for part, training in parts:  # those outside before those inside, which may be in another mode
            if part.training != training:
                part.train(training)


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
            module.register_forward_hook(self._leave, prepend=True),
        ]

    def close(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        packed: Any = _Packed.apply
        return tuple(packed(i) if isinstance(i, Tensor) and i.requires_grad else i for i in inputs)

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
