"""What ``kernels/gated_activation_backward.py`` does besides numerics: refusals, cost, what it matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels._activations import ACTIVATIONS
from opweave.kernels.gated_activation_backward import GATES, KERNEL
from tests.kernels.matching import check_fusion, check_matches, exported

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def arguments(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return KERNEL.arguments(dtype, **({"rows": 6, "columns": 8} | more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": torch.zeros(6, 8, dtype=torch.float64)}, r"of float32, float16, bfloat16"),
        ({"gate": torch.zeros(8, 6).t()}, r"needs gate row-major"),
        ({"up": torch.zeros(8)}, r"needs up \[6, 8\]"),
        ({"gradient": torch.zeros(6, 8, dtype=torch.float16)}, r"needs gradient .* of float32"),
        ({"gradient": torch.zeros(1).expand(6, 8)}, r"needs gradient row-major"),
        ({"activation": "none"}, r"knows the activations silu, gelu, gelu_tanh, relu; got 'none'"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*(arguments() | changes).values())


def test_refuses_outputs_that_overlap_and_products_that_are_not_wanted() -> None:
    given = arguments()
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)

    def launch(product: torch.Tensor, other: torch.Tensor = second) -> None:
        KERNEL.launch(*given.values(), gate_gradient=first, up_gradient=other, product=product)

    with pytest.raises(ExecutionError, match="in memory of its own; it overlaps"):
        launch(torch.zeros(0), first)
    with pytest.raises(ExecutionError, match=r"needs product \[0\]"):
        launch(torch.zeros(6, 8))
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
        launch(torch.zeros(0))
    given["with_product"] = True
    with pytest.raises(ExecutionError, match=r"needs product \[6, 8\]"):
        launch(torch.zeros(0))


def test_cost_is_what_was_counted_by_hand() -> None:
    assert KERNEL.cost("float32", rows=3, columns=5).flops == 15 * 5
    assert KERNEL.cost("float32", rows=3, columns=5).traffic_bytes == 4 * 15 * 5
    more = KERNEL.cost("bfloat16", rows=3, columns=5, with_product=True)
    assert (more.flops, more.traffic_bytes) == (15 * 6, 2 * 15 * 6)


@pytest.mark.parametrize("with_product", [False, True])
@pytest.mark.parametrize("activation", GATES)
def test_reference_and_eager_are_autograd_s(activation: str, with_product: bool) -> None:
    given = arguments(activation=activation, with_product=with_product)
    gate, up = (given[name].double().requires_grad_() for name in ("gate", "up"))
    product = ACTIVATIONS[activation](gate) * up
    expected = (*torch.autograd.grad(product, (gate, up), given["gradient"].double()), product.detach())
    for computed in (KERNEL.reference(*given.values()), KERNEL.eager(*given.values())):
        for one, other in zip(computed[: 2 + with_product], expected, strict=False):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        assert computed[2].shape == ((6, 8) if with_product else (0,))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", GATES)
def test_matches_what_autograd_calls(activation: str, dtype: torch.dtype, decomposed: bool) -> None:
    given = arguments(dtype, activation=activation)

    def function(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> Any:
        return KERNEL.eager(gate, up, gradient, activation, False)[:2]

    inputs = [given[name] for name in ("gate", "up", "gradient")]
    tolerance = TOLERANCE[dtype]
    graph = check_fusion(KERNEL, function, inputs, rtol=tolerance, atol=tolerance, decomposed=decomposed)
    assert len(graph.ops) == 1


@pytest.mark.parametrize("sigmoid", [torch.sigmoid, lambda gate: 1 / (1 + torch.exp(-gate))])
def test_matches_a_silu_whose_backward_is_spelled_out(sigmoid: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As PyTorch decomposes ``silu_backward`` for its core operators."""

    def function(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share = sigmoid(gate)
        return gradient * up * share * (1 + gate * (1 - share)), gradient * functional.silu(gate)

    inputs = [torch.randn(2, 3, 8) for _ in range(3)]
    graph = check_fusion(KERNEL, function, inputs, rtol=1e-5, atol=1e-5)
    assert len(graph.ops) == 1


silu_backward = torch.ops.aten.silu_backward


@pytest.mark.parametrize(
    "function",
    [
        lambda g, u, d: (silu_backward(d * u, g), d * functional.gelu(g)),
        lambda g, u, d: (silu_backward(d * u, g), d * functional.silu(u)),
        lambda g, u, d: (silu_backward(d + u, g), d * functional.silu(g)),
        lambda g, u, d: (silu_backward(d * u, g), d[:1] * functional.silu(g)),
        lambda g, u, d: (silu_backward(d * u[:1], g), d * functional.silu(g)),
        lambda g, u, d: (silu_backward(d.t() * u.t(), g.t()), d.t() * functional.silu(g.t())),
        lambda g, u, d: (torch.ops.aten.threshold_backward(d * u, g, 1), d * functional.relu(g)),
        lambda g, u, d: (torch.where(g <= 0, torch.ones(()), d * u), d * functional.relu(g)),
        lambda g, u, d: (torch.ops.aten.gelu_backward(d * u, g), d * functional.gelu(g, approximate="tanh")),
    ],
)
def test_leaves_what_it_does_not_compute(function: Callable[..., Any]) -> None:
    inputs = [torch.randn(6, 8) for _ in range(3)]
    assert check_matches(KERNEL, exported(function, inputs, decomposed=False).graph) == ()
