"""Four real ranks: every named schedule that torch can execute, data parallelism beside it, and compiled stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from opweave.compiler.pipelining.schedule import PipelineSchedule
from opweave.compiler.runtime.pipelining.calibrate import one_after_the_other
from opweave.compiler.runtime.pipelining.emit import check_emittable
from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.compiler.runtime.pipelining.pipeline import Pipeline
from opweave.errors import ExecutionError, OptionError
from opweave.passes.pipeline_parallel.named import NAMES, named, problem_for
from tests.compiler.runtime.pipelining.rank_checks import (
    STAGE,
    batch,
    blocks,
    ranks_of,
    schedule_of,
    trains_as_one,
    whole,
)
from tests.support.ranks import spawn

pytestmark = pytest.mark.slow

#: Named schedules that torch has no actions for: with two routes, and of problems that no stage alone makes.
TWO_WAYS = ("chimera", "dualpipe", "bitpipe")
NO_STAGES = ("1f1b-vocabulary",)


def every_name() -> list[str]:
    """All that can be emitted trains as one rank does; the rest says why not."""
    ran = []
    for name in (name for name in NAMES if name not in NO_STAGES):
        try:
            schedule = schedule_of(name, 8)
        except OptionError:
            schedule = schedule_of(name, 12)
        if name in TWO_WAYS:
            with pytest.raises(ExecutionError, match="2 routes"):
                check_emittable(schedule)
            continue
        trains_as_one(schedule)
        ran.append(name)
    return ran


def in_two_replicas(
    name: str, wrap: Callable[[nn.Module, DeviceMesh], nn.Module], gathered: Callable[[Tensor], Tensor]
) -> None:
    """Two pipelines of two ranks, each with half of the batch; gradients are the whole batch's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    problem = problem_for(name, STAGE, 2, 4)
    schedule = named(name, problem)
    ranks = ranks_of(problem)
    reference = blocks(len(ranks))
    inputs, target = batch(8)
    whole(reference, inputs, target, 8)
    here, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    modules = [
        wrap(module, mesh["dp"]) if ranks[stage] == here else None for stage, module in enumerate(blocks(len(ranks)))
    ]
    mine, wanted = inputs.chunk(2)[replica], target.chunk(2)[replica]
    pipeline = Pipeline(modules, mine, mse_loss, ranks=ranks, microbatches=4, schedule=schedule, mesh=mesh)
    for _ in range(2):
        for parameter in pipeline.parameters():
            parameter.grad = None
        pipeline.step(mine, target=wanted)
        for stage, module in pipeline.modules.items():
            for found, expected in zip(module.parameters(), reference[stage].parameters(), strict=True):
                assert found.grad is not None
                torch.testing.assert_close(gathered(found.grad), expected.grad)
    assert all(torch.isfinite(parameter).all() for parameter in pipeline.parameters())


def sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(module, mesh=mesh)
    return module


def split_and_sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return sharded(SplitStage(module), mesh)


def with_fully_shard() -> None:
    def gathered(gradient: Any) -> Tensor:
        return gradient.full_tensor()  # type: ignore[no-any-return]

    for name in ("1f1b", "zb-h1", "zbv", "interleaved-1f1b"):
        in_two_replicas(name, sharded, gathered)
    for name in ("1f1b", "zb-h1", "zbv"):
        in_two_replicas(name, split_and_sharded, gathered)


def replicated(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(module, process_group=mesh.get_group())


def split_and_replicated(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return replicated(SplitStage(module), mesh)


def with_distributed_data_parallel() -> None:
    """Torch's own halves only whole: it would never reduce what W computes."""
    in_two_replicas("1f1b", replicated, lambda gradient: gradient)
    in_two_replicas("interleaved-1f1b", replicated, lambda gradient: gradient)
    with pytest.raises(ExecutionError, match="DistributedDataParallel reduces gradients in hooks"):
        in_two_replicas("zb-h1", replicated, lambda gradient: gradient)
    for name in ("1f1b", "zb-h1", "zbv"):
        in_two_replicas(name, split_and_replicated, lambda gradient: gradient)


def replicas_execute_one_schedule() -> None:
    """Whatever each replica measures: FSDP gathers stages in the order in which they compute."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    inputs, target = batch(4)
    here = mesh.get_local_rank("pp")
    modules: Sequence[nn.Module | None] = [
        sharded(module, mesh["dp"]) if rank == here else None
        for rank, module in zip((0, 1, 1, 0), blocks(4), strict=True)
    ]
    asked = []

    def planner(problem: Any) -> PipelineSchedule:
        asked.append(problem)
        return one_after_the_other(problem, ())

    pipeline = Pipeline(
        modules, inputs, mse_loss, ranks=(0, 1, 1, 0), microbatches=4, planner=planner, example_target=target, mesh=mesh
    )
    found: list[Any] = [None] * 4
    dist.all_gather_object(found, (pipeline.schedule, len(asked)))
    assert [schedule for schedule, _ in found] == [pipeline.schedule] * 4
    assert [count for _, count in found] == [1, 0, 0, 0]
    assert all(parameter.grad is None for parameter in pipeline.parameters())
    pipeline.step(inputs, target=target, measure=True)
    pipeline.replan()
    pipeline.step(inputs, target=target)


def compiled_by_inductor() -> None:
    def wrap(module: nn.Module) -> nn.Module:
        return torch.compile(module)  # type: ignore[return-value]

    trains_as_one(schedule_of("1f1b", 4), wrap)
    trains_as_one(schedule_of("zb-h1", 4), lambda module: SplitStage(module, compile=True))


CHECKS = (
    every_name,
    with_fully_shard,
    with_distributed_data_parallel,
    replicas_execute_one_schedule,
    compiled_by_inductor,
)


def everything() -> list[str]:
    ran = every_name()
    for check in CHECKS[1:]:
        check()
    return ran


def test_four_ranks_train_as_one(tmp_path: Path) -> None:
    for ran in spawn(4, everything, tmp_path):
        assert set(ran) == set(NAMES) - {*TWO_WAYS, *NO_STAGES}
        assert len(ran) > 8
