"""What each rank of the tests does: pipelines whose gradients are those of the model on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from opweave.compiler.pipelining.problem import PipelineProblem, Stage
from opweave.compiler.pipelining.schedule import PipelineSchedule
from opweave.compiler.runtime.pipelining.pipeline import Pipeline
from opweave.passes.pipeline_parallel.named import named, problem_for

WIDTH = 6
ROWS = 2  # of a microbatch
STAGE = Stage(0, 2, 2, 1)

Make = Callable[[int], nn.Module]


def block(stage: int) -> nn.Module:
    """Ends in a view: a Linear of a tensor with three dimensions."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def blocks(count: int, make: Make = block) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make(stage) for stage in range(count)]


def batch(microbatches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS * microbatches, 3, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def schedule_of(name: str, microbatches: int, stage: Stage = STAGE) -> PipelineSchedule:
    problem = problem_for(name, stage, dist.get_world_size(), microbatches)
    return named(name, problem)


def ranks_of(problem: PipelineProblem) -> tuple[int, ...]:
    return tuple(stage.rank for stage in problem.stages)


def chain(modules: Sequence[nn.Module], *inputs: Tensor) -> Any:
    values: Any = inputs
    for module in modules:
        values = module(*values)
        values = values if isinstance(values, tuple) else (values,)
    return values[0] if len(values) == 1 else values


def whole(
    modules: Sequence[nn.Module], inputs: Tensor, target: Tensor, microbatches: int, loss: Any = mse_loss
) -> list[Tensor]:
    """Gradients of the mean of the microbatches' losses, on one rank."""
    losses = [
        loss(chain(modules, one), wanted)
        for one, wanted in zip(inputs.chunk(microbatches), target.chunk(microbatches), strict=True)
    ]
    torch.autograd.backward(torch.stack(losses).mean())
    return [each.detach() for each in losses]


def pipelined(
    schedule: PipelineSchedule, modules: Sequence[nn.Module | None], loss: Any = mse_loss, **options: Any
) -> Pipeline:
    inputs, _ = batch(schedule.problem.microbatches)
    return Pipeline(
        modules,
        options.pop("example", inputs),
        loss,
        ranks=ranks_of(schedule.problem),
        microbatches=schedule.problem.microbatches,
        schedule=schedule,
        **options,
    )


def same_gradients(pipeline: Pipeline, reference: Sequence[nn.Module], times: float = 1.0) -> None:
    for stage, module in pipeline.modules.items():
        pairs = zip(module.named_parameters(), reference[stage].parameters(), strict=True)
        for (name, found), wanted in pairs:
            assert found.grad is not None, f"stage {stage}: {name} has no gradient"
            assert wanted.grad is not None
            torch.testing.assert_close(found.grad, times * wanted.grad)


def trains_as_one(schedule: PipelineSchedule, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
    """Two steps and two evaluations, of which nothing but the gradients stays."""
    count, microbatches = len(schedule.problem.stages), schedule.problem.microbatches
    reference = blocks(count)
    inputs, target = batch(microbatches)
    wanted = whole(reference, inputs, target, microbatches)
    pipeline = pipelined(schedule, [wrap(module) for module in blocks(count)])
    assert pipeline.schedule == schedule
    last = count - 1 in pipeline.modules
    for times in (1.0, 2.0):  # gradients add up over steps
        mean = pipeline.step(inputs, target=target)
        same_gradients(pipeline, reference, times)
        assert len(pipeline.losses) == (microbatches if last else 0)
        torch.testing.assert_close(pipeline.losses, wanted if last else [])
        assert (mean is None) != last
        if mean is not None:
            torch.testing.assert_close(mean, torch.stack(wanted).mean())
        outputs = pipeline.eval(inputs)
        assert (outputs is None) != last
        if outputs is not None:
            torch.testing.assert_close(outputs, chain(reference, inputs))
    pipeline.close()
