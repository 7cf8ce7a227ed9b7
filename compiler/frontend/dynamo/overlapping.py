"""Collectives hidden behind compute, in graphs of AOTAutograd's: who decides is handed in from above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ....hw_models.model import HardwareModel
from ...overlap import OverlapOptions, Overlapped
from ...runtime.agreement import check_same_order, collective_orders
from ..collectives import is_communication, unwrapped
from .decomposed import decomposed
from .frozen import freeze

__all__ = ["Cutting", "Overlap", "communicates", "hidden", "own_inputs"]

#: Given a module, the inputs along which it may be cut, a machine, what is wanted, and, of a joint graph, how many
#: results the forward half has: how its collectives are hidden.
Overlap = Callable[[torch.fx.GraphModule, Sequence[str], HardwareModel, OverlapOptions, int | None], Overlapped]


def communicates(module: torch.fx.GraphModule) -> bool:
    """Whether a rank that runs ``module`` talks to others."""
    calls = (unwrapped(n.target, n.args, n.kwargs)[0] for n in module.graph.nodes if n.op == "call_function")
    return any(map(is_communication, calls))


def own_inputs(module: torch.fx.GraphModule, static: Sequence[int]) -> tuple[str, ...]:
    """Tensors among the inputs of ``module`` that may differ from call to call: no parameters and buffers; by name.

    Others are no tensors: symbols, and the device meshes of DTensors.
    """
    kept = frozenset(static)
    placeholders = enumerate(module.graph.find_nodes(op="placeholder"))
    own = (node for number, node in placeholders if number not in kept)
    return tuple(node.name for node in own if isinstance(node.meta.get("val"), torch.Tensor))


def hidden(
    module: torch.fx.GraphModule,
    inputs: Sequence[str],
    overlap: Overlap,
    machine: HardwareModel,
    wanted: OverlapOptions,
) -> tuple[torch.fx.GraphModule, Overlapped]:
    """``module`` in the order that hides most, held in it by control dependencies, and what became of it.

    Where that is predicted to gain too little, it is ``module`` as it is. Raises ExecutionError if ranks were to be
    compared and differ.
    ``inputs`` are those along which it may be cut, by name; with none, its operators are put in order as they are.
    """
    done = overlap(module, inputs, machine, wanted, None)
    if wanted.check_ranks:
        check_same_order(collective_orders(done.module))
    return done.module if done.reason else freeze(decomposed(done.module)), replace(done, module=None)


@dataclass
class Cutting:
    """Cuts the joint graph of a training step, before it is divided into halves; ``answer`` is the last decision."""

    overlap: Overlap
    machine: HardwareModel
    wanted: OverlapOptions
    answer: Overlapped | None = None

    def __call__(
        self, module: torch.fx.GraphModule, static: Sequence[int], forward_outputs: int
    ) -> torch.fx.GraphModule:
        """``module``, cut where that is predicted to pay."""
        if not communicates(module):
            return module
        done = self.overlap(module, own_inputs(module, static), self.machine, self.wanted, forward_outputs)
        self.answer = replace(done, module=None)
        changed: Any = done.module
        return decomposed(changed) if isinstance(changed, torch.fx.GraphModule) else module
