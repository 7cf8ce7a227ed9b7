"""Whatever order the planner decides on, if the graph admits it, a program computes the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from opweave.compiler.frontend.dynamo.effects import has_effect
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.passes.device import planner
from opweave.passes.device.ordering import Ordering, framed
from opweave.passes.order._peak_search import certificate, working_set_bound
from opweave.passes.order.problem import OrderProblem
from tests.compiler.frontend.dynamo.contract import check, compiled, same


@torch.library.custom_op("opweave_orders::gather_in", mutates_args=("total",))
def gather_in(total: torch.Tensor, x: torch.Tensor) -> None:
    total += x


@pytest.fixture(params=range(3))
def any_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans have a random order, each operator that may come next equally likely."""
    rng = random.Random(request.param)

    def ordering(plan: Plan, budget: Budget, *, search: bool) -> Ordering:
        problem = framed(OrderProblem.of(plan), plan.graph)
        left = {op: set(before) for op, before in enumerate(problem.predecessors)}
        order: list[int] = []
        while left:
            order.append(rng.choice([op for op, before in left.items() if not before - set(order)]))
            del left[order[-1]]
        bound = working_set_bound(problem, problem.nbytes)
        return Ordering(tuple(order), certificate(problem, problem.peak_bytes(order), bound), 0)

    monkeypatch.setattr(planner, "ordering", ordering)


def _matrices(count: int) -> Callable[[], list[torch.Tensor]]:
    """Makes the same matrices again and again, apart."""
    return lambda: [torch.linspace(-1, 1 + i, 36).sin().reshape(6, 6) for i in range(count)]


def _writes_to_arguments(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
    before = x.t() @ y
    own = y.clone()
    seen = own @ z
    gather_in(own, x @ z)
    gather_in(x, z @ y)
    after = own.t() @ x
    gather_in(own, before)
    return before @ z, seen, after @ y, own @ z


def _writes_to_parts(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
    a = x @ y
    b = a @ z
    a[:, 2:4] = z[:, 2:4]
    c = a @ z
    a.t().add_(y)
    x[1:3].copy_((a @ y)[1:3])
    return b, c @ x, torch.topk(a @ b, 3)[0], torch.sort(c)[0] @ y


def _learns(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
    a, b = x @ y, torch.addmm(z, y, x)
    attended = functional.scaled_dot_product_attention(a[None, None], b[None, None], z[None, None])[0, 0]
    return attended @ a.t(), (b @ attended).cumsum(0), torch.cat([a[:2], b[2:]]) @ x


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("function", [_writes_to_arguments, _writes_to_parts], ids=["arguments", "parts"])
def test_reads_and_writes_in_place_keep_their_order(function: Any) -> None:
    check(function, _matrices(3), tolerance=1e-4)


@pytest.mark.usefixtures("any_order")
def test_both_halves_of_a_training_step() -> None:
    check(_learns, lambda: [x.requires_grad_() for x in _matrices(3)()], gradients=True, tolerance=1e-4)


@pytest.mark.usefixtures("any_order")
def test_random_numbers_of_every_distribution_are_drawn_in_order() -> None:
    """Memory that nobody has written to is no obstacle: it is what they are written to."""

    def function(x: torch.Tensor) -> Any:
        drawn = [torch.empty(6, 6).uniform_(), torch.empty(6, 6).cauchy_(), torch.empty(6, 6).exponential_()]
        drawn += [torch._standard_gamma(x.abs() + 1), torch.binomial(x * 0 + 9, x * 0 + 0.5)]
        return [numbers @ x for numbers in drawn]

    (x,) = _matrices(1)()
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(3)
        found = compiled(function)(x)
    torch.manual_seed(3)
    same(found, function(x), 1e-4)


def test_attention_draws_random_numbers_only_where_it_drops_something_out() -> None:
    """So that its calls may change places otherwise."""
    target = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert not has_effect(target, (None, None, None), {})
    assert not has_effect(target, (None, None, None, 0.0), {})
    assert has_effect(target, (None, None, None, 0.5), {})
    assert has_effect(target, (None, None, None), {"dropout_p": 0.5})
