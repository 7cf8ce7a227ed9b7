"""Pipelines on a GPU, with NCCL of one rank: gradients, measured times, and what a split stage holds by the allocator.

One GPU shows that results, events and bytes are right, and compiled halves too; what a schedule gains takes several.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opweave
from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.compiler.runtime.pipelining.halves_bytes import measured_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

WIDTH, TOKENS, MICROBATCHES = 256, 128, 4


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of NCCL with one rank."""
    store = (tmp_path_factory.mktemp("ranks") / "store").as_uri()
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def blocks(count: int) -> list[nn.Module]:
    """Transformer layers without dropout."""
    return [
        nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True).cuda()
        for _ in range(count)
    ]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squares."""
    return nn.functional.mse_loss(output, target)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"schedule": "optimal", "memory_limit": "4GiB"},
        {"schedule": "optimal", "compile": True},
        {"schedule": "interleaved-1f1b", "split": "eager"},
    ],
    ids=["1f1b", "optimal", "compiled", "eager"],
)
def test_stages_train_as_one(options: dict[str, Any]) -> None:
    """Two stages on the GPU, by schedules of each kind; then with times that were measured by events."""
    torch.manual_seed(0)
    chunks = 1 if options["schedule"] == "1f1b" else 2
    stages = blocks(chunks)
    reference = nn.Sequential(*copy.deepcopy(stages))
    x, target = torch.randn(2, 2 * MICROBATCHES, TOKENS, WIDTH, device="cuda").unbind()
    given: dict[str, Any] = {
        "microbatches": MICROBATCHES,
        "example_target": target,
        "chunks": chunks,
        "time_limit": 5.0,
    }
    pipeline = opweave.pipeline(stages, x, loss, **given, **options)
    value = pipeline.step(x, target=target, measure=True)
    wanted = loss(reference(x), target)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-3, atol=1e-5)
    own = [p for module in pipeline.modules.values() for p in module.parameters()]
    for parameter, other in zip(own, reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=2e-2, atol=1e-4)
    measured = pipeline.measured()
    assert all(stage.forward_ns > 0 for stage in measured.stages)
    pipeline.close()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_the_allocator_sees_what_a_split_stage_says_it_holds(compile: bool) -> None:
    """Bytes held behind F and between I and W, of several microbatches at once, within a tenth."""
    (block,) = blocks(1)
    x = torch.randn(8, TOKENS, WIDTH, device="cuda", requires_grad=True)
    stage = SplitStage(block, (x,), compile=compile)
    told = measured_bytes(stage, (x,))
    for parameter in stage.parameters():  # so that gradients are no news to the allocator
        parameter.grad = torch.zeros_like(parameter)

    def allocated() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    inputs = [torch.randn_like(x).requires_grad_() for _ in range(3)]
    before = allocated()
    outputs = [stage(given) for given in inputs]
    passed = sum(output.nbytes for output in outputs)
    assert allocated() - before - passed == pytest.approx(3 * told.after_forward, rel=0.1, abs=x.nbytes)
    late = []
    for output in outputs:
        output.backward(torch.ones_like(output))
        late.append(stage.dw_builder())
    del output, outputs
    gradients = sum(given.nbytes for given in inputs)
    assert allocated() - before - gradients == pytest.approx(3 * told.after_input_gradient, rel=0.1, abs=3 * x.nbytes)
    for run in late:
        run()
    del run, late
    assert allocated() - before - gradients <= x.nbytes
