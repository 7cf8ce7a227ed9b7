"""Running the graphs of a split stage: node by node, or compiled; each value is let go behind its last reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...frontend.dynamo.halves_joint import Decompositions

__all__ = ["Boxed", "Compile", "Freeing", "decompositions", "eager", "inductor", "without_autocast"]

#: Runs a graph; takes its arguments out of the list.
Boxed = Callable[[list[Any]], Sequence[Any]]

#: Compiles a graph for "forward", "input_gradient" or "weight_gradient".
Compile = Callable[[fx.GraphModule, str], Boxed]


class _Slot:
    """Stands for a value that is computed when the graph runs."""

    def __init__(self, index: int) -> None:
        self.index = index


class Freeing:
    """A graph that runs operator by operator and keeps nothing longer than the last operator that reads it."""

    def __init__(self, module: fx.GraphModule) -> None:
        graph = module.graph
        self.number = {node: index for index, node in enumerate(graph.nodes)}
        self.given = len(graph.find_nodes(op="placeholder"))
        last: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            last[node] = node
            last.update((read, node) for read in node.all_input_nodes)
        freed: dict[fx.Node, list[int]] = {}
        for node, reader in last.items():
            freed.setdefault(reader, []).append(self.number[node])
        self.unread = [self.number[n] for n in graph.find_nodes(op="placeholder") if last[n] is n]
        self.steps = [
            (self.number[node], _call(node, module), *self._arguments(node), tuple(freed.get(node, ())))
            for node in graph.nodes
            if node.op not in ("placeholder", "output")
        ]
        self.results = [self.number[node] for node in graph.output_node().args[0]]  # type: ignore[union-attr]

    def __call__(self, arguments: list[Any]) -> list[Any]:
        """The results; ``arguments`` is empty afterwards, so that what is only referred to there can go early."""
        values: list[Any] = [None] * len(self.number)
        values[: self.given] = arguments
        arguments.clear()
        for index in self.unread:
            values[index] = None
        for index, call, leaves, structure, freed in self.steps:
            taken = [values[leaf.index] if type(leaf) is _Slot else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(taken, structure)
            values[index] = call(*args, **kwargs)
            del taken, args, kwargs
            for done in freed:
                values[done] = None
        return [values[index] for index in self.results]

    def _arguments(self, node: fx.Node) -> tuple[list[Any], pytree.TreeSpec]:
        leaves, structure = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
        return [_Slot(self.number[leaf]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], structure


def _call(node: fx.Node, module: fx.GraphModule) -> Callable[..., Any]:
    if node.op == "get_attr":
        name = str(node.target)
        return lambda: getattr(module, name)
    target: Any = node.target
    return target  # type: ignore[no-any-return]


def eager(module: fx.GraphModule, phase: str) -> Boxed:
    """Runs ``module`` as it is."""
    return Freeing(module)


def decompositions() -> Decompositions:
    """Inductor's, but for random numbers, which are drawn as eager execution draws them."""
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(fallback_random=True):
        return dict(select_decomp_table())


def inductor(module: fx.GraphModule, phase: str) -> Boxed:
    """Compiles ``module`` with Inductor; random numbers are those of eager execution.

    ``module`` is traced with ``decompositions``.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    from ...frontend.dynamo.traced import copied

    changed = copied(module)
    examples = [node.meta["val"] for node in changed.graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in examples if hasattr(value, "fake_mode")), None)
    output = changed.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]  # strides stay
    with config.patch(fallback_random=True), tracing(TracingContext(mode)), without_autocast():
        run: Boxed = compile_fx_inner(changed, examples, is_backward=phase != "forward")
    return run


def without_autocast() -> Any:
    """A context for graphs: they have their casts as operators."""
    return torch._C._DisableAutocast()
