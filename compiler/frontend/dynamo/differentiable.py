"""Fused kernels that bring their own gradients, put into a graph of Dynamo's before autograd divides it.

After AOTAutograd, the forward half of a training step hands values to the backward half that a fused kernel does not
have: the logits of a fused linear layer and cross-entropy, say. So kernels with a backward of their own are matched
earlier, in Dynamo's graph traced to ATen calls; AOTAutograd then differentiates their operators.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ....errors import ModelError
from ...fusion import Match, Uses
from ...graph import Graph
from .launches import Rules, launch_instead, matched
from .operators import OperatorGraph
from .traced import copied

__all__ = ["Differentiable", "launch_differentiable"]

log = logging.getLogger("opweave.backend")

#: What such launches replaced: kernels, and the names of calls.
Differentiable = tuple[tuple[str, tuple[str, ...]], ...]
Choose = Callable[[Graph, Sequence[Match]], Sequence[Match]]


def launch_differentiable(
    module: torch.fx.GraphModule, rules: Rules, choose: Choose
) -> tuple[torch.fx.GraphModule, Differentiable]:
    """``module`` with the launches that ``choose`` takes among what ``rules`` match, and what they replace.

    The module itself comes back where there are none, or where it cannot be traced: under autocast, whose casts depend
    on the operators, with control flow or checkpoints, and with functions that bring their own gradients.
    """
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return module, ()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("example_value") for node in placeholders]
    if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        return module, ()
    if any(_is_opaque(node.target) for node in module.graph.nodes):
        return module, ()
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    try:
        with mode:
            traced: torch.fx.GraphModule = make_fx(copied(module), pre_dispatch=True)(*values)
        found, matches = matched(traced, rules)
    except (ModelError, RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        log.info("no kernel with gradients is looked for: %s", str(error).partition("\n")[0])
        return module, ()
    constant = _constant(traced)
    unsettled = _unsettled(traced, found, constant)
    uses = Uses(found.graph)
    chosen = choose(found.graph, [m for m in matches if _is_settled(found, m, uses, constant, unsettled)])
    if not chosen:
        return module, ()
    launched = launch_instead(traced, found, chosen)
    if _constant(traced) != constant & {*traced.graph.nodes}:
        log.info("no kernel with gradients is launched: something would move to where autograd does not look")
        return module, ()
    for node in traced.graph.nodes:  # these values are of Dynamo's mode; AOTAutograd makes its own
        node.meta.pop("val", None)
    fresh = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for old, new in zip(placeholders, fresh, strict=True):  # where inputs come from: AOTAutograd asks for it
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    traced.meta = dict(module.meta)
    return traced, launched


def _is_opaque(target: Any) -> bool:
    """Whether tracing on would lose what a call says: of casts, of gradients, or of what is computed again."""
    names = ("_enter_autocast", "_enter_inference_mode", "_get_data_attr", "checkpoint")
    return isinstance(target, HigherOrderOperator) or getattr(target, "__name__", "") in names


def _constant(module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """The nodes of a traced module that run without gradients."""
    found, enabled = set(), True
    for node in module.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled:
            found.add(node)
    return found


def _unsettled(module: torch.fx.GraphModule, found: OperatorGraph, constant: Container[torch.fx.Node]) -> set[str]:
    """Buffers that are written in place, whose values a backward may have saved, or that are also read detached.

    A view without gradients is its base to the graph; beside one of what autograd does not see anyway, it is harmless.
    """
    graph = found.graph
    writers = {name: found.nodes[op.name] for op in graph.ops for name in op.outputs}
    unsettled = {graph.tensor[name].buffer for name in writers if graph.tensor[name].buffer != name}
    buffers = {_storage(node): graph.tensor[n].buffer for n, node in found.values.items() if n in graph.tensor}
    operators = {*found.nodes.values()}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or node in operators or not isinstance(value, torch.Tensor):
            continue
        is_detached = node in constant or node.target is torch.ops.aten.detach.default
        buffer = buffers.get(_storage(node)) if is_detached and value.is_floating_point() else None
        if buffer is not None and writers.get(buffer) not in constant:
            unsettled.add(buffer)
    return unsettled


def _storage(node: torch.fx.Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)


def _is_settled(
    found: OperatorGraph, match: Match, uses: Uses, constant: Container[torch.fx.Node], unsettled: Collection[str]
) -> bool:
    """Whether autograd sees all that the launch computes, and nothing on the way from its operands is unsettled."""
    graph = found.graph
    operands = [found.values.get(tensor.name) or found.values[tensor.buffer] for tensor in match.operands]
    if max(operands) in constant:  # the launch goes there
        return False
    seen = {tensor.buffer for tensor in match.operands}
    waiting = [tensor.buffer for tensor in match.outputs if tensor.name in graph.tensor]
    while waiting:
        buffer = waiting.pop()
        if buffer in seen:
            continue
        seen.add(buffer)
        ops = [graph.ops[index] for index in uses.writers(buffer)]
        if any(found.nodes[op.name] in constant for op in ops):
            return False
        waiting += [graph.tensor[name].buffer for op in ops for name in op.inputs]
    return seen.isdisjoint(unsettled)
