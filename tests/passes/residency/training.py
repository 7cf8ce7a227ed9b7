"""Graphs shaped like training steps: a chain of random sizes forward, and back again reading what it left.

``tight`` puts any graph on a scratchpad that is short of room.
"""

from __future__ import annotations

import random

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import machine

__all__ = ["tight", "training_graph"]


def training_graph(layers: int, seed: int = 0) -> Graph:
    """``layers`` operators forward, each with a shortcut now and then, a loss, and a gradient for each; int8 rows."""
    draw = random.Random(seed)
    tensors = [Tensor("a0", (draw.randint(50, 1000),), "int8", Role.INPUT)]
    ops: list[Op] = []

    def add(name: str, inputs: tuple[str, ...], nbytes: int) -> None:
        tensors.append(Tensor(name, (nbytes,), "int8"))
        ops.append(Op(f"op_{name}", tuple(dict.fromkeys(inputs)), (name,)))

    shortcuts = [draw.randint(max(0, layer - 4), layer) for layer in range(layers)]
    for layer, shortcut in enumerate(shortcuts):
        add(f"a{layer + 1}", (f"a{layer}", f"a{shortcut}"), draw.randint(50, 1000))
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    add(f"g{layers}", (f"a{layers}",), sizes[f"a{layers}"])
    for layer in reversed(range(layers)):
        add(f"g{layer}", (f"g{layer + 1}", f"a{layer}", f"a{shortcuts[layer]}"), sizes[f"a{layer}"])
    return Graph("training", tuple(tensors), tuple(ops), ("g0",))


def tight(graph: Graph, share: float = 0.0, *, alignment: int = 16, streamed: tuple[str, ...] = ()) -> Plan:
    """The graph in program order on a scratchpad between the least that works (0.0) and the order's peak (1.0).

    It is rounded up to the alignment.
    """
    ample = Plan.of_order(graph, machine(1 << 30, alignment), streamed=streamed)
    least, peak = least_capacity(ample), verify(ample).peak_bytes
    capacity = max(1, -(-int(least + share * max(0, peak - least)) // alignment)) * alignment
    return Plan.of_order(graph, machine(capacity, alignment), streamed=streamed)
