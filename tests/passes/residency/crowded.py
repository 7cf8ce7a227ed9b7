"""Random graphs that make residency hard: few bytes, many far uses, several versions, unequal sizes."""

from __future__ import annotations

from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Role, Tensor

__all__ = ["crowded_graphs"]


@st.composite
def crowded_graphs(draw: st.DrawFn, *, max_ops: int = 8) -> Graph:
    """Up to ``max_ops`` operators over buffers of 1 to 40 bytes; every operator reads up to three values, old or new.

    One in four updates a buffer in place, source or not, and may or may not read it; some make two values.
    """
    roles = (Role.INPUT, Role.WEIGHT, Role.OPTIMIZER_STATE)
    tensors = [
        Tensor(f"s{i}", (draw(st.integers(1, 40)),), "int8", draw(st.sampled_from(roles)))
        for i in range(draw(st.integers(1, 3)))
    ]
    current = {t.buffer: t for t in tensors}  # newest version of each buffer
    ops: list[Op] = []
    for step in range(draw(st.integers(3, max_ops))):
        operands = draw(st.lists(st.sampled_from(sorted(current)), min_size=1, max_size=3, unique=True))
        made = [
            Tensor(f"t{step}_{k}", (draw(st.integers(1, 40)),), "int8")
            for k in range(draw(st.sampled_from((1, 1, 1, 2))))
        ]
        inputs = tuple(current[b].name for b in operands)
        if draw(st.integers(0, 3)) == 0:
            of = current[draw(st.sampled_from(sorted(current)))]
            made = [Tensor(f"t{step}", of.shape, "int8", Role.ACTIVATION, of.buffer)]
        ops.append(Op(f"op{step}", inputs, tuple(t.name for t in made)))
        tensors += made
        current.update((t.buffer, t) for t in made)
    outputs = draw(st.lists(st.sampled_from([t.name for t in current.values()]), min_size=1, max_size=3, unique=True))
    return Graph("crowded", tuple(tensors), tuple(ops), tuple(outputs))
