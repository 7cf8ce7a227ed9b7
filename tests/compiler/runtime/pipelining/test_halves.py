"""A split stage leaves what eager autograd leaves: outputs, gradients, buffers, random numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opweave.compiler.runtime.pipelining.halves import SplitStage
from opweave.errors import ExecutionError, ModelError, OptionError
from tests.compiler.runtime.pipelining.halves_stages import (
    Block,
    Convolutions,
    Counting,
    Several,
    Shifted,
    Tied,
    differences,
    fresh,
    perceptron,
    x,
)

Make = Callable[[], nn.Module]


class Checkpointed(nn.Module):
    """What a checkpoint would compute again, random numbers included, is chosen by the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.a, x, use_reentrant=False)


class Writing(nn.Module):
    """Writes to an input that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> Any:
        count.add_(1.5)
        return self.a(x) * count


def _frozen() -> nn.Module:
    module = perceptron()
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return module


def _without_gradients() -> nn.Module:
    return perceptron().requires_grad_(False)


CASES: dict[str, tuple[Make, Callable[[], tuple[Any, ...]]]] = {
    "middle": (perceptron, lambda: (x(4, 8),)),
    "first": (perceptron, lambda: (x(4, 8, gradient=False),)),
    "output is a view": (perceptron, lambda: (x(2, 3, 8),)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8)), lambda: (torch.randint(0, 9, (2, 5)),)),
    "sparse gradient": (lambda: nn.Embedding(9, 8, sparse=True), lambda: (torch.randint(0, 9, (2, 5)),)),
    "block": (lambda: Block(16, 2), lambda: (x(2, 5, 16),)),
    "several": (Several, lambda: (x(4, 8), x(4, 8, gradient=False), torch.arange(3), 2)),
    "several with gradients": (Several, lambda: (x(4, 8), x(4, 8), torch.arange(3), 2)),
    "convolutions": (Convolutions, lambda: (x(2, 3, 6, 6),)),
    "convolutions first": (Convolutions, lambda: (x(2, 3, 6, 6, gradient=False),)),
    "evaluation": (lambda: Convolutions().eval(), lambda: (x(2, 3, 6, 6),)),
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.GELU()), lambda: (x(4, 8),)),
    "tied": (Tied, lambda: (x(4, 8),)),
    "frozen": (_frozen, lambda: (x(4, 8),)),
    "without gradients": (_without_gradients, lambda: (x(4, 8),)),
    "without weights": (nn.Tanh, lambda: (x(4, 8),)),
    "buffer": (Counting, lambda: (x(4, 8),)),
    "input written to": (Writing, lambda: (x(4, 8), torch.ones(1))),
    "shifted": (Shifted, lambda: (x(4, 8),)),
    "checkpoint": (Checkpointed, lambda: (x(4, 8),)),
    "recurrent": (lambda: nn.LSTM(2, 2, batch_first=True), lambda: (x(1, 2, 2),)),
    "empty": (perceptron, lambda: (x(0, 8),)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_what_eager_autograd_leaves_bit_for_bit(case: str) -> None:
    """Three microbatches in flight, I in one order and W in another; eager has its backward in the order of W.

    Of a weight with two names the gradients are added in another order, and eager has a fused recurrence.
    """
    make, args = CASES[case]
    torch.manual_seed(1)
    found = differences(make(), [args() for _ in range(3)])
    assert found == {} if case not in ("tied", "recurrent") else max(found.values()) < 1e-6


class Turning(torch.autograd.Function):
    """Multiplies matrices in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.float() @ torch.full((8, 8), 1 / 3)


class Precise(nn.Module):
    """Casts a part of it does without, and one that autograd does without behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            x = self.a(x)
        return self.b(Turning.apply(x))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("make", "shape"), [(lambda: Block(16, 2), (2, 5, 16)), (Precise, (4, 8))])
def test_autocast_is_that_of_the_forward(make: Make, shape: tuple[int, ...]) -> None:
    """Casts of F are those of the context, and the backward has none of its own, as autograd's."""
    torch.manual_seed(1)
    assert differences(make(), [(x(*shape),) for _ in range(2)], autocast=True) == {}


def test_it_is_captured_again_for_what_changes_the_graph() -> None:
    """Other shapes, modes and gradients; what has been seen is kept, and without gradients nothing is captured."""
    module = Convolutions()
    stage = SplitStage(module, (x(2, 3, 6, 6),))
    seen = [stage(x(2, 3, 6, 6)).shape, stage(x(1, 3, 5, 5)).shape, stage.eval()(x(2, 3, 6, 6)).shape]
    assert [tuple(shape) for shape in seen] == [(2, 4, 4, 4), (1, 4, 3, 3), (2, 4, 4, 4)]
    assert len(stage._programs) == 3
    with torch.no_grad():
        assert not stage(x(7, 3, 6, 6)).requires_grad
    assert len(stage._programs) == 3


def test_weights_of_now_are_read() -> None:
    """Loading or updating weights between steps takes effect; copies and pickles work on their own weights."""
    torch.manual_seed(1)
    stage = SplitStage(perceptron(), (x(4, 8),))
    given = x(4, 8)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        with torch.no_grad():
            other.get_parameter("module.2.bias").add_(1.0)
        assert torch.allclose(other(given), stage(given) + 1.0, atol=1e-6)


def _noted(seen: list[int], index: int, _: torch.Tensor) -> None:
    seen.append(index)


def test_hooks_of_weights_run_in_w() -> None:
    """Gradients reach weights through autograd, so that its hooks run, DDP's among them; not before W."""
    stage = SplitStage(perceptron(), (x(4, 8),))
    seen: list[int] = []
    for index, parameter in enumerate(stage.parameters()):
        parameter.register_post_accumulate_grad_hook(partial(_noted, seen, index))  # type: ignore[no-untyped-call]
    stage(x(4, 8)).sum().backward()
    run = stage.dw_builder()
    assert seen == []
    run()
    assert sorted(seen) == [0, 1, 2, 3]


def test_gradients_have_storages_of_their_own() -> None:
    """A weight's gradient may be the output's, or a view of another's; adding to one may not change the other."""
    stage = SplitStage(Shifted(), (x(4, 8),))
    message = torch.ones(4, 8)
    stage(x(4, 8)).backward(message)
    stage.dw_builder()()
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(storages) == 3
    assert message.untyped_storage().data_ptr() not in storages


def test_first_stage_does_nothing_in_i() -> None:
    """Without an input gradient all of the backward is W."""
    stage = SplitStage(perceptron(), (x(4, 8, gradient=False),))
    graphs = stage.graphs()
    assert graphs.input_gradient is None
    names = [str(node.target) for node in graphs.weight_gradient.module.graph.nodes]  # type: ignore[union-attr]
    assert sum(".mm." in name for name in names) == 3  # two of weights, one of the layer between


def test_order_of_calls_is_checked() -> None:
    """W before I, I twice, W twice, and an I whose W nobody took."""
    stage = SplitStage(perceptron(), (x(4, 8),))
    with pytest.raises(ExecutionError, match="no weight gradient"):
        stage.dw_builder()
    result = stage(x(4, 8)).sum()
    result.backward(retain_graph=True)
    run = stage.dw_builder()
    with pytest.raises(ExecutionError, match="ran twice"):
        result.backward()
    run()
    with pytest.raises(ExecutionError, match="W of Sequential ran twice"):
        run()
    stage(x(4, 8)).sum().backward()
    with pytest.raises(ExecutionError, match="nobody took its W"):
        stage(x(4, 8)).sum().backward()


@pytest.mark.parametrize("what", ["weight", "input", "output"])
def test_what_was_modified_is_refused(what: str) -> None:
    """I and W read what F read: a weight that was updated in between, or a tensor written to, would go unnoticed."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    stage = SplitStage(module, (x(4, 8),))
    given = x(4, 8)
    result = stage(given)
    with torch.no_grad():
        {"weight": module[0].weight, "input": given, "output": result}[what].mul_(2.0)
    with pytest.raises(ExecutionError, match="was modified between its F and its I"):
        result.sum().backward()


def test_one_tensor_may_be_two_inputs() -> None:
    """In the example and in a call; its gradient is the sum of both."""

    class Ratio(nn.Module):
        def forward(self, one: torch.Tensor, two: torch.Tensor) -> Any:
            return one / two

    given = torch.full((2,), 3.0, requires_grad=True)
    stage = SplitStage(Ratio(), (given, given))
    assert torch.equal(stage(given, given.detach() * 2), torch.full((2,), 0.5))
    result = stage(given, given)
    result.sum().backward()
    assert torch.equal(given.grad, torch.zeros(2))  # type: ignore[arg-type]


def test_gradients_of_some_outputs_only() -> None:
    """An output that nothing is computed from has a gradient of zero."""
    torch.manual_seed(1)
    module = Several()
    args = (x(4, 8), x(4, 8), torch.arange(3), 2)
    reference, other = copy.deepcopy(module), fresh(args)
    stage = SplitStage(module, args)
    stage(*args)["z"].sum().backward()
    stage.dw_builder()()
    reference(*other)["z"].sum().backward()
    assert torch.equal(args[0].grad, other[0].grad)  # type: ignore[arg-type]
    assert torch.equal(module.a.weight.grad, reference.a.weight.grad)  # type: ignore[arg-type]
    assert not module.b.weight.grad.any()  # type: ignore[union-attr]


def test_gradients_of_any_layout() -> None:
    """The graph was traced for one layout of the output's gradient; others come, as from a transposed consumer."""
    module, given, gradient = perceptron(), x(2, 3, 8), torch.randn(8, 3, 2).permute(2, 1, 0)
    reference, other = copy.deepcopy(module), fresh((given,))[0]
    stage = SplitStage(module, (given,))
    stage(given).backward(gradient)
    stage.dw_builder()()
    reference(other).backward(gradient)
    assert torch.allclose(given.grad, other.grad)  # type: ignore[arg-type]
    pairs = zip(module.parameters(), reference.parameters(), strict=True)
    assert all(torch.allclose(one.grad, two.grad) for one, two in pairs)  # type: ignore[arg-type]


class Largest(nn.Module):
    """Returns an integer."""

    def forward(self, x: torch.Tensor) -> Any:
        return x.argmax()


class Branching(nn.Module):
    """Decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x) if x.sum() > 0 else x


class Holding(nn.Module):
    """Holds a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Linear(8, 8), torch.arange(8.0)

    def forward(self, x: torch.Tensor) -> Any:
        return self.a(x) * self.t


def _compiled() -> nn.Module:
    module = perceptron()
    module[0].compile()
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Branching, "AOTAutograd cannot trace Branching"),
        (_compiled, "split first, then compile"),
        (Holding, "must be parameters or buffers"),
    ],
)
def test_what_cannot_be_split_is_refused(make: Make, message: str) -> None:
    """With a reason, when the stage is made."""
    with pytest.raises(ModelError) as caught:
        SplitStage(make(), (x(4, 8),))
    assert message in str(caught.value)


def test_refusals_of_inputs() -> None:
    """Nothing to differentiate; arguments that are no key; no example where one is needed."""
    with pytest.raises(ModelError, match="nothing that Largest returns requires a gradient"):
        SplitStage(Largest(), (x(4, 8),))
    stage = SplitStage(perceptron())
    with pytest.raises(OptionError, match="no example inputs"):
        stage.boundary()
    with pytest.raises(OptionError, match="neither a tensor nor hashable"):
        SplitStage(perceptron(), (x(4, 8), {1, 2}))
