"""Experts and routers in their new places: for stacked weights, lists of modules, and models that have either.

Row ``p`` of what is new is row ``order[p]`` of what was. The router's rows move with the experts, so its numbers are
places, and a token meets the same experts with the same weights. The results are bitwise the same where sums are over a
token's choices in their order. What may change otherwise: which of two experts with exactly equal scores is taken, and
the last bits, where scores are normalised over all experts, or more than two results are added by expert's number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ModelError
from .placement import ExpertPlacement

__all__ = ["ExpertLayer", "apply_to_model", "expert_layers", "permuted"]

ROUTERS = ("gate", "router")
GROUPED = ("n_group", "n_groups", "num_expert_group")  # attributes of those that route by groups first (DeepSeek-V3)


def permuted(weight: Tensor, order: Sequence[int]) -> Tensor:
    """``weight`` [experts, ...] with its rows in ``order``; the same dtype and device, no gradient history.

    Raises:
        ModelError: another number of rows.
    """
    if not weight.ndim or weight.shape[0] != len(order):
        raise ModelError(f"a weight of shape {list(weight.shape)} has no rows for {len(order)} experts")
    return weight.detach()[torch.tensor(order, dtype=torch.long, device=weight.device)]


@dataclass(frozen=True)
class ExpertLayer:
    """One layer: ``block``, ``name`` in the model, has ``experts``, a list or stacked tensors, and a ``router``."""

    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module

    @property
    def count(self) -> int:
        """How many experts there are: the router's rows."""
        return int(_router_weight(self.router).shape[0])


def expert_layers(model: nn.Module) -> Iterator[ExpertLayer]:
    """Layers of ``model`` with experts, in its own order.

    Recognised by their parts: a child ``experts``, and a child ``gate`` or ``router`` with a ``weight`` of a row an
    expert (itself or its only linear layer), as Mixtral, Qwen-MoE, OLMoE and DeepSeek have them in transformers.

    Raises:
        ModelError: a layer has experts, but no router that fits them.
    """
    for name, block in model.named_modules():
        children = dict(block.named_children())
        experts = children.get("experts")
        if experts is None:
            continue
        routers = [children[key] for key in ROUTERS if key in children]
        if not routers:
            raise ModelError(f"module {name!r} has experts but no {' or '.join(ROUTERS)}; how it routes is not known")
        yield _checked(ExpertLayer(name, block, experts, routers[0]))


def apply_to_model(model: nn.Module, placement: ExpertPlacement) -> int:
    """Put the experts and router rows of ``model`` into their places, in place; returns how many tensors moved.

    All layers are checked before anything is moved. Parameters stay the same objects, so optimizers keep them; their
    state, if there is any, has to be permuted likewise.

    Raises:
        ModelError: the model has other layers or numbers of experts than the placement, or a layout that is not known.
    """
    layers = list(expert_layers(model))
    if len(layers) != len(placement.order):
        raise ModelError(
            f"the model has {len(layers)} layers with experts, the placement {len(placement.order)}",
            hint="the trace has to be one of this model, with all of its expert layers in order",
        )
    for layer, order in zip(layers, placement.order, strict=True):
        if layer.count != len(order):
            raise ModelError(f"layer {layer.name!r} has {layer.count} experts, the placement {len(order)}")
    for layer in layers:
        _by_expert(layer.router, layer.count)
    return sum(_permute(layer, order) for layer, order in zip(layers, placement.order, strict=True))


def _router_weight(router: nn.Module) -> Tensor:
    weight = getattr(router, "weight", None)
    if weight is None:
        linear = [child for child in router.modules() if isinstance(child, nn.Linear)]
        weight = linear[0].weight if len(linear) == 1 else None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"a router of type {type(router).__name__} has no weight of a row an expert")
    return weight


def _checked(layer: ExpertLayer) -> ExpertLayer:
    for part in (layer.block, layer.router):
        for name in GROUPED:
            groups = getattr(part, name, None)
            if isinstance(groups, int) and groups > 1:
                raise ModelError(
                    f"layer {layer.name!r} chooses among {groups} groups of neighbouring experts, which other places "
                    "would take apart",
                    hint="place groups instead of experts, or leave this model as it is",
                )
    rows = len(layer.experts) if isinstance(layer.experts, nn.ModuleList) else None
    if rows is not None and rows != layer.count:
        raise ModelError(f"layer {layer.name!r} has {rows} experts and a router for {layer.count}")
    if rows is None:
        tensors = dict(layer.experts.named_parameters()) | dict(layer.experts.named_buffers())
        wrong = [key for key, value in tensors.items() if not value.ndim or value.shape[0] != layer.count]
        if wrong or not tensors:
            raise ModelError(
                f"layer {layer.name!r} keeps its experts in a way that is not known: "
                + (f"{wrong[0]!r} has no row for each of {layer.count}" if wrong else "it has no tensors"),
                hint="known are lists of modules, and tensors of shape [experts, ...]",
            )
    return layer


@torch.no_grad()
def _permute(layer: ExpertLayer, order: Sequence[int]) -> int:
    moved = 0
    for tensor in _by_expert(layer.router, layer.count):
        tensor.copy_(permuted(tensor, order))
        moved += 1
    if isinstance(layer.experts, nn.ModuleList):
        modules = list(layer.experts)
        for place, expert in enumerate(order):
            layer.experts[place] = modules[expert]
        return moved + len(order)
    for tensor in (*layer.experts.parameters(), *layer.experts.buffers()):
        tensor.copy_(permuted(tensor, order))
        moved += 1
    return moved


def _by_expert(router: nn.Module, count: int) -> list[Tensor]:
    """The router's tensors of a row an expert: its weight, and vectors such as a bias or corrections of scores."""
    weight = _router_weight(router)
    found = [weight]
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        if tensor is weight or not tensor.ndim or tensor.shape[0] != count:
            continue
        if tensor.ndim > 1 or (weight.shape[1] == count and not name.endswith("bias")):
            raise ModelError(
                f"tensor {name!r} of a router of type {type(router).__name__} has shape {list(tensor.shape)}; "
                f"whether its rows belong to the {count} experts is not known"
            )
        found.append(tensor)
    return found
