"""What ``kernels/gated_linear.py`` does besides numerics: refusals, cost, gradients, what it matches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels._activations import ACTIVATIONS
from opweave.kernels.gated_activation_backward import GATES
from opweave.kernels.gated_linear import KERNEL
from tests.kernels.matching import check_fusion, check_matches, exported

SIZES = {"rows": 6, "depth": 16, "columns": 8}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def arguments(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return KERNEL.arguments(dtype, **(SIZES | more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"needs x \[any\]"),
        ({"x": torch.zeros(6, 16, dtype=torch.float64)}, r"of float32, float16, bfloat16"),
        ({"x": torch.zeros(16, 6).t()}, r"needs x row-major"),
        ({"gate": torch.zeros(8, 16)}, r"needs gate \[16, any\]"),
        ({"gate": torch.zeros(16, 8, dtype=torch.bfloat16)}, r"needs gate .* of float32"),
        ({"up": torch.zeros(16, 1)}, r"needs up \[16, 8\]"),
        ({"up": torch.zeros(16, 8, device="meta")}, r"on cpu; got .* on meta"),
        ({"activation": "relu6"}, r"knows the activations silu, gelu, gelu_tanh, relu; got 'relu6'"),
    ],
)
def test_refuses_what_it_cannot_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        KERNEL.allocate(*(arguments() | changes).values())


def test_refuses_outputs_that_overlap_and_others() -> None:
    given = arguments(columns=16)
    with pytest.raises(ExecutionError, match="needs out in memory of its own; it overlaps x"):
        KERNEL.launch(*given.values(), out=given["x"])
    with pytest.raises(ExecutionError, match=r"needs out \[6, 16\]"):
        KERNEL.launch(*given.values(), out=torch.zeros(16, 6))
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
        KERNEL.launch(*given.values(), out=torch.zeros(6, 16))


def test_cost_is_what_was_counted_by_hand() -> None:
    cost = KERNEL.cost("bfloat16", rows=3, depth=5, columns=7)
    assert cost.flops == 2 * (2 * 3 * 5 * 7) + 2 * 3 * 7
    assert cost.traffic_bytes == 2 * (15 + 2 * 35 + 21)


@pytest.mark.parametrize("activation", GATES)
def test_reference_is_torch_s_in_float64(activation: str) -> None:
    given = arguments(activation=activation)
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in given.values()]
    (out,) = KERNEL.reference(*given.values())
    torch.testing.assert_close(out.double(), KERNEL.eager(*wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("lead", [(6,), (2, 3), ()])
def test_gradients_are_autograd_s_in_float64(activation: str, lead: tuple[int, ...]) -> None:
    given = arguments(activation=activation)
    given["x"] = given["x"][: max(1, len(lead) and 6)].reshape(*lead, 16)
    narrow = [given[name].clone().requires_grad_() for name in ("x", "gate", "up")]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    out = KERNEL(*narrow, activation)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad(out, narrow, gradient)
    expected = torch.autograd.grad(KERNEL.eager(*wide, activation), wide, gradient.double())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)


def test_gradients_of_some_only_and_of_a_sum() -> None:
    """The gradient of a sum is a number spread over memory: not row-major."""
    given = arguments()
    gate = given["gate"].requires_grad_()
    KERNEL(given["x"], gate, given["up"]).sum().backward()
    wide = given["gate"].detach().double().requires_grad_()
    KERNEL.eager(given["x"].double(), wide, given["up"].double()).sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(gate.grad, wide.grad.float(), rtol=1e-5, atol=1e-5)
    assert given["up"].grad is None


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_matches_its_own_eager_spelling(packed: bool, activation: str, dtype: torch.dtype, decomposed: bool) -> None:
    given = arguments(dtype, activation=activation)
    x = given["x"].view(2, 3, 16)
    gate, up = (given[name].t().contiguous() for name in ("gate", "up"))

    def function(x: torch.Tensor, *weights: torch.Tensor) -> Any:
        if not packed:
            return KERNEL.eager(x, weights[0].t(), weights[1].t(), activation)
        opened, passed = functional.linear(x, weights[0]).chunk(2, -1)
        return ACTIVATIONS[activation](opened) * passed

    inputs = [x, torch.cat((gate, up))] if packed else [x, gate, up]
    tolerance = TOLERANCE[dtype]
    graph = check_fusion(KERNEL, function, inputs, rtol=tolerance, atol=tolerance, decomposed=decomposed)
    assert len(graph.ops) == 1


class Mlp(nn.Module):
    """As Llama spells it in transformers."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate_proj, self.up_proj = nn.Linear(8, 24, bias=bias), nn.Linear(8, 24, bias=bias)
        self.down_proj = nn.Linear(24, 8, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's result."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


@pytest.mark.parametrize("decomposed", [False, True])
def test_matches_llama_s_mlp(decomposed: bool) -> None:
    graph = check_fusion(KERNEL, Mlp(), [torch.randn(2, 5, 8)], rtol=1e-5, atol=1e-5, decomposed=decomposed)
    assert len(graph.ops) == 2


def test_matches_packed_weights_with_the_gate_last() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        up, gate = functional.linear(x, w).chunk(2, -1)
        return up * functional.silu(gate)

    check_fusion(KERNEL, function, [torch.randn(6, 16), torch.randn(24, 16)], rtol=1e-5, atol=1e-5)


def test_what_somebody_else_reads_stays() -> None:
    def function(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        up = functional.linear(x, u)
        return functional.silu(functional.linear(x, g)) * up, up

    graph = check_fusion(
        KERNEL, function, [torch.randn(6, 16), torch.randn(8, 16), torch.randn(8, 16)], rtol=1e-5, atol=1e-5
    )
    assert sorted(op.target for op in graph.ops) == ["aten.linear.default", "opweave.gated_linear.default"]


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, w)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, g, u: functional.silu(linear(x, g)) * linear(y, u),  # two tensors
        lambda x, y, g, u: functional.silu(linear(x, g)) * y[:, :8],
        lambda x, y, g, u: linear(x, g) * linear(x, u),
        lambda x, y, g, u: functional.hardswish(linear(x, g)) * linear(x, u),
        lambda x, y, g, u: functional.silu(linear(x, g)) + linear(x, u),
        lambda x, y, g, u: functional.silu(linear(x, g)) * functional.silu(linear(x, u)),
        lambda x, y, g, u: functional.silu(linear(x, g)[:, :1]) * linear(x, u),  # broadcast
        lambda x, y, g, u: functional.silu(linear(x, g)[:, ::2]) * linear(x, u)[:, ::2],
        lambda x, y, g, u: functional.silu(functional.linear(x, g, u[:, 0])) * linear(x, u),
        lambda x, y, g, u: functional.silu(linear(x, g)[:3]) * linear(x, u)[3:],  # rows, not columns
        lambda x, y, g, u: functional.silu(linear(x, g).t()) * linear(x, u).t(),
    ],
)
def test_leaves_what_it_does_not_compute(function: Callable[..., torch.Tensor]) -> None:
    inputs = [torch.randn(6, 16), torch.randn(6, 16), torch.randn(8, 16), torch.randn(8, 16)]
    assert check_matches(KERNEL, exported(function, inputs, decomposed=False).graph) == ()


def test_leaves_rows_of_a_square_that_look_like_columns() -> None:
    """Rows 2 and 3 begin where, in a packed product, other columns would."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        both = functional.linear(x, w)
        return functional.silu(both[:2, :4]) * both[2:, :4]

    assert (
        check_matches(KERNEL, exported(function, [torch.randn(4, 8), torch.randn(8, 8)], decomposed=False).graph) == ()
    )


def test_leaves_layers_with_a_bias() -> None:
    assert check_matches(KERNEL, exported(Mlp(bias=True), [torch.randn(2, 5, 8)], decomposed=False).graph) == ()
