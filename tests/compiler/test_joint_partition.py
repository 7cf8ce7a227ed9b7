"""Joint graphs divided as a partition says: what passes between the halves, and gradients equal to eager's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import partitioners
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

from opweave.compiler.frontend.dynamo import joint
from opweave.compiler.frontend.dynamo.joint import Halves, partition
from opweave.compiler.partition import Partition, PartitionProblem
from opweave.compiler.pipeline import Budget
from opweave.errors import InternalError, OpweaveError
from opweave.hw_models import registry
from opweave.passes.partition.ilp import IlpPartition

MACHINE = registry.load("h100-sxm")
ALL = 10**15


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _budget() -> Budget:
    return Budget.of_seconds(20.0, workers=1, deterministic=True)


def _least(problem: PartitionProblem) -> int:
    return IlpPartition().least_bytes(problem, _budget())[0]


def _within(share: float | None) -> joint.Choose:
    """The exact partition within ``share`` of the way from the fewest bytes to those without a limit."""

    def choose(problem: PartitionProblem, starts: tuple[joint.Saved, ...]) -> Partition:
        free = IlpPartition().choose(problem, ALL, _budget(), starts)
        if share is None:
            return free
        least = _least(problem)
        limit = least + int(share * max(0, free.recount.kept_bytes - least))
        return IlpPartition().choose(problem, limit, _budget(), starts)

    return choose


class _Run:
    """A training step through AOTAutograd with eager halves; everything that was divided is in ``halves``."""

    def __init__(self, choose: joint.Choose | None, *, offload: bool = False, again: int = 1) -> None:
        self.halves: list[Halves] = []
        self.options: dict[str, Any] = {"machine": MACHINE, "choose": choose, "offload": offload}
        self.again = again

    def divide(self, module: Any, inputs: Any, **arguments: Any) -> tuple[Any, Any]:
        arguments = {k: arguments.get(k) for k in ("num_fwd_outputs", "static_lifetime_input_indices")}
        for _ in range(self.again):
            self.halves.append(partition(module, inputs, **arguments, **self.options))
        return self.halves[-1].forward, self.halves[-1].backward

    def compiled(self, function: Callable[..., Tensor], **options: Any) -> Any:
        def compiler(module: Any, inputs: Any) -> Any:
            return make_boxed_func(module.forward)

        backend = aot_autograd(
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=self.divide,
            decompositions=select_decomp_table(),
        )
        return torch.compile(function, backend=backend, **options)


def _gradients(function: Callable[[Tensor], Any], parameters: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    return list(torch.autograd.grad(function(x).float().square().mean(), tuple(parameters)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        result: Tensor = x + self.mlp(x)
        return result


class _Convolutions(nn.Module):
    """Batch normalisation updates its buffers, pooling saves indices, and the two branches meet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        result: Tensor = self.head((x + self.branch(x)).mean((2, 3)))
        return result


def _transformer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Block(16), torch.randn(2, 6, 16)


def _convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Convolutions(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("share", [None, 0.5, 0.0])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make", [_transformer, _convolutions])
def test_gradients_equal_eager(
    make: Callable[[], tuple[nn.Module, Tensor]], share: float | None, offload: bool
) -> None:
    """Within rounding, for decomposed operators round otherwise than eager's; buffers move once."""
    model, x = make()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = _gradients(model, model.parameters(), x)
    moved = {name: b.clone() for name, b in model.named_buffers()}
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    run = _Run(_within(share), offload=offload)
    found = _gradients(run.compiled(model), model.parameters(), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name, b in model.named_buffers():
        torch.testing.assert_close(b, moved[name])
    answer = run.halves[0].partition
    assert answer is not None
    total_ps = answer.recount.total_ps
    assert total_ps - answer.bound_ps <= max(100, 1e-5 * total_ps)  # the solver counts in units of the first answer
    assert answer.recount.kept_bytes <= answer.limit_bytes


def _saved_bytes(halves: Halves) -> dict[str, int]:
    """Bytes of the storages that the forward graph hands over and that are not inputs of it, by name."""
    computed = {node.name: node for node in halves.forward.graph.nodes if node.op == "call_function"}
    return {n: computed[n].meta["val"].untyped_storage().nbytes() for n in halves.saved if n in computed}


def test_what_passes_between_the_halves_is_what_was_chosen() -> None:
    """Names agree, bytes are those of the storages, and offloaded positions point at values."""
    model, x = _transformer()
    run = _Run(_within(0.4), offload=True)
    _gradients(run.compiled(model), model.parameters(), x)
    halves = run.halves[0]
    answer = halves.partition
    assert answer is not None
    away = {halves.saved[i] for i in halves.offloaded}
    assert away == {answer.problem.values[v].name for v in answer.offloaded}
    saved = _saved_bytes(halves)
    kept = {answer.problem.values[v].name: answer.problem.values[v].nbytes for v in answer.kept}
    assert kept.keys() | away >= saved.keys()
    assert sum(nbytes for name, nbytes in saved.items() if name not in away) <= answer.recount.kept_bytes
    assert {name: saved[name] for name in kept if name in saved} == {n: b for n, b in kept.items() if n in saved}


def test_a_lower_limit_computes_more_again() -> None:
    model, x = _transformer()
    runs = [_Run(_within(share)) for share in (None, 0.5, 0.0)]
    for run in runs:
        torch._dynamo.reset()
        _gradients(run.compiled(model), model.parameters(), x)
    answers = [run.halves[0].partition for run in runs]
    kept = [answer.recount.kept_bytes for answer in answers if answer is not None]
    times = [answer.recount.total_ps for answer in answers if answer is not None]
    assert kept == sorted(kept, reverse=True)
    assert times == sorted(times)
    sizes = [len(run.halves[0].backward.graph.nodes) for run in runs]
    assert sizes[0] < sizes[-1]


def test_without_a_choice_torch_divides() -> None:
    model, x = _transformer()
    ours = _Run(None)
    found = _gradients(ours.compiled(model), model.parameters(), x)
    for a, b in zip(found, _gradients(model, model.parameters(), x), strict=True):
        torch.testing.assert_close(a, b)
    assert ours.halves[0].partition is None
    assert ours.halves[0].offloaded == ()
    assert ours.halves[0].saved


def test_torchs_cut_is_an_answer_and_ours_takes_no_more_time() -> None:
    """The cut's bytes are its storages'; with as many, the exact partition is at least as fast."""
    seen: list[tuple[PartitionProblem, joint.Saved]] = []

    def choose(problem: PartitionProblem, starts: tuple[joint.Saved, ...]) -> Partition:
        seen.append((problem, starts[0]))
        return IlpPartition().choose(problem, ALL, _budget())

    model, x = _transformer()
    _gradients(_Run(choose).compiled(model), model.parameters(), x)
    problem, cut = seen[0]
    theirs = problem.recount(*cut)
    assert theirs is not None
    ours = IlpPartition().choose(problem, theirs.kept_bytes, _budget())
    assert ours.recount.total_ps <= theirs.total_ps


def test_random_numbers_are_drawn_once() -> None:
    """Dropout's mask is kept at any limit, so both halves see the same one."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 4))
    x = torch.randn(4, 8)
    run = _Run(_within(0.0))
    expected = _gradients(model, model.parameters(), x)
    with torch._inductor.config.patch(fallback_random=True):
        found = _gradients(run.compiled(model), model.parameters(), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    answer = run.halves[0].partition
    assert answer is not None
    assert answer.recount.kept_bytes > 0


def test_a_users_checkpoint_is_computed_again_whatever_the_limit() -> None:
    """Dropout inside the checkpoint included: torch hands the generator's state to the backward half."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8))
    x = torch.randn(4, 8)

    def checkpointed(value: Tensor) -> Tensor:
        return model(value) + checkpoint(model, value, use_reentrant=False)  # type: ignore[no-any-return]

    run = _Run(_within(None))
    expected = _gradients(checkpointed, model.parameters(), x)
    with torch._inductor.config.patch(fallback_random=True):
        found = _gradients(run.compiled(checkpointed), model.parameters(), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    answer = run.halves[0].partition
    assert answer is not None
    names = [answer.problem.steps[s].name for s in answer.recount.again]
    assert any("dropout" in name for name in names), names


@pytest.mark.slow
def test_symbolic_sizes_pass_as_symbols() -> None:
    """One compilation serves two batch sizes, and its gradients are right for both."""
    model, _ = _transformer()
    run = _Run(_within(0.3))
    compiled = run.compiled(model, dynamic=True)
    for n in (3, 5):
        x = torch.randn(n, 7, 16)
        found = _gradients(compiled, model.parameters(), x)
        for a, b in zip(found, _gradients(model, model.parameters(), x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(run.halves) == 1


def test_a_module_may_be_divided_again() -> None:
    """What the caller does to meet a peak: another answer for the same joint graph."""
    model, x = _convolutions()
    model.eval()
    run = _Run(_within(0.2), again=3)
    found = _gradients(run.compiled(model), model.parameters(), x)
    for a, b in zip(found, _gradients(model, model.parameters(), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len({halves.saved for halves in run.halves}) == 1


def test_an_output_is_not_counted_twice() -> None:
    """What the caller receives stays anyway: saving it takes no bytes, so it is not computed again."""
    weight = torch.randn(8, 8, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ weight).exp()

    run = _Run(_within(0.0))
    found = _gradients(run.compiled(function), (weight,), torch.randn(4, 8))
    assert found[0].shape == weight.shape
    answer = run.halves[0].partition
    assert answer is not None
    assert answer.recount.kept_bytes == 0
    assert not any("exp" in answer.problem.steps[s].name for s in answer.recount.again)


def test_a_wrong_answer_is_noticed() -> None:
    """An answer about another problem than the graph's does not become a graph."""

    def choose(problem: PartitionProblem, starts: tuple[joint.Saved, ...]) -> Partition:
        kept = IlpPartition().choose(problem, ALL, _budget()).kept
        other = PartitionProblem(problem.steps, (), problem.values)
        return Partition(other, ALL, kept, frozenset(), 0)

    model, x = _transformer()
    with pytest.raises(Exception, match="divides the joint graph otherwise than asked") as caught:
        _gradients(_Run(choose).compiled(model), model.parameters(), x)
    assert isinstance(caught.value.inner_exception, InternalError)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["min_cut_rematerialization_partition", "get_default_op_list"])
def test_another_torch_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _transformer()
    run = _Run(_within(None)).compiled(model)
    monkeypatch.delattr(partitioners, name)
    with pytest.raises(Exception, match=f"(?s)torch .*{name}.*2.11 to 2.15") as caught:
        _gradients(run, model.parameters(), x)
    assert isinstance(caught.value.inner_exception, OpweaveError)  # type: ignore[attr-defined]
