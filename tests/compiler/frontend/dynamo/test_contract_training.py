"""Training through compiled modules: autograd, hooks, checkpoints, custom functions, autocast, random numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.compiler.frontend.dynamo.contract import (
    backward,
    check,
    compare,
    compiled,
    reports,
    same,
    same_modules,
    tiers,
)


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _batch(rows: int = 5) -> torch.Tensor:
    return torch.linspace(-1, 1, rows * 4).reshape(rows, 4)


def test_gradients_accumulate() -> None:
    """Over several calls and backward passes, in any order."""
    module = _network()
    twin = copy.deepcopy(module)
    function = compiled(module)
    for call in (function, twin):
        first, second = call(_batch()).pow(2).sum(), call(_batch() * 2).sum()
        first.backward()
        second.backward()
    same_modules(module, twin)
    assert tiers() == {"T1"}


def test_a_retained_graph() -> None:
    """A second backward pass finds what the forward pass saved; AOTAutograd asks that ``donated_buffer`` be off."""
    with torch._functorch.config.patch(donated_buffer=False):
        module = _network()
        twin = copy.deepcopy(module)
        for call in (compiled(module), twin):
            loss = call(_batch()).pow(2).sum()
            loss.backward(retain_graph=True)
            loss.backward()
        same_modules(module, twin)
    with pytest.raises(RuntimeError, match="donated"):
        compiled(_network())(_batch()).pow(2).sum().backward(retain_graph=True)


def test_a_training_loop() -> None:
    """The optimizer writes the parameters that the program reads; gradients are set to ``None`` in between."""
    module = _network()
    twin = copy.deepcopy(module)
    for call, owner in ((compiled(module), module), (twin, twin)):
        optimizer = torch.optim.AdamW(owner.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            call(_batch() * step).pow(2).mean().backward()
            optimizer.step()
    same_modules(module, twin, 1e-4)


def test_hooks() -> None:
    """On parameters, on gradients of inputs and results, and after accumulation."""
    module = _network()
    twin = copy.deepcopy(module)
    seen: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for call, owner, key in ((compiled(module), module, True), (twin, twin, False)):
        weight: Any = owner.get_parameter("0.weight")
        weight.register_hook(lambda grad: grad * 2)
        weight.register_post_accumulate_grad_hook(lambda p, key=key: seen[key].update(weight=p.grad.clone()))
        x: Any = _batch().requires_grad_()
        x.register_hook(lambda grad, key=key: seen[key].update(x=grad.clone()))
        y = call(x)
        y.register_hook(lambda grad: grad + 1)
        y.sum().backward()
    for name in ("weight", "x"):  # in which order they come is the engine's affair
        same(seen[True][name], seen[False][name])
    same_modules(module, twin)


def test_some_gradients_only() -> None:
    """A frozen parameter, an input without gradient, and a result that takes no part in the loss."""
    module = _network()
    module.get_parameter("0.weight").requires_grad_(False)
    twin = copy.deepcopy(module)

    class Two(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.inner(x)
            return y.sum(), y.sin()

    for call in (compiled(Two(module)), Two(twin)):
        backward(call(_batch())[0])
    same_modules(module, twin)


def test_gradients_by_torch_autograd_grad() -> None:
    module = _network()
    function = compiled(module)
    x = _batch().requires_grad_()
    weight = module.get_parameter("2.weight")
    found = torch.autograd.grad(function(x).sin().sum(), [x, weight])
    expected = torch.autograd.grad(module(x).sin().sum(), [x, weight])
    same(found, expected)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """By AOTAutograd, in its words."""
    x = _batch().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(torch.sin)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        backward(gradient.sum())


def test_no_grad_and_inference_mode() -> None:
    """Each is a graph of its own, without a backward graph."""
    module = _network()
    function = compiled(module)
    with torch.no_grad():
        compare(function, module, lambda: (_batch(),))
    with torch.inference_mode():
        compare(function, module, lambda: (_batch(),))
        assert function(_batch()).is_inference()
    assert {report.phase for report in reports()} == {"inference"}
    compare(function, module, lambda: (_batch(),), gradients=True)
    assert {report.phase for report in reports()} == {"inference", "forward", "backward"}


def test_autocast() -> None:
    """Within and around what is compiled; results and gradients have the dtypes of eager mode."""

    def within(x: torch.Tensor, w: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
        return y, y.float().sum(), x @ w

    def around(x: torch.Tensor, w: torch.Tensor) -> Any:
        return (x @ w).relu() @ w.t()

    def make() -> tuple[torch.Tensor, ...]:
        return _batch().requires_grad_(), torch.linspace(0, 1, 12).reshape(4, 3).requires_grad_()

    check(within, make, gradients=True, tolerance=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(around, make, gradients=True, tolerance=2e-2)


@pytest.mark.parametrize("inside", [True, False])
def test_activation_checkpoints(inside: bool) -> None:
    """Of a part within a graph (its operator is inlined), and around a compiled module."""
    module = _network()
    twin = copy.deepcopy(module)

    def function(x: torch.Tensor) -> Any:
        return checkpoint(module, x, use_reentrant=False).sin()

    inner = compiled(module)
    call = compiled(function) if inside else lambda x: checkpoint(inner, x, use_reentrant=False).sin()
    for result in (call(_batch()), twin(_batch()).sin()):
        result.sum().backward()
    same_modules(module, twin)
    assert tiers() == {"T1"}


class _Clipped(torch.autograd.Function):
    """Its gradient is not that of its value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * (x > 0) * 3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, to trace it
def test_a_custom_autograd_function() -> None:
    def function(x: torch.Tensor) -> Any:
        clip: Any = _Clipped.apply
        return clip(x * 2) + 1

    check(function, lambda: (_batch().requires_grad_(),), gradients=True)


@torch.library.custom_op("opweave_contract::halves", mutates_args=())
def halves(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[:1] * 0.5, x[1:] * 0.5]


@halves.register_fake
def _(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(x[:1]), torch.empty_like(x[1:])]


@torch.library.custom_op("opweave_contract::count_up", mutates_args=("counter",))
def count_up(counter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    counter += 1
    return x + counter


@count_up.register_fake
def _(counter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("opweave_contract::fill", mutates_args=("x",))
def fill(x: torch.Tensor, value: float) -> None:
    x.fill_(value)


def test_custom_operators() -> None:
    """That return lists, write arguments, or do nothing but write."""

    def function(x: torch.Tensor, counter: torch.Tensor) -> Any:
        first, second = halves(x.sin())
        y = count_up(counter, second)
        z = x * 2
        fill(z, 2.5)
        y = count_up(counter, y)
        return first, y + 1, z + x, counter * 2

    check(function, lambda: (_batch(), torch.zeros(4)))


def _dropped(x: torch.Tensor) -> Any:
    y = nn.functional.dropout(x, 0.5) + torch.rand_like(x)
    return y, nn.functional.dropout(y * 2, 0.25)


def test_random_numbers() -> None:
    """The same seed gives the same numbers, another call others; forward and backward passes drop the same elements."""
    function = compiled(_dropped)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(function(_batch(50)))
        found.append(function(_batch(50)))
    same(found[:2], found[2:4])
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[4][0])
    x = torch.ones(400).requires_grad_()
    y = compiled(lambda x: nn.functional.dropout(x, 0.5))(x)
    y.sum().backward()
    same(x.grad, y.detach())
    assert 100 < int((y == 0).sum()) < 300
    assert tiers() == {"T1"}


def test_random_numbers_as_eager_ones() -> None:
    """With Inductor's ``fallback_random``, and the generator is left as eager mode leaves it."""
    with torch._inductor.config.patch(fallback_random=True):
        function = compiled(_dropped)
        for _ in range(2):
            torch.manual_seed(5)
            found, after = function(_batch()), torch.rand(1)
            torch.manual_seed(5)
            same((found, after), (_dropped(_batch()), torch.rand(1)))
    assert tiers() == {"T1"}


def test_a_recurrent_network() -> None:
    check(
        nn.LSTMCell(4, 3),
        lambda: (_batch(), (torch.zeros(5, 3), torch.ones(5, 3))),
        gradients=True,
    )
