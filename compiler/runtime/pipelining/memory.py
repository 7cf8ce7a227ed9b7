"""What a stage holds for one microbatch: behind F until W, and between I and W, as torch's eager split leaves it.

autograd is asked what its nodes have saved, so that compiled stages and any device are measured alike. Weights, and
what passes between stages, are left out: weights are resident, and messages are held by the runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .execute import Loss
from .halves import SplitStage
from .modules import forward, left_as_it_was, split_stage

__all__ = ["Held", "held_by", "saved_by"]

_Storages = dict[int, int]  # bytes, by address


@dataclass(frozen=True)
class Held:
    """Bytes of one microbatch, in a stage's words (`Stage`)."""

    until_input_gradient_bytes: int
    until_weight_gradient_bytes: int
    between_gradients_bytes: int


def held_by(
    module: nn.Module, inputs: Sequence[Tensor], loss: Loss | None, target: Any, *, first: bool, whole: bool
) -> Held:
    """What ``module`` holds for a microbatch of ``inputs``; of the last stage with its ``loss`` of ``target``.

    A split backward in eager mode frees nothing at I, and adds the gradients at which its W begins, but on the first
    stage, where I does nothing. A stage whose backward is ``whole`` holds all until I. Of a `SplitStage` the graphs
    tell what passes the ends of F and I, and its loss's share is free behind I.
    """
    with left_as_it_was(module, inputs[0].device), torch.enable_grad():
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        outputs: Sequence[Tensor] = forward(module, inputs)
        ends = outputs
        if loss is not None:
            ends = (loss(outputs[0] if len(outputs) == 1 else tuple(outputs), target),)
        known = _storages([*module.parameters(), *module.buffers(), *inputs, *tree_leaves(target)])
        known |= _storages(outputs if loss is None else ())
        saved = {key: size for key, size in saved_by(ends).items() if key not in known}
        total = sum(saved.values())
        split = split_stage(module)
        if split is not None:
            passes_forward, passes_input_gradient = _handed_over(split, inputs)
            later = min(passes_forward, passes_input_gradient)
            return Held(total + passes_forward - later, later, passes_input_gradient - later)
        if whole:
            return Held(total, 0, 0)
        if first:
            return Held(0, total, 0)
        return Held(0, total, _kept_by_split(module, inputs, ends, {*known, *saved}))


def _handed_over(stage: SplitStage, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes that F, and that I, leave for later; what stages or the runtime hold anyway is none of them."""
    graphs = stage.graphs(inputs)
    halves = [half for half in (graphs.forward, graphs.input_gradient) if half is not None]
    nodes = [node for half in halves for node in half.module.graph.nodes]
    sizes = {node.name: node.meta["val"].nbytes for node in nodes if isinstance(node.meta.get("val"), Tensor)}
    held, kept = (sum(sizes[n] for n, place in of.items() if place is None) for of in (graphs.held, graphs.kept))
    return held, kept


def saved_by(ends: Iterable[Tensor]) -> _Storages:
    """The storages that a backward from ``ends`` would read, by address: bytes of each."""
    found: _Storages = {}
    seen: set[Any] = set()
    stack = [end.grad_fn for end in ends if end.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found |= _storages(_saved(node))
        stack += [behind for behind, _ in node.next_functions if behind is not None]
    return found


def _saved(node: Any) -> Iterator[Tensor]:
    if hasattr(node, "saved_tensors"):  # of functions written in Python, as compiled ones are
        yield from (tensor for tensor in node.saved_tensors if tensor is not None)
        return
    for name in dir(node):
        if name.startswith("_saved_"):
            yield from (leaf for leaf in tree_leaves(getattr(node, name)) if isinstance(leaf, Tensor))


def _storages(tensors: Iterable[Any]) -> _Storages:
    parts = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts if t.numel()}


def _kept_by_split(module: nn.Module, inputs: Sequence[Tensor], ends: Sequence[Tensor], known: set[int]) -> int:
    """Bytes of the gradients that torch keeps from I for W, beside what was saved."""
    from torch.distributed.pipelining._backward import stage_backward_input

    if not any(tensor.requires_grad for tensor in inputs):
        return 0
    gradients = [torch.ones_like(end) for end in ends]
    known |= _storages(gradients).keys()
    _, groups = stage_backward_input(list(ends), gradients, list(inputs), module.parameters())
    kept = _storages(leaf for group in groups for leaf in tree_leaves(group.get("grads")))
    return sum(size for key, size in kept.items() if key not in known)
