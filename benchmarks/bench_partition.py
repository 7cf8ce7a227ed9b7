"""What does a training step cost when less of its forward half may stay on the device?

The joint graphs of training steps, decomposed as Inductor has them, on a model of the H100: what choosing saved values
adds to a step, in that model (computing again, traffic of what is saved, transfers that nothing hides), next to the
bytes that stay. Nothing is run: the tensors are fake ones on a CPU, whose attention stands for the GPU's. Side by side,
at the same bytes:

* ``torch``: ``activation_memory_budget`` with its dynamic program, from 1 (its minimum cut) to 0 (inputs only);
* ``checkpoint``: every block of the model checkpointed by the user, and torch's cut of the rest;
* ``opweave``: the exact partition within as many bytes as the peer's, and ``opweave offload``: with host memory.

``python -m benchmarks.bench_partition [--quick] [--json FILE]``.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch import partitioners
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from opweave.compiler.frontend.dynamo.joint import JointProblem, joint_problem, min_cut_with
from opweave.compiler.partition import Partition, PartitionProblem, Recount
from opweave.compiler.pipeline import Budget
from opweave.errors import Infeasible
from opweave.hw_models import registry
from opweave.passes.partition.ilp import IlpPartition

from .runner import Options, Row, print_table, run
from .zoo import MODELS, Size

MACHINE = "h100-sxm"
MODELS_MEASURED = {"gpt2": "GPT2Block", "resnet50": "ResNetBottleNeckLayer", "transformer_12": "DecoderBlock"}
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)  # torch's budgets
SECONDS = {True: 2.0, False: 10.0}  # of opweave for one partition, by --quick


@dataclass
class Captured:
    """One joint graph: our problem of it, and what torch saves at each of its budgets."""

    joint: JointProblem
    offloadable: JointProblem
    saved: dict[float, list[fx.Node]]
    torch_s: float


class _EnoughError(Exception):
    """Ends the compilation: the joint graph has been looked at."""


@dataclass
class _Capture:
    """A partition function that notes the joint graph, and goes no further."""

    shares: tuple[float, ...]
    found: list[Captured] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **arguments: Any) -> Any:
        machine = registry.load(MACHINE)

        def choose(graph: fx.Graph, info: Any, memory_budget: float = 1.0) -> list[fx.Node]:
            problems = [joint_problem(graph, info, num_fwd_outputs, machine, offload=away) for away in (False, True)]
            begin = time.monotonic()
            choose_torch = partitioners.choose_saved_values_set
            saved = {share: choose_torch(graph, info, memory_budget=share) for share in self.shares}
            self.found.append(Captured(problems[0], problems[1], saved, time.monotonic() - begin))
            raise _EnoughError

        return min_cut_with(choose)(module, inputs, num_fwd_outputs=num_fwd_outputs)


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def capture(name: str, size: Size, shares: tuple[float, ...], *, block: str = "") -> Captured:
    """The joint graph of one model's training step; modules of the class ``block`` are checkpointed."""
    entry = MODELS[name]
    dtype = torch.bfloat16 if size == "full" else torch.float32
    model = entry.build(size, train=True, device="meta", dtype=dtype)
    fake = FakeTensorMode()
    inputs = [fake.from_tensor(value) for value in entry.inputs(size, dtype=dtype)]
    with fake:
        _move_to_cpu(model)
    if block:
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if type(child).__name__ == block and not isinstance(parent, _Checkpointed):
                    setattr(parent, child_name, _Checkpointed(child))
    noted = _Capture(shares)

    importlib.import_module("torch._inductor.lowering")  # decompositions of pooling ask for it
    backend = aot_autograd(fw_compiler=_refuse, partition_fn=noted, decompositions=select_decomp_table())
    torch._dynamo.reset()

    def step(*inputs: Tensor) -> Tensor:
        return entry.loss(model(*inputs))

    with fake, suppress(BackendCompilerFailed):
        torch.compile(step, backend=backend)(*inputs)
    (found,) = noted.found
    return found


def _move_to_cpu(model: nn.Module) -> None:
    """Parameters and buffers made anew where they are made now; those shared between modules stay shared."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype)
                    made = nn.Parameter(made) if isinstance(value, nn.Parameter) else made
                    tensors[name] = moved.setdefault(value, made)  # type: ignore[assignment]


def _refuse(module: fx.GraphModule, inputs: Any) -> Any:
    raise _EnoughError


def measure(options: Options) -> Iterator[Row]:
    """Every model, every peer, every provider."""
    for name, block in MODELS_MEASURED.items():
        size: Size = "full" if not options.quick else "small" if name == "gpt2" else "tiny"
        captured = capture(name, size, SHARES)
        peers = {f"torch {share:g}": captured.joint.kept_of(saved) for share, saved in captured.saved.items()}
        peers["checkpoint"] = _by_name(captured.joint, capture(name, size, (1.0,), block=block))
        print(f"{name}, {size}: {len(captured.joint.problem.needed)} values; torch took {captured.torch_s:.1f} s")
        table: list[list[str]] = []
        for peer, kept in peers.items():
            count = captured.joint.problem.recount(kept, frozenset())
            if count is None:
                yield Row(f"{name} {size} {peer}", peer.split()[0], "added", None, "us", note="draws again")
                continue
            rows = list(_compared(f"{name} {size} {peer}", peer.split()[0], count, captured, options))
            table.append([peer, *(_shown(row) for row in rows)])
            yield from rows
        print_table(["peer", "MB", "its us", "MB", "opweave us", "MB", "offload us"], table)


def _compared(case: str, peer: str, count: Recount, captured: Captured, options: Options) -> Iterator[Row]:
    yield Row(case, peer, "kept", count.kept_bytes, "bytes")
    yield Row(case, peer, "added", count.total_ps / 1e6, "us")
    for provider, joint in (("opweave", captured.joint), ("opweave offload", captured.offloadable)):
        found = _exact(joint.problem, count.kept_bytes, SECONDS[options.quick])
        if found is None:
            yield Row(case, provider, "kept", None, "bytes", note="infeasible")
            yield Row(case, provider, "added", None, "us", note="infeasible")
            continue
        yield Row(case, provider, "kept", found.recount.kept_bytes, "bytes")
        yield Row(
            case, provider, "added", found.recount.total_ps / 1e6, "us", found.bound_ps / 1e6, f"{found.seconds} s"
        )


def _exact(problem: PartitionProblem, limit_bytes: int, seconds: float) -> Partition | None:
    try:
        return IlpPartition().choose(problem, limit_bytes, Budget.of_seconds(seconds))
    except Infeasible:
        return None


def _by_name(joint: JointProblem, other: Captured) -> frozenset[int]:
    """What torch saves of the checkpointed graph, whose nodes have the same names."""
    nodes = {node.name: node for node in joint.nodes}
    (saved,) = other.saved.values()
    return joint.kept_of(nodes[node.name] for node in saved if node.name in nodes)


def _shown(row: Row) -> str:
    if row.value is None:
        return "-"
    if row.unit == "bytes":
        return f"{row.value / 1e6:,.1f}"
    gap = 0.0 if row.bound is None or row.value <= row.bound else (row.value - row.bound) / row.value
    return f"{row.value:,.1f}" + (f" (gap {gap:.1%})" if gap > 1e-4 else "")


if __name__ == "__main__":
    sys.exit(run("bench_partition", __doc__.splitlines()[0], measure))
