"""Graphs with every field set and hostile names, for round trips through files."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from opweave.compiler.graph import Collective, CollectiveKind, Graph, OpKind

from .strategies import graphs

__all__ = ["odd_graphs"]

_INT64 = 2**63 - 1
_COLLECTIVES = st.builds(
    Collective,
    st.sampled_from(CollectiveKind),
    st.text(),
    st.lists(st.integers(0, _INT64), min_size=1, max_size=4, unique=True).map(tuple),
    st.integers(0, 1 << 50),
)
_ALONE = st.sampled_from([kind for kind in OpKind if kind is not OpKind.COLLECTIVE]).map(lambda kind: {"kind": kind})
_KINDS = st.one_of(_ALONE, _COLLECTIVES.map(lambda what: {"kind": OpKind.COLLECTIVE, "collective": what}))


@st.composite
def odd_graphs(draw: st.DrawFn, *, text: st.SearchStrategy[str] | None = None, alone: bool = False) -> Graph:
    """Random graphs renamed to arbitrary text, with any kinds, flops, origins and bodies; ``alone`` of one rank."""
    text = st.text(max_size=6) if text is None else text
    graph: Graph = draw(graphs(max_ops=5))
    names = [tensor.name for tensor in graph.tensors]
    fresh = draw(st.lists(text.filter(bool), min_size=len(names), max_size=len(names), unique=True))
    renamed = dict(zip(names, fresh, strict=True))
    tensors = tuple(
        msgspec.structs.replace(
            tensor,
            name=renamed[tensor.name],
            buffer=renamed[tensor.buffer],
            strides=draw(st.sampled_from((tensor.strides, tensor.element_strides))),
        )
        for tensor in graph.tensors
    )
    op_names = draw(st.lists(text, min_size=len(graph.ops), max_size=len(graph.ops), unique=True))
    ops = tuple(
        msgspec.structs.replace(
            op,
            name=name,
            inputs=tuple(renamed[i] for i in op.inputs),
            outputs=tuple(renamed[o] for o in op.outputs),
            **draw(_ALONE if alone else _KINDS),
            flops=draw(st.integers(0, _INT64)),
            origin=draw(text),
            body=draw(st.one_of(st.just(op.body), text.map(lambda body: body.replace("%", "")))),
        )
        for op, name in zip(graph.ops, op_names, strict=True)
    )
    return Graph(draw(text), tensors, ops, tuple(renamed[o] for o in graph.outputs))
