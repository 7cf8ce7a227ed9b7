"""A hand-made graph of tensor-parallel layers, with the calls that a captured one has, and cuts of it."""

from __future__ import annotations

from opweave.compiler.graph import Collective, CollectiveKind, Graph, Op, OpKind, Role, Tensor
from opweave.passes.overlap.choice import Alternative

__all__ = ["cut", "dense"]

HIDDEN, INNER = 8192, 3584


def dense(sizes: tuple[int, ...], layers: int = 2) -> Alternative:
    """``layers`` blocks of a product, an all-reduce, a residual with normalisation, for parts of ``sizes`` tokens.

    With one size, the program as given: operators without a part.
    """
    tensors: list[Tensor] = []
    ops: list[Op] = []
    parts: dict[str, int] = {}
    origin: dict[str, str] = {}
    ranks = tuple(range(8))

    def made(name: str, shape: tuple[int, ...], role: Role = Role.ACTIVATION) -> str:
        tensors.append(Tensor(name, shape, "bfloat16", role))
        return name

    def run(name: str, body: str, inputs: tuple[str, ...], shape: tuple[int, ...], flops: int, part: int) -> str:
        own = f"{name}_part{part}" if len(sizes) > 1 else name
        collective = None
        if body == "reduce":
            collective = Collective(CollectiveKind.ALL_REDUCE, "0", ranks, 2 * shape[0] * shape[1])
            body = "_c10d_functional.all_reduce.default(%0, 'sum', '0')"
        kind = OpKind.COMPUTE if collective is None else OpKind.COLLECTIVE
        ops.append(Op(own, inputs, (made(own, shape),), kind, flops, body, collective=collective))
        if len(sizes) > 1:
            parts[own], origin[own] = part, name
        return own

    last = [made(f"x{part}", (size, HIDDEN), Role.INPUT) for part, size in enumerate(sizes)]
    for layer in range(layers):
        up = made(f"w_up{layer}", (HIDDEN, INNER), Role.WEIGHT)
        down = made(f"w_down{layer}", (INNER, HIDDEN), Role.WEIGHT)
        for part, size in enumerate(sizes):
            wide, narrow = (size, INNER), (size, HIDDEN)
            flops = 2 * size * HIDDEN * INNER
            inner = run(f"mm{layer}", "aten.mm.default(%0, %1)", (last[part], up), wide, flops, part)
            inner = run(f"relu{layer}", "aten.relu.default(%0)", (inner,), wide, size * INNER, part)
            inner = run(f"mm_{layer}", "aten.mm.default(%0, %1)", (inner, down), narrow, flops, part)
            total = run(f"all_reduce{layer}", "reduce", (inner,), narrow, 0, part)
            total = run(f"add{layer}", "aten.add.Tensor(%0, %1)", (total, last[part]), narrow, size * HIDDEN, part)
            last[part] = run(f"relu_{layer}", "aten.relu.default(%0)", (total,), narrow, size * HIDDEN, part)
    graph = Graph("dense", tuple(tensors), tuple(ops), tuple(last))
    return Alternative(graph, parts, sizes if len(sizes) > 1 else (), origin, program=sizes)


def cut(sizes: tuple[int, ...]) -> Alternative:
    return dense(sizes)
