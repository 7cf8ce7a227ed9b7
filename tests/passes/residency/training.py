"""Graphs shaped like training steps: a chain of random sizes forward, and back again reading what it left."""

from __future__ import annotations

import random

from opweave.compiler.graph import Graph, Op, Role, Tensor

__all__ = ["training_graph"]


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
