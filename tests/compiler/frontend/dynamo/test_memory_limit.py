"""``options={"memory_limit": ...}`` for models on the device: outputs and gradients of eager, within the limit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import opweave
from opweave.compiler.frontend.dynamo.report import GraphReport
from opweave.compiler.frontend.dynamo.training import step_bytes
from opweave.errors import Infeasible, OpweaveError
from tests.compiler.frontend.dynamo.contract import compiled, reports

WIDTH = 32


class Block(nn.Module):
    """Keeps much more for its backward pass than its weights take."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.down(torch.sin(self.up(x)))
        return x + inner


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(*[Block() for _ in range(4)])


def unwrapped(call: Callable[[], Any]) -> Any:
    """What ``call`` returns; errors of the backend as they were raised."""
    try:
        return call()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None


def trained(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[tuple[GraphReport, ...], list[torch.Tensor]]:
    """Reports of a training step, and its gradients."""
    torch._dynamo.reset()
    own, known = copy.deepcopy(model), len(reports())
    function = compiled(own, **options)
    unwrapped(lambda: function(x)).pow(2).sum().backward()
    return reports()[known:], [parameter.grad for parameter in own.parameters() if parameter.grad is not None]


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(512, WIDTH)


def test_a_training_step_holds_its_limit(batch: torch.Tensor) -> None:
    """Half of what it takes without one: less is kept between the halves, and the gradients are the same."""
    model = network()
    free, expected = trained(model, batch)
    limit = step_bytes(free) // 2
    held, gradients = trained(model, batch, memory_limit=limit, time_limit=3.0)
    assert [report.phase for report in held] == ["forward", "backward"]
    assert step_bytes(held) <= limit
    assert held[0].saved_bytes < free[0].allocated_bytes // 2
    assert held[0].offloaded_bytes or held[0].recomputed_s
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.slow
def test_what_no_training_step_can_hold(batch: torch.Tensor) -> None:
    """Not even the weights fit: the least that was found is named."""
    with pytest.raises(Infeasible) as refusal:
        trained(network(), batch, memory_limit=50_000, time_limit=1.0)
    assert refusal.value.required_bytes > 2 * sum(p.nbytes for p in network().parameters())
    assert "touches" in str(refusal.value)


@torch.no_grad()
def test_inference_moves_nothing_while_the_limit_allows_it(batch: torch.Tensor) -> None:
    """With all that the plan without a limit takes nothing moves; with less results are spilled, down to the least."""
    model = skips()
    expected = model(batch)
    torch.testing.assert_close(compiled(model)(batch), expected)
    free = reports()[-1]
    enough = free.held_bytes + free.allocated_bytes
    with pytest.raises(Infeasible, match="the least limit that works") as refusal:
        infer(model, batch, free.held_bytes + 1000)
    least = refusal.value.required_bytes
    assert least < enough
    for limit in (enough, (enough + least) // 2, least):
        torch.testing.assert_close(infer(model, batch, limit), expected)
        report = reports()[-1]
        assert report.held_bytes + report.allocated_bytes <= limit
        assert (report.bound_s is None) == (limit == enough)


def infer(model: nn.Module, x: torch.Tensor, limit: int) -> Any:
    torch._dynamo.reset()
    function = compiled(model, memory_limit=limit)
    return unwrapped(lambda: function(x))


def skips() -> nn.Module:
    """Results that are needed again in the opposite order: more is live than any operator needs."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(5)])
            self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = [x]
            for part in self.parts:
                made.append(part(made[-1]))
            result = made.pop()
            for other in reversed(made):
                result = result @ self.matrix + other
            return result

    torch.manual_seed(4)
    return Skips().eval()


def test_stock_inductor_cannot_hold_a_limit(batch: torch.Tensor) -> None:
    with pytest.raises(OpweaveError, match="cannot hold a memory limit, which only tier T1 does"):
        trained(network(), batch, memory_limit=1 << 30, tier="T0")


def test_the_least_that_a_refusal_names_works() -> None:
    """A training step within one byte is refused with a figure that, as the limit, is held."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    x = torch.randn(16, 32)

    def step(limit: int) -> None:
        torch._dynamo.reset()
        options: Any = {"memory_limit": limit}
        loss: torch.Tensor = torch.compile(model, backend=opweave.backend, options=options)(x).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as refused:
        step(1)
    infeasible = refused.value.inner_exception
    assert isinstance(infeasible, Infeasible)
    step(infeasible.required_bytes)
    assert step_bytes(opweave.backend_reports()[-2:]) <= infeasible.required_bytes
