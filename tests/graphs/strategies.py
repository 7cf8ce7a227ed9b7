"""Random graphs for hypothesis: operators that compute, join, split, alias and update in place."""

from __future__ import annotations

from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Role

from .build import GraphBuilder

__all__ = ["graphs"]

_WIDTH = 4
_SOURCE_ROLES = (Role.INPUT, Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE)


@st.composite
def graphs(draw: st.DrawFn, *, min_ops: int = 1, max_ops: int = 8) -> Graph:
    """Graphs of float32 tensors ``[rows, 4]``, rows 0 to 6; every body can be executed."""
    g = GraphBuilder("random")
    names: list[str] = []
    for i in range(draw(st.integers(1, 3))):
        role = draw(st.sampled_from(_SOURCE_ROLES))
        names.append(g.tensor(f"s{i}", draw(st.integers(0, 6)), _WIDTH, role=role))
    steps = draw(st.integers(min_ops, max_ops))
    while len(g.ops) < steps:
        names += _extend(draw, g, names)
    outputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    return g.build(*outputs)


def _extend(draw: st.DrawFn, g: GraphBuilder, names: list[str]) -> list[str]:
    """Add one operator or view; returns the names of the tensors it makes."""
    operand = draw(st.sampled_from(names))
    rows = g.tensors[operand].shape[0]
    alike = [name for name in names if g.tensors[name].shape == g.tensors[operand].shape]
    other = draw(st.sampled_from(alike))
    fresh = f"t{len(g.tensors)}"
    match draw(st.sampled_from(("unary", "binary", "join", "split", "view", "update"))):
        case "unary":
            return [g.unary(draw(st.sampled_from(("relu", "tanh"))), operand, fresh)]
        case "binary":
            return [g.binary("add", operand, other, fresh)]
        case "join":
            second = draw(st.sampled_from(names))
            total = min(rows + g.tensors[second].shape[0], 64)
            if total == 64:
                return [g.unary("relu", operand, fresh)]
            g.op("aten.cat.default([%0, %1], 0)", operand, second, outputs={fresh: (total, _WIDTH)})
            return [fresh]
        case "split":
            cut = draw(st.integers(0, rows))
            parts: dict[str, tuple[int, ...]] = {fresh: (cut, _WIDTH), f"{fresh}b": (rows - cut, _WIDTH)}
            g.op(f"aten.split_with_sizes.default(%0, [{cut}, {rows - cut}], 0)", operand, outputs=parts)
            return list(parts)
        case "view":
            first = draw(st.integers(0, rows))
            offset = g.tensors[operand].offset_bytes + first * _WIDTH * 4
            return [g.view(fresh, operand, rows - first, _WIDTH, offset_bytes=offset)]
        case _:
            return [g.update("add", operand, other, fresh)]
