"""Models cut by us train on two real ranks as they do on one: tied weights in a V, and tensors that pass through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opweave import hardware
from opweave.compiler.pipeline import Budget
from opweave.compiler.runtime.pipelining.pipeline import Pipeline
from opweave.passes.pipeline_parallel.partition_costs import partition_model
from tests.compiler.frontend.stages.models import VOCABULARY, Language, Skipping
from tests.support.ranks import spawn

MICROBATCHES = 4


def loss(output: Tensor, _: Tensor) -> Tensor:
    return output.square().mean()


def trains_as_one(make: Callable[[], nn.Module], batch: Tensor, read: Callable[[Any], Tensor], **options: Any) -> int:
    """The most tensors that pass a cut; gradients of this rank's stages are those of the whole model."""
    torch.manual_seed(0)
    model = make().double()
    whole = copy.deepcopy(model)
    budget = Budget.of_seconds(60.0, deterministic=True)
    micro = batch[: len(batch) // MICROBATCHES]
    found = partition_model(model, (micro,), 2, MICROBATCHES, hardware("h100-sxm"), budget, **options)
    stages, schedule = found.stages(), found.partition.solution.timed.schedule
    ranks = [stage.rank for stage in schedule.problem.stages]
    nothing = torch.zeros(len(batch))
    pipeline = Pipeline(
        stages.modules,
        batch,
        loss,
        ranks=ranks,
        microbatches=MICROBATCHES,
        schedule=schedule,
        example_target=nothing,
    )
    pipeline.step(batch, target=nothing)
    parts = [loss(part, nothing) for part in read(whole(batch)).chunk(MICROBATCHES)]
    torch.stack(parts).mean().backward()  # type: ignore[no-untyped-call]
    here = dist.get_rank()
    own = {
        id(p) for module, rank in zip(stages.modules, ranks, strict=True) if rank == here for p in module.parameters()
    }
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if id(one) in own:
            assert one.grad is not None, name
            assert other.grad is not None, name
            assert torch.allclose(one.grad, other.grad, rtol=1e-12, atol=1e-12), name
    return max(len(names) for names in stages.passes)


def check_on_a_rank() -> None:
    tokens = torch.arange(48).reshape(8, 6) * 5 % VOCABULARY
    images = torch.linspace(-1, 1, 8 * 3 * 64, dtype=torch.float64).reshape(8, 3, 8, 8)
    assert trains_as_one(lambda: Language(3), tokens, lambda result: result["logits"]) == 1
    tied = {"chunks": 2, "placement": "v"}
    assert trains_as_one(lambda: Language(3, tied=True), tokens, lambda result: result["logits"], **tied) == 1
    assert trains_as_one(lambda: Skipping(3), images, lambda result: result, max_tensors=4, **tied) > 1


@pytest.mark.slow
def test_models_that_are_cut_train_as_whole_ones(tmp_path: Path) -> None:
    """Three models, each captured, cut, scheduled, and executed by torch's runtime in two processes."""
    spawn(2, check_on_a_rank, tmp_path)
