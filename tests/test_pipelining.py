"""`opweave.pipeline` and `opweave.schedule_pipeline`: a model in, trained stages and proven schedules out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import opweave
from opweave.compiler.pipelining.placement import placed, uniform
from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.verdict import verified
from opweave.errors import ExecutionError, Infeasible, ModelError, OptionError
from tests.support.ranks import spawn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")

MICROBATCHES = 4


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    """An embedding, blocks, and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))
        self.head = nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of each token."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


def loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def trained(tied: bool = False) -> tuple[Model, Model, Tensor, Tensor]:
    """A model with its gradients, the same without, a batch and its target."""
    torch.manual_seed(0)
    reference = Model(tied)
    fresh = copy.deepcopy(reference)
    tokens, target = torch.randint(0, 20, (2 * MICROBATCHES, 5)), torch.randint(0, 20, (2 * MICROBATCHES, 5))
    loss(reference(tokens), target).backward()  # type: ignore[no-untyped-call]
    return reference, fresh, tokens, target


def compare(pipeline: Any, reference: nn.Module) -> int:
    """The stages' gradients are the model's; returns how many there are on this rank."""
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = 0
    for module in pipeline.modules.values():
        for name, parameter in getattr(module, "module", module).named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name.replace("_orig_mod.", "")], rtol=1e-4, atol=1e-7)
            found += 1
    return found


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_is_cut_measured_scheduled_and_trained(alone: None, tmp_path: Path) -> None:
    """On one rank with two chunks; gradients, loss, evaluation and report."""
    reference, model, tokens, target = trained()
    options: dict[str, Any] = {"microbatches": MICROBATCHES, "chunks": 2, "time_limit": 2.0, "deterministic": True}
    pipeline = opweave.pipeline(model, tokens, loss, example_target=target, memory_limit="1GiB", **options)
    value = pipeline.step(tokens, target=target)
    torch.testing.assert_close(value, loss(reference(tokens), target).detach())
    assert compare(pipeline, reference) == len(list(reference.parameters()))
    torch.testing.assert_close(pipeline.eval(tokens), reference(tokens).detach())
    assert pipeline.solution.gap >= 0
    assert "index.html" in pipeline.report(tmp_path / "report")
    assert pipeline.problem.memory_limit == (1 << 30,)
    # Adam's state is counted: weights and gradients of 4 bytes, two more of 4.
    elements = sum(p.numel() for p in model.parameters())
    assert pipeline.problem.resident_bytes[0] >= 16 * elements


def test_named_schedules_cuts_and_ties(alone: None) -> None:
    """A schedule by name over cuts by name; weights that are tied may be where both stages are on one rank."""
    reference, model, tokens, target = trained(tied=True)
    options: dict[str, Any] = {"microbatches": MICROBATCHES, "placement": (0, 0), "cuts": ["blocks.2"]}
    pipeline = opweave.pipeline(
        model, tokens, loss, example_target=target, schedule="interleaved-1f1b", split="eager", **options
    )
    assert pipeline.schedule.method == "interleaved-1f1b"
    pipeline.step(tokens, target=target)
    compare(pipeline, reference)


class Scored(Model):
    """Returns a dictionary, with something nobody needs."""

    def forward(self, tokens: Tensor) -> Any:
        """Scores by name."""
        return {"scores": super().forward(tokens), "nothing": None}


def test_the_loss_gets_what_the_model_returns(alone: None) -> None:
    """In the model's own structure, and so does who evaluates."""
    torch.manual_seed(0)
    model = Scored()
    tokens, target = torch.randint(0, 20, (2 * MICROBATCHES, 5)), torch.randint(0, 20, (2 * MICROBATCHES, 5))
    wanted = model(tokens)["scores"].detach()
    options: dict[str, Any] = {"microbatches": MICROBATCHES, "placement": (0, 0), "cuts": ["blocks.2"]}
    pipeline = opweave.pipeline(
        model,
        tokens,
        lambda out, target: loss(out["scores"], target),
        example_target=target,
        schedule="interleaved-1f1b",
        **options,
    )
    torch.testing.assert_close(pipeline.step(tokens, target=target), loss(wanted, target))
    found = pipeline.eval(tokens)
    assert found["nothing"] is None
    torch.testing.assert_close(found["scores"], wanted)


def test_what_cannot_be_is_refused(alone: None) -> None:
    """By an error that names it, before anything runs."""
    _, model, tokens, target = trained()
    options: dict[str, Any] = {"microbatches": MICROBATCHES, "time_limit": 1.0}
    with pytest.raises(OptionError, match="needs a target"):
        opweave.pipeline(model, tokens, loss, **options)
    options["example_target"] = target
    with pytest.raises(OptionError, match="split is 'half'"):
        opweave.pipeline(model, tokens, loss, split="half", **options)  # type: ignore[arg-type]
    for name, value in {"objective": "speed", "time_limit": 0.0, "microbatches": 0, "schedule": "1f2b"}.items():
        with pytest.raises(OptionError, match=f"{name} is|no schedule '1f2b'"):
            opweave.pipeline(model, tokens, loss, **{**options, name: value})
    for batch in (torch.tensor(1), tokens[:5]):
        with pytest.raises(OptionError, match="is not 4 microbatches of one size"):
            opweave.pipeline(model, batch, loss, **options)
    with pytest.raises(OptionError, match="in stages already"):
        opweave.pipeline([model], tokens, loss, cuts=["head"], **options)
    with pytest.raises(OptionError, match="no placement 'x'"):
        opweave.pipeline(model, tokens, loss, placement="x", **options)
    with pytest.raises(ModelError, match=r"blocks\.9"):
        opweave.pipeline(model, tokens, loss, placement=(0, 0), cuts=["blocks.9"], **options)
    with pytest.raises(OptionError, match="nosuch"):
        opweave.pipeline(model, tokens, loss, schedule="nosuch", **options)
    with pytest.raises(Infeasible, match="may hold"):
        opweave.pipeline(model, tokens, loss, memory_limit=1000, placement=(0, 0), cuts=["blocks.2"], **options)


def test_without_a_process_group_there_is_no_pipeline() -> None:
    """The error says how to start."""
    with pytest.raises(ExecutionError, match="process group"):
        opweave.pipeline(nn.Linear(2, 2), torch.zeros(2, 2), loss, microbatches=2)


def test_a_schedule_is_found_and_verified() -> None:
    """Between the named ones: V placement of 4 ranks and 8 microbatches, five chunks held; 56 slots are the optimum."""
    problem = uniform(Stage(0, 1, 1, 1, None, 0, 1), placed("v", 4, 2), 8, memory_limit=5)
    solution = opweave.schedule_pipeline(problem, time_limit=5.0)
    verified(solution.timed)
    assert max(solution.timed.peak_bytes) <= 5
    assert solution.value <= 59
    assert solution.bound.value <= 56
    with pytest.raises(OptionError, match="objective is 'speed'"):
        opweave.schedule_pipeline(problem, objective="speed")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="time_limit is 0"):
        opweave.schedule_pipeline(problem, time_limit=0)


def on_two_ranks() -> list[int]:
    """Train on two ranks, by the best schedule, eager and compiled, in loops and in a V."""
    found = []
    for options in ({}, {"compile": True}, {"placement": "v", "chunks": 2}, {"split": "eager", "memory_limit": "1GiB"}):
        reference, model, tokens, target = trained()
        given: dict[str, Any] = {"microbatches": MICROBATCHES, "time_limit": 3.0, **options}
        pipeline = opweave.pipeline(model, tokens, loss, example_target=target, **given)
        value = pipeline.step(tokens, target=target)
        if value is not None:
            torch.testing.assert_close(value, loss(reference(tokens), target).detach())
        found.append(compare(pipeline, reference))
    return found


@pytest.mark.slow
def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    """Every parameter is on one of the ranks, with the gradient of the whole model."""
    first, second = spawn(2, on_two_ranks, tmp_path)
    count = len(list(Model().parameters()))
    assert [a + b for a, b in zip(first, second, strict=True)] == [count] * 4
