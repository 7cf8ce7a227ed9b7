"""Operators that tracing takes apart, but exported graphs have: each in a graph of its own, in slices and in blocks."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from opweave.passes.split import split
from tests.passes.split.comparison import difference

_ATEN = torch.ops.aten
TOKENS = 12


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


_X, _W = _drawn(TOKENS, 4), _drawn(4, 4, seed=1)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear": (_ATEN.linear.default, (_X, _W, _drawn(4, seed=2))),
    "linear of tokens in front": (_ATEN.linear.default, (_X.view(TOKENS, 2, 2), _drawn(3, 2))),
    "matmul": (_ATEN.matmul.default, (_X.view(TOKENS, 2, 2), _drawn(2, 2))),
    "einsum": (_ATEN.einsum.default, ("td,df->ft", [_X, _W])),
    "einsum of a gradient": (_ATEN.einsum.default, ("td,tf->df", [_X, _drawn(TOKENS, 3)])),
    "softmax": (_ATEN.softmax.int, (_X, 1)),
    "layer_norm": (_ATEN.layer_norm.default, (_X, [4], _drawn(4), _drawn(4, seed=1))),
    "rms_norm": (_ATEN.rms_norm.default, (_X, [4], _drawn(4))),
    "batch_norm": (
        _ATEN._native_batch_norm_legit_no_training.default,
        (_X, _drawn(4), _drawn(4, seed=1), _drawn(4, seed=2), _drawn(4, seed=3).exp(), 0.1, 1e-5),
    ),
    "chunk": (_ATEN.chunk.default, (_X, 2, 1)),
    "contiguous": (_ATEN.contiguous.default, (_X,)),
    "reshape": (_ATEN.reshape.default, (_X, [TOKENS, -1, 2])),
    "repeat_interleave": (_ATEN.repeat_interleave.self_int, (_X, 2, 0)),
    "repeat_interleave of features": (_ATEN.repeat_interleave.self_int, (_X, 2, 1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_divides_without_a_join(case: str, batch: int) -> None:
    """With ``batch``, the tokens are those of a batch of sequences, cut along the sequence and merged: blocks."""
    target, args = CASES[case]
    module, given, axes = _module(target, args, batch)
    found = split(module, axes, (1, TOKENS // batch - 1), strict=True)
    assert not found.joined
    assert difference(module, found, given) < 1e-12


def _module(
    target: Callable[..., Any], args: tuple[Any, ...], batch: int
) -> tuple[GraphModule, list[Tensor], dict[str, int]]:
    """One call of ``target``. Tensors with the tokens in front are inputs [batch, tokens, ...] that are merged."""
    graph, mode = Graph(), FakeTensorMode()
    nodes: dict[int, Node] = {}
    given: list[Tensor] = []
    axes: dict[str, int] = {}

    def operand(value: Any) -> Any:
        return nodes.get(id(value), value)

    for tensor in pytree.tree_leaves(args):
        if not isinstance(tensor, Tensor):
            continue
        name = f"x{len(given)}"
        tokens = tensor.shape[0] == TOKENS
        given.append(tensor.view(batch, -1, *tensor.shape[1:]) if tokens else tensor)
        node = nodes[id(tensor)] = graph.placeholder(name)
        node.meta["val"] = _fake(mode, given[-1])
        if tokens:
            axes[name] = 1
            node = nodes[id(tensor)] = graph.call_function(_ATEN.view.default, (node, list(tensor.shape)))
            node.meta["val"] = _fake(mode, tensor)
    call = graph.call_function(target, pytree.tree_map(operand, args))
    call.meta["val"] = pytree.tree_map_only(Tensor, lambda value: _fake(mode, value), target(*args))
    graph.output(_items(graph, call))
    return GraphModule(torch.nn.Module(), graph), given, axes


def _items(graph: Graph, call: Node) -> tuple[Node, ...]:
    """What ``call`` returns, one node for each tensor."""
    values = call.meta["val"]
    if isinstance(values, Tensor):
        return (call,)
    items = [graph.call_function(operator.getitem, (call, index)) for index in range(len(values))]
    for item, value in zip(items, values, strict=True):
        item.meta["val"] = value
    return tuple(items)


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
