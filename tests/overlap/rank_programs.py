"""What each rank does in the tests with real ranks: parallel models, their graphs cut and put in order, and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.parallel_models import TINY, TINY_MOE, DenseTensorParallel, ExpertParallelMoE
from torch import Tensor, nn
from torch.fx import GraphModule

from opweave.compiler.frontend.collectives import is_wait
from opweave.compiler.frontend.dynamo.frozen import is_start, orderings, reorder
from opweave.compiler.frontend.ranks import captured
from opweave.compiler.runtime.agreement import check_same_order, collective_orders
from opweave.compiler.runtime.distributed import RankExecutor
from opweave.errors import ExecutionError, PlanError
from opweave.passes.split import split, token_axes

__all__ = ["MODELS", "SIZES", "Graphs", "everything", "graphs_of", "hidden", "inputs_for", "joint_inputs"]

BATCH, LENGTH = 4, 8
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "tensor parallel": lambda: DenseTensorParallel(TINY, dtype=torch.float64),
    "sequence parallel": lambda: DenseTensorParallel(TINY.with_layers(1), sequence_parallel=True, dtype=torch.float64),
    "experts": lambda: ExpertParallelMoE(replace(TINY_MOE, layers=1), dtype=torch.float64),
}
#: Unequal parts, in sequences; two and three of them.
SIZES: Mapping[str, tuple[int, ...]] = {
    "tensor parallel": (1, 3),
    "sequence parallel": (3, 1),
    "experts": (1, 2, 1),
}


def inputs_for(name: str, rank: int, ranks: int) -> Tensor:
    """What a rank puts into a model: all the same, its own tokens, or its own sequences."""
    whole = torch.randn(LENGTH, BATCH, TINY.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if name == "tensor parallel":
        return whole.transpose(0, 1).contiguous()
    if name == "sequence parallel":
        return whole.chunk(ranks)[rank].clone()
    return whole.transpose(0, 1)[..., : TINY_MOE.hidden] + rank


@dataclass(frozen=True)
class Graphs:
    """A model's graph, whole and split and in an order that starts early and waits late; names of its placeholders."""

    whole: GraphModule
    parts: GraphModule
    parameters: Mapping[str, str]
    inputs: tuple[str, ...]
    gradients: Mapping[str, int]


def graphs_of(model: nn.Module, x: Tensor, sizes: Sequence[int], *, training: bool) -> Graphs:
    """The graphs of ``model``, cut along its batch."""
    found = captured(model, (x,), training=training)
    module = found.joint if training else found.forward
    assert module is not None
    tangents = [node.name for node in module.graph.find_nodes(op="placeholder") if "tangents" in node.name]
    batch = int(model.sequence_parallel) if isinstance(model, DenseTensorParallel) else 0
    axes = next(a for a in token_axes(module, [*found.inputs, *tangents]) if a[found.inputs[0]] == batch)
    parts = hidden(split(module, axes, sizes).module)
    return Graphs(module, parts, found.parameters, found.inputs, found.gradients or {})


def hidden(module: GraphModule) -> GraphModule:
    """``module`` with collectives started as soon as can be, and waited for when nothing else is left to do."""
    before = orderings(module.graph.nodes)
    left = [node for node in module.graph.nodes if node.op in ("call_function", "get_attr")]
    waiting = {node: {other for other in before[node] if other.op != "placeholder"} for node in left}
    order: list[str] = []
    while left:
        ready = [node for node in left if not waiting[node]]
        node = min(ready, key=lambda node: is_wait(node.target) * 2 + (not is_start(node)))
        order.append(node.name)
        left.remove(node)
        for other in left:
            waiting[other].discard(node)
    return reorder(module, order)


def joint_inputs(graphs: Graphs, model: nn.Module, x: Tensor, tangent: Tensor) -> list[Tensor]:
    """Values of the placeholders, in order; whatever is neither a parameter nor an input is the tangent."""
    values = dict(model.named_parameters())
    found: list[Tensor] = []
    for node in graphs.parts.graph.find_nodes(op="placeholder"):
        own: Tensor = tangent
        if node.name in graphs.parameters:
            own = values[graphs.parameters[node.name]].detach()
        elif node.name in graphs.inputs:
            own = x
        found.append(own)
    return found


def swapped(module: GraphModule) -> GraphModule:
    """``module`` with two collectives that follow one another, of one kind and size, in the other order."""
    starts = [node for node in module.graph.nodes if is_start(node)]
    for one, other in pairwise(starts):
        try:
            return reorder(module, [other.name, one.name])
        except PlanError:  # the second one needs the first
            continue
    raise AssertionError("no two collectives can change places")


def without_a_collective(module: GraphModule) -> GraphModule:
    """``module`` without its first all-reduce: partial sums in the place of their sum."""
    fresh = reorder(module, [])
    start = fresh.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default)[0]
    for wait in list(start.users):
        wait.target, wait.args = torch.ops.aten.clone.default, (start.args[0],)
    fresh.graph.erase_node(start)
    fresh.recompile()
    return fresh


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest over all pairs of tensors."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)


def compared() -> dict[str, float]:
    """Each model on the ranks that this process is one of: split and in order, forward and backward, against eager."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, float] = {}
    for name, build in MODELS.items():
        model, x = build(), inputs_for(name, rank, ranks)
        parameters = dict(model.named_parameters())
        expected = model(x)
        tangent = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).reshape(expected.shape)
        gradients = torch.autograd.grad(expected, list(parameters.values()), tangent)
        graphs = graphs_of(model, x, SIZES[name], training=False)
        check_same_order(collective_orders(graphs.parts))
        outputs = RankExecutor(graphs.parts)(*joint_inputs(graphs, model, x, tangent))
        found[f"{name} forward"] = difference(outputs, [expected])
        joint = graphs_of(model, x, SIZES[name], training=True)
        check_same_order(collective_orders(joint.parts))
        outputs = RankExecutor(joint.parts)(*joint_inputs(joint, model, x, tangent))
        own = [outputs[joint.gradients[own]] for own in parameters]
        found[f"{name} backward"] = difference([outputs[0], *own], [expected, *gradients])
    return found


def controls() -> dict[str, Any]:
    """What must be noticed: one rank's weight off by 1 %, a collective left out, two in the other order on one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    name = "tensor parallel"
    model, x = MODELS[name](), inputs_for(name, rank, ranks)
    graphs = graphs_of(model, x, SIZES[name], training=False)
    with torch.no_grad():
        expected = model(x)
        inputs = joint_inputs(graphs, model, x, x)
        lacking = RankExecutor(without_a_collective(graphs.parts))(*inputs)
        if rank == ranks - 1:
            next(iter(model.parameters())).mul_(1.01)
        wrong = RankExecutor(graphs.parts)(*inputs)
    order = swapped(graphs.parts) if rank == 0 else graphs.parts
    found: dict[str, Any] = {"weight": difference(wrong, [expected]), "left out": difference(lacking, [expected])}
    for what, module in {"order": order, "fewer": without_a_collective(order) if rank else order}.items():
        try:
            check_same_order(collective_orders(module))
        except ExecutionError as error:
            found[what] = str(error)
    return found


def everything() -> tuple[dict[str, float], dict[str, Any]]:
    """All of it, in one set of processes."""
    return compared(), controls()
