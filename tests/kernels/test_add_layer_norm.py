"""What ``add_layer_norm`` and ``add_layer_norm_backward`` do besides numerics: refusals, cost, gradients, matches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels import add_layer_norm, add_layer_norm_backward
from tests.kernels.conforming import FLOAT_TOLERANCE
from tests.kernels.matching import check_fusion, check_matches, exported


@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE)
def test_reference_is_torch_s_layer_norm_of_the_sum(dtype: torch.dtype) -> None:
    given = add_layer_norm.arguments(dtype, rows=5, columns=67)
    rtol, atol = FLOAT_TOLERANCE[dtype]
    for actual, expected in zip(add_layer_norm.reference(**given), add_layer_norm.eager(**given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("hidden_gradient", [False, True])
def test_gradients_of_reference_are_torch_s(hidden_gradient: bool) -> None:
    given = add_layer_norm_backward.arguments(torch.float32, rows=5, columns=67, hidden_gradient=hidden_gradient)
    results = zip(add_layer_norm_backward.reference(**given), add_layer_norm_backward.eager(**given), strict=True)
    for actual, expected in results:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_costs_are_what_was_counted_by_hand() -> None:
    """For two rows of three."""
    cost = add_layer_norm.cost
    total, mean, distance, scale = 3, 2 + 1, 3, 3 + 2 + 1 + 1 + 1
    assert cost("float32", rows=2, columns=3).flops == 2 * (total + mean + distance + scale + 3 + 3 + 3)
    assert cost("bfloat16", rows=2, columns=3).traffic_bytes == 2 * (4 * 6 + 2 * 3)
    assert cost("bfloat16", rows=2, columns=3, weight_dtype="float32").traffic_bytes == 2 * 4 * 6 + 4 * 2 * 3
    backward = add_layer_norm_backward.cost
    means = 3 + (2 + 1) + 3 + (2 + 1)  # of weighted and of its product with normalized
    gradient = 3 + 3 + 3 + 3  # two differences, two products
    flops = 2 * (mean + distance + scale + 3 + means + gradient + 3) + 3 + 3  # products, then sums of both rows
    assert backward("float32", rows=2, columns=3, hidden_gradient=False).flops == flops
    assert backward("float32", rows=2, columns=3).flops == flops + 6
    assert backward("bfloat16", rows=2, columns=3).traffic_bytes == 2 * (4 * 6 + 3 * 3)


def test_refuses_what_it_cannot_compute() -> None:
    given = add_layer_norm.arguments(torch.float32, rows=2, columns=8)
    outputs = {"hidden": torch.zeros(2, 8), "out": torch.zeros(2, 8)}
    for changed, message in (
        ({"residual": torch.zeros(8)}, r"needs residual \[2, 8\]"),
        ({"bias": torch.zeros(4)}, r"needs bias \[8\]"),
        ({"bias": torch.zeros(8).half()}, "needs bias .*of float32"),
        ({"x": torch.zeros(8, 2).t()}, "needs x row-major"),
        ({"out": given["x"]}, "needs out in memory of its own; it overlaps x"),
        ({}, "needs tensors on a CUDA device"),
    ):
        with pytest.raises(ExecutionError, match=message):
            add_layer_norm.launch(**{**given, **outputs, **changed})
    backward = add_layer_norm_backward.arguments(torch.float32, rows=2, columns=8)
    made = zip(add_layer_norm_backward.KERNEL.written, add_layer_norm_backward.allocate(**backward), strict=True)
    outputs = dict(made)
    for changed, message in (
        ({"hidden_gradient": torch.zeros(2, 4)}, r"needs hidden_gradient \[2, 8\]"),
        ({"partials": torch.zeros(2, 8)}, r"needs partials \[2, 2, 8\]"),
        ({"bias_gradient": outputs["weight_gradient"]}, "in memory of its own; it overlaps"),
        ({"bias_gradient": torch.zeros(8).half()}, "needs bias_gradient .*of float32"),
    ):
        with pytest.raises(ExecutionError, match=message):
            add_layer_norm_backward.launch(**{**backward, **outputs, **changed})


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_what_a_model_says(dtype: torch.dtype, decomposed: bool) -> None:
    *inputs, epsilon = add_layer_norm.arguments(dtype, rows=6, columns=16).values()
    rtol, atol = FLOAT_TOLERANCE[dtype]
    for shape in ((6, 16), (2, 3, 16)):
        inputs[:2] = [value.view(shape) for value in inputs[:2]]
        graph = check_fusion(
            add_layer_norm.KERNEL,
            lambda x, residual, weight, bias: add_layer_norm.eager(x, residual, weight, bias, epsilon),
            inputs,
            rtol=2 * rtol,
            atol=4 * atol,
            decomposed=decomposed,
        )
        assert len(graph.ops) == 1


class Block(nn.Module):
    """A transformer's residual connection behind a linear layer, then PyTorch's normalisation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalised sum; nobody else reads the sum."""
        normalized: torch.Tensor = self.norm(x + self.linear(x))
        return normalized


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_matches_a_module(decomposed: bool) -> None:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    check_fusion(add_layer_norm.KERNEL, Block(eps=1e-3), [x], rtol=1e-5, atol=1e-5, decomposed=decomposed)
    check_fusion(add_layer_norm.KERNEL, Block(bias=False), [x], rtol=1e-5, atol=1e-5, decomposed=decomposed, count=0)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias)


REFUSED = {
    "scaled": lambda x, r, w, b: norm(torch.add(x, r, alpha=2), w, b),
    "a row is added": lambda x, r, w, b: norm(x + w, w, b),
    "a number is added": lambda x, r, w, b: norm(x + 1.0, w, b),
    "by columns": lambda x, r, w, b: norm((x[:, :6].t() + r[:, :6].t()), w[:6], b[:6]),
    "both dimensions": lambda x, r, w, b: nn.functional.layer_norm(x + r, x.shape, x, r),
    "no bias": lambda x, r, w, b: nn.functional.layer_norm(x + r, (16,), w),
    "no sum": lambda x, r, w, b: norm(x * r, w, b),
    "another dtype of weights": lambda x, r, w, b: norm((x + r).double(), w.double(), b.double()),
    "sample variance": lambda x, r, w, b: (
        ((x + r) - (x + r).mean(-1, keepdim=True)) * torch.rsqrt((x + r).var(-1, keepdim=True) + 1e-5) * w + b
    ),
}


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("case", REFUSED)
def test_leaves_other_arithmetic_alone(case: str, decomposed: bool) -> None:
    inputs = list(add_layer_norm.arguments(torch.float32, rows=6, columns=16).values())[:4]
    assert not check_matches(add_layer_norm.KERNEL, exported(REFUSED[case], inputs, decomposed=decomposed).graph)
