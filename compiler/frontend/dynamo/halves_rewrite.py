"""Operators that make gradients of inputs and of weights at once, said as two."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .halves_joint import JointGraph

__all__ = ["rewritten"]

#: Operators with an ``output_mask`` whose parts cost about what they are worth, and which results are the weights'.
DIVISIBLE: dict[Any, tuple[int, ...]] = {torch.ops.aten.convolution_backward.default: (1, 2)}


def rewritten(joint: JointGraph) -> JointGraph:
    """``joint``, whose graph is changed: a convolution's backward is two, each with a part of the output mask."""
    graph = joint.module.graph
    for target, late in DIVISIBLE.items():
        for node in graph.find_nodes(op="call_function", target=target):
            taken = {user.args[1] for user in node.users}
            if all(user.target is operator.getitem for user in node.users) and 0 in taken and taken & {*late}:
                _divide(graph, node, late)
    graph.lint()
    joint.module.recompile()
    return joint


def _divide(graph: fx.Graph, node: fx.Node, late: tuple[int, ...]) -> None:
    mask: Any = node.args[-1]
    values = node.meta["val"]
    halves = []
    with graph.inserting_before(node):
        for wanted in (False, True):
            half = graph.call_function(node.target, (*node.args[:-1], [m and (i in late) is wanted for i, m in enumerate(mask)]))  # type: ignore[arg-type]  # fmt: skip  # noqa: E501
            half.meta = dict(node.meta)
            half.meta["val"] = tuple(value if (i in late) is wanted else None for i, value in enumerate(values))
            halves.append(half)
    for user in list(node.users):
        user.replace_input_with(node, halves[user.args[1] in late])
    graph.erase_node(node)
