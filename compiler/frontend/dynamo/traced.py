"""What AOTAutograd hands over: a traced module and its example inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["copied", "device_of", "sized_example"]


def copied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``module`` again, for lowering to change: the original is left for stock Inductor, or the next attempt."""
    graph = copy.deepcopy(module.graph)
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    fresh = torch.fx.GraphModule(module, graph)
    fresh.meta = dict(module.meta)
    return fresh


def device_of(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> torch.device:
    """The device a graph runs on: that of its tensors, an accelerator before the host.

    The seeds that attention saves are traced on ``meta``: only a call knows where they are.
    """
    tensors = [item for item in inputs if isinstance(item, torch.Tensor)]
    tensors += [n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    devices = [tensor.device for tensor in tensors]
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


def sized_example(item: Any) -> Any:
    """``item`` with numbers for symbolic sizes: those for which the graph was traced; a tensor without its data."""
    if isinstance(item, torch.SymInt):
        return int(item.node.hint) if item.node.has_hint() else 1
    if isinstance(item, torch.Tensor):
        shape, strides = ([sized_example(size) for size in sizes] for sizes in (item.shape, item.stride()))
        return torch.empty_strided(shape, strides, device="meta")
    return item
