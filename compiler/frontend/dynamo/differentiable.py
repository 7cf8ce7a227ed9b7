"""Fused kernels that bring their own gradients, put into a graph of Dynamo's before autograd divides it.

After AOTAutograd, the forward half of a training step hands values to the backward half that a fused kernel does not
have: the logits of a fused linear layer and cross-entropy, say. So kernels with a backward of their own are matched
earlier, in Dynamo's graph traced to ATen calls; AOTAutograd then differentiates their operators.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ....errors import ModelError
from ...fusion import Match
from ...graph import Graph
from .launches import Rules, launch_instead, matched
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
    on the operators, and with control flow.
    """
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return module, ()
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("example_value") for node in placeholders]
    if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        return module, ()
    if any(getattr(node.target, "__name__", "") in ("_enter_autocast", "checkpoint") for node in module.graph.nodes):
        return module, ()
    mode = next(v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor))
    try:
        with mode:
            traced: torch.fx.GraphModule = make_fx(copied(module), pre_dispatch=True)(*values)
        found, matches = matched(traced, rules)
    except (ModelError, RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        log.info("no kernel with gradients is looked for: %s", str(error).partition("\n")[0])
        return module, ()
    chosen = choose(found.graph, [match for match in matches if _is_settled(found.graph, match)])
    if not chosen:
        return module, ()
    launch_instead(traced, found, chosen)
    for node in traced.graph.nodes:  # these values are of Dynamo's mode; AOTAutograd makes its own
        node.meta.pop("val", None)
    fresh = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for old, new in zip(placeholders, fresh, strict=True):  # where inputs come from: AOTAutograd asks for it
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    traced.meta = dict(module.meta)
    return traced, tuple((match.kernel, match.ops) for match in chosen)


def _is_settled(graph: Graph, match: Match) -> bool:
    """Whether nothing is written in place that the launch reads or makes: its backward may have saved it."""
    buffers = {tensor.buffer for tensor in (*match.operands, *match.outputs)}
    versions = (graph.tensor[name] for op in graph.ops for name in op.outputs)
    return not any(version.buffer in buffers and version.name != version.buffer for version in versions)
