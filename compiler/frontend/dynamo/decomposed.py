"""Calls that were put into a graph behind AOTAutograd, said as Inductor has them: by its own decompositions."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta

__all__ = ["decomposed"]


def decomposed(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``module``, which is changed: no call is left that Inductor decomposes and has no lowering for.

    AOTAutograd decomposes what it traces; what a cut has added since, such as conversions between dtypes, is as the
    rules say it. New nodes keep the ``meta`` of the one that they stand for.
    """
    table = select_decomp_table()
    calls = [node for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    nodes = [n for n in calls if n.op == "call_function" and n.target in table and n.target not in lowerings]
    for node in nodes:
        _inline(module.graph, node, _traced(node, table))
        module.graph.erase_node(node)
    if nodes:
        module.graph.lint()
        module.recompile()
    return module


def _traced(node: torch.fx.Node, table: Any) -> torch.fx.Graph:
    """The graph of one call with its tensors as inputs, decomposed as far as it goes."""
    tensors = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(tensors, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        target: Any = node.target
        return target(*args, **kwargs)

    with preserve_node_meta(enable=False), node.meta["val"].fake_mode:
        return make_fx(call, decomposition_table=table)(*(operand.meta["val"] for operand in tensors)).graph


def _inline(graph: torch.fx.Graph, node: torch.fx.Node, traced: torch.fx.Graph) -> None:
    values: dict[torch.fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    kept = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    with graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "call_function":
                values[inner] = graph.node_copy(inner, values.__getitem__)
                values[inner].meta = {**kept, "val": inner.meta["val"]}
            elif inner.op == "output":
                node.replace_all_uses_with(values[inner.args[0]])
