"""Split stages under torch's pipeline runtime, and inside DDP and fully_shard."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.compiler.runtime.pipelining.halves_stage import SplitPipelineStage
from opweave.errors import ExecutionError, OptionError
from tests.support.ranks import spawn

STAGES, MICROBATCHES, WIDTH = 3, 4, 6
HOST = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process."""
    store = dist.HashStore()  # type: ignore[attr-defined] # torch does not say it exports it
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _modules() -> list[nn.Module]:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(3), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    return [nn.Sequential(*map(copy.deepcopy, layers)) for _ in range(STAGES)]


def _split(modules: list[nn.Module], rows: int = 2) -> list[SplitStage]:
    examples = [torch.empty(rows, 3, WIDTH, requires_grad=stage > 0) for stage in range(len(modules))]
    return [SplitStage(module, (example,)) for module, example in zip(modules, examples, strict=True)]


def _order() -> list[_Action]:
    """All F; then I, but of one microbatch B; then W in another order."""
    stages, microbatches = range(STAGES), range(MICROBATCHES)
    texts = [f"{stage}F{i}" for i in microbatches for stage in stages]
    texts += [f"{stage}{'B' if i == 2 else 'I'}{i}" for i in microbatches for stage in reversed(stages)]
    texts += [f"{stage}W{i}" for i in reversed(microbatches) if i != 2 for stage in stages]
    return [_Action.from_str(text) for text in texts]


def _run(stages: list[Any], inputs: torch.Tensor, targets: torch.Tensor) -> None:
    schedule = _PipelineScheduleRuntime(stages, MICROBATCHES, loss_fn=mse_loss)  # type: ignore[no-untyped-call]
    schedule._prepare_schedule_with_comms({0: [*_order()]})
    schedule.step(inputs, target=targets, losses=[])


def _reference(modules: list[nn.Module], inputs: torch.Tensor, targets: torch.Tensor) -> None:
    for given, target in zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True):
        for module in modules:
            given = module(given)
        torch.autograd.backward(mse_loss(given, target) / MICROBATCHES)


def _batch(rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shape = (2 * MICROBATCHES, 3, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _close(modules: list[nn.Module], references: list[nn.Module]) -> None:
    for module, reference in zip(modules, references, strict=True):
        for one, two in zip(module.parameters(), reference.parameters(), strict=True):
            assert one.grad is not None
            gradient = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
            torch.testing.assert_close(gradient, two.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(dict(module.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", ["none", "ddp", "fsdp", "fsdp in parts"])
def test_torch_runs_split_stages(wrap: str) -> None:
    """First, middle and last stage; outputs are views, batch norms count each microbatch once."""
    modules, references = _modules(), _modules()
    stages: list[nn.Module] = [*_split(modules)]
    if wrap == "ddp":
        stages = [DistributedDataParallel(stage) for stage in stages]
    elif wrap != "none":
        mesh = init_device_mesh("cpu", (1,))
        for stage in stages:
            if wrap == "fsdp in parts":
                fully_shard(stage.get_submodule("module.0"), mesh=mesh)
            fully_shard(stage, mesh=mesh)
    inputs, targets = _batch()
    _run([SplitPipelineStage(stage, i, STAGES, HOST) for i, stage in enumerate(stages)], inputs, targets)
    _reference(references, inputs, targets)
    _close(modules, references)
    split = [stage.module if wrap == "ddp" else stage for stage in stages]
    assert [len(stage._programs) for stage in split] == [1] * STAGES  # type: ignore[arg-type, union-attr]


@pytest.mark.usefixtures("alone")
def test_what_torch_would_do_wrong_is_refused() -> None:
    """Without static metadata torch runs a backward whose W nobody takes; DDP may not look for unused parameters."""
    stages = [
        PipelineStage(stage, i, STAGES, HOST, dw_builder=stage.dw_builder) for i, stage in enumerate(_split(_modules()))
    ]
    with pytest.raises(RuntimeError) as caught:
        _run(stages, *_batch())
    causes: list[BaseException | None] = [caught.value]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, ExecutionError) and "nobody took its W" in str(cause) for cause in causes)
    split = _split(_modules())[1]
    with pytest.raises(OptionError, match="unused parameters"):
        SplitPipelineStage(DistributedDataParallel(split, find_unused_parameters=True), 1, STAGES, HOST)
    with pytest.raises(OptionError, match="not a SplitStage"):
        SplitPipelineStage(nn.Linear(2, 2), 1, STAGES, HOST)


def _two_ranks() -> None:
    """Each rank has all stages and a batch of its own; gradients are the mean of both."""
    rank = dist.get_rank()
    for wrap in ("ddp", "fsdp", "fsdp in parts"):
        modules, references = _without_norms(), _without_norms()
        mesh = init_device_mesh("cpu", (2,))
        stages: list[Any] = []
        groups = [dist.new_group([r], backend="gloo") for r in range(2)]
        for split in _split(modules):
            if wrap == "ddp":
                stages.append(DistributedDataParallel(split))
                continue
            if wrap == "fsdp in parts":
                fully_shard(split.get_submodule("module.0"), mesh=mesh)
            stages.append(fully_shard(split, mesh=mesh))
        _run([SplitPipelineStage(s, i, STAGES, HOST, groups[rank]) for i, s in enumerate(stages)], *_batch(rank))
        for other in range(2):
            _reference(references, *_batch(other))
        for reference in references:
            for parameter in reference.parameters():
                assert parameter.grad is not None
                parameter.grad /= 2
        _close(modules, references)


def _without_norms() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(STAGES)]


@pytest.mark.slow
def test_two_ranks_reduce_gradients_of_split_stages(tmp_path: Path) -> None:
    """DDP reduces in the last W, fully_shard where torch reduces; parameters are gathered from F to W."""
    spawn(2, _two_ranks, tmp_path)
