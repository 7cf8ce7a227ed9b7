"""Graphs of the models, and ranks that run them in lock-step in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import default_partition
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of this process alone, for tracing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Traced:
    """AOT graphs of a module. ``names`` are the placeholders of the module's own inputs, in order."""

    inference: fx.GraphModule | None
    joint: fx.GraphModule | None
    forward: fx.GraphModule | None
    backward: fx.GraphModule | None
    names: tuple[str, ...]


class Tuple(nn.Module):
    """The module with its result in a tuple, as AOTAutograd wants it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.module(*inputs),)


def trace(module: nn.Module, inputs: Sequence[Tensor], *, training: bool = False, decompositions: Any = None) -> Traced:
    """Graphs as AOTAutograd makes them: of inference, or joint, forward and backward."""
    found: dict[str, fx.GraphModule] = {}
    wrapped: Any = Tuple(module)

    def partitioned(joint: fx.GraphModule, joint_inputs: Any, **arguments: Any) -> Any:
        found["joint"] = joint
        found["forward"], found["backward"] = default_partition(joint, joint_inputs, **arguments)
        return found["forward"], found["backward"]

    def compiled(gm: Any, example_inputs: Any) -> Any:
        found.setdefault("inference", gm)
        return gm.forward

    with torch.set_grad_enabled(training):
        aot_module_simplified(
            wrapped,
            list(inputs),
            fw_compiler=compiled,
            bw_compiler=compiled,
            partition_fn=partitioned,
            decompositions=decompositions,
        )
    whole = found["joint"] if training else found["inference"]
    placeholders = [node.name for node in whole.graph.nodes if node.op == "placeholder"]
    primals = [name for name in placeholders if not name.startswith("tangents")]
    names = tuple(primals[len(primals) - len(inputs) :])
    joint, forward, backward = found.get("joint"), found.get("forward"), found.get("backward")
    return Traced(None if training else whole, joint, forward, backward, names)


def state(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in the order of the placeholders."""
    return [*(p.detach() for p in module.parameters()), *module.buffers()]


def lockstep(
    module: fx.GraphModule, inputs: Sequence[Sequence[Any]], replaced: Mapping[Any, Callable[..., Any]] | None = None
) -> list[list[Any]]:
    """What each rank returns, ``inputs`` being each rank's: node by node, collectives by their definition.

    ``replaced`` maps operators that this machine lacks to functions that compute the same.
    """
    ranks = len(inputs)
    values: list[dict[fx.Node, Any]] = [{} for _ in range(ranks)]
    feeds = [iter(each) for each in inputs]
    for node in module.graph.nodes:
        for rank in range(ranks):
            if node.op == "placeholder":
                values[rank][node] = next(feeds[rank])
            elif node.op == "get_attr":
                values[rank][node] = getattr(module, node.target)
        if node.op == "call_function":
            arguments = [fx.map_arg((node.args, node.kwargs), values[rank].__getitem__) for rank in range(ranks)]
            for rank, result in enumerate(_called(node.target, arguments, replaced or {})):
                values[rank][node] = result
        if node.op == "output":
            return [list(fx.map_arg(node.args[0], each.__getitem__)) for each in values]
    raise AssertionError("a graph without output")


def _called(target: Any, arguments: list[Any], replaced: Mapping[Any, Callable[..., Any]]) -> list[Any]:
    """Results on all ranks."""
    name = str(target)
    if not name.startswith("_c10d_functional."):
        call = replaced.get(target, target)
        return [call(*args, **kwargs) for args, kwargs in arguments]
    sent = [args[0] for args, _ in arguments]
    ranks = len(sent)
    if "wait_tensor" in name:
        return sent
    if ".all_reduce." in name:
        return [sum(sent[1:], sent[0]) for _ in sent]
    if ".all_gather_into_tensor." in name:
        return [torch.cat(sent) for _ in sent]
    if ".reduce_scatter_tensor." in name:
        return list(sum(sent[1:], sent[0]).chunk(ranks))
    if ".all_to_all_single." in name:
        blocks = [each.split(args[2]) for each, (args, _) in zip(sent, arguments, strict=True)]
        return [torch.cat([blocks[source][rank] for source in range(ranks)]) for rank in range(ranks)]
    raise NotImplementedError(name)


def fed(module: fx.GraphModule, given: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """``given`` for the first placeholders, and random numbers of the right shapes for the tangents behind them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [node.meta["val"].shape for node in module.graph.nodes if node.op == "placeholder"][len(given) :]
    return [*given, *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)]


def difference(
    first: fx.GraphModule,
    second: fx.GraphModule,
    inputs: Sequence[Sequence[Any]],
    replaced: Mapping[Any, Callable[..., Any]] | None = None,
) -> float:
    """The greatest difference between any of what two modules return on any rank, relative to 1 or its size."""
    worst = 0.0
    for one, other in zip(lockstep(first, inputs, replaced), lockstep(second, inputs, replaced), strict=True):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                assert a.shape == b.shape
                assert a.dtype == b.dtype
                gap = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1)
                assert not gap.isnan().any()
                worst = max(worst, gap.max().item() if gap.numel() else 0.0)
            else:
                assert a is None
                assert b is None
    return worst
