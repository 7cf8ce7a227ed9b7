"""The kernel computes what its reference says, is found by name, and is launched from a compiled model."""

from __future__ import annotations

import pytest
import torch
from squared_relu.squared_relu import KERNEL, cost

import opweave
from opweave.errors import ExecutionError
from opweave.kernels import registry

SIZES = [(1, 1), (7, 31), (3, 257), (2, 1024), (0, 8), (3, 0)]


class Block(torch.nn.Module):
    """A linear layer without bias, and the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 32, bias=False)
        self.bias = torch.nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Primer writes it."""
        return torch.relu(self.up(x) + self.bias) ** 2


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_computes_what_the_reference_says(rows: int, columns: int, dtype: torch.dtype) -> None:
    """On a GPU, or under Triton's interpreter, the kernel; without both the operator computes the reference itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = KERNEL.arguments(dtype, device, rows=rows, columns=columns)
    x, bias = (tensor.double() for tensor in given.values())
    expected = (x + bias).clamp(min=0) ** 2
    torch.testing.assert_close(KERNEL(*given.values()).double(), expected, rtol=2.0**-7, atol=2.0**-11)


def test_gradients_are_those_of_the_formula() -> None:
    given = [t.double().requires_grad_() for t in KERNEL.arguments(torch.float32, rows=3, columns=5).values()]
    narrow = [t.detach().float().requires_grad_() for t in given]
    KERNEL.eager(*given).sum().backward()
    KERNEL(*narrow).sum().backward()
    for one, other in zip(narrow, given, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ExecutionError, match=r"kernel squared_relu needs bias \[4\]"):
        KERNEL(torch.zeros(2, 4), torch.zeros(2))


def test_cost_is_what_was_counted_by_hand() -> None:
    assert cost("float16", 2, 3).flops == 3 * 6
    assert cost("float16", 2, 3).traffic_bytes == 2 * (6 + 6 + 3)


def test_is_found_by_its_entry_point() -> None:
    assert registry.load("squared_relu") is KERNEL


@torch.no_grad()
def test_is_launched_from_a_compiled_model() -> None:
    block, x = Block(), torch.randn(4, 16)
    compiled = torch.compile(block, backend="opweave", options={"kernels": "squared_relu", "strict": True})
    torch.testing.assert_close(compiled(x), block(x))
    assert [kernel for report in opweave.backend_reports() for kernel, _ in report.launches] == ["squared_relu"]


def test_is_launched_from_a_planned_model() -> None:
    block, x = Block().eval(), torch.randn(4, 16)
    planned = opweave.compile(block, (x,), kernels="squared_relu")
    assert "opweave.squared_relu.default" in [op.target for op in planned.plan.graph.ops]
    torch.testing.assert_close(planned(x), block(x))
