"""What a stage holds: after F, between I and W, after W; for a split stage, and for any code by watching it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .halves import SplitStage

__all__ = ["LiveBytes", "StageBytes", "measured_bytes", "stage_bytes"]


@dataclass(frozen=True)
class StageBytes:
    """Bytes that one microbatch holds on a stage behind its F, its I and its W, weights and their gradients aside.

    Views count as what they are views of, once. Inputs count as far as they are needed again; torch's runtime keeps
    inputs and outputs of a microbatch until its I in any case, and buffers for messages all the time.
    """

    after_forward: int
    after_input_gradient: int
    after_weight_gradient: int = 0

    @property
    def fields(self) -> Mapping[str, int]:
        """As fields of ``compiler.pipelining.problem.Stage``: what is freed by I, by W, and what I adds."""
        until_weight_gradient = min(self.after_forward, self.after_input_gradient)
        return {
            "until_input_gradient_bytes": self.after_forward - until_weight_gradient,
            "until_weight_gradient_bytes": until_weight_gradient,
            "between_gradients_bytes": self.after_input_gradient - until_weight_gradient,
        }


def stage_bytes(
    stage: SplitStage, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None
) -> StageBytes:
    """What the graphs of ``stage`` hand over for such arguments, its example's where ``None``; nothing runs.

    Raises:
        OptionError: there is no example, and no arguments are given.
        ModelError: the stage cannot be split on these arguments.
    """
    graphs = stage.graphs(args, kwargs)
    sizes = {
        node.name: node.meta["val"].numel() * node.meta["val"].element_size()
        for half in (graphs.forward, graphs.input_gradient, graphs.weight_gradient)
        if half is not None
        for node in half.module.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    return StageBytes(sum(sizes[name] for name in graphs.held), sum(sizes[name] for name in graphs.kept))


def measured_bytes(stage: SplitStage, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> StageBytes:
    """What one microbatch with these arguments holds when it really runs; gradients and buffers are put back.

    Raises:
        ModelError: the stage cannot be split on these arguments.
    """
    before = [(parameter, parameter.grad) for parameter in stage.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in stage.buffers()]
    given = pytree.tree_map_only(torch.Tensor, _fresh, (tuple(args), dict(kwargs or {})))
    devices = sorted({leaf.device.index for leaf in pytree.tree_leaves(given) if getattr(leaf, "is_cuda", False)})
    start = stage.held_bytes()
    try:
        for parameter, _ in before:
            parameter.grad = None
        with torch.enable_grad(), torch.random.fork_rng(devices):
            returned = pytree.tree_leaves(stage(*given[0], **given[1]))
            outputs = [leaf for leaf in returned if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            held = [stage.held_bytes() - start]
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
            run = stage.dw_builder()
            held.append(stage.held_bytes() - start)
            run()
            held.append(stage.held_bytes() - start)
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return StageBytes(*held)


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that operators have made since this was entered and that are still alive.

    It sees what goes through torch's dispatcher: eager code and its backward, not the insides of compiled graphs.
    ``peak`` is the most there was behind an operator that made one. ``aside`` are modules whose gradients are left out.
    """

    def __init__(self, aside: Iterable[nn.Module] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.aside = [parameter for module in aside for parameter in module.parameters()]
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        results = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        if all(self._is_known(leaf) for leaf in results):
            return made
        given = {_key(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in results:
            if _key(leaf) not in given:
                storage = leaf.untyped_storage()
                self._seen[_key(leaf)] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, self.now())
        return made

    def now(self) -> int:
        """What is alive now."""
        self._seen = {key: seen for key, seen in self._seen.items() if not _is_gone(seen[0])}
        gradients = {_key(parameter.grad) for parameter in self.aside if parameter.grad is not None}
        return sum(nbytes for key, (_, nbytes) in self._seen.items() if key not in gradients)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        seen = self._seen.get(_key(tensor))
        return seen is not None and not _is_gone(seen[0])


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_gone(storage: StorageWeakRef) -> bool:
    gone: bool = storage.expired()  # type: ignore[no-untyped-call]
    return gone
