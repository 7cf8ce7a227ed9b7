"""What ``add_rms_norm`` and ``add_rms_norm_backward`` do besides numerics: refusals, cost, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from torch._subclasses.fake_tensor import FakeTensorMode

from opweave.errors import ExecutionError
from opweave.kernels import add_rms_norm, add_rms_norm_backward
from tests.kernels.conforming import FLOAT_TOLERANCE


@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE)
def test_reference_is_torch_s_rms_norm_of_the_sum(dtype: torch.dtype) -> None:
    x, residual, weight, epsilon = add_rms_norm.arguments(dtype, rows=5, columns=67).values()
    hidden, out = add_rms_norm.reference(x, residual, weight, epsilon)
    assert torch.equal(hidden, x + residual)
    rtol, atol = FLOAT_TOLERANCE[dtype]
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(hidden, (67,), weight, epsilon), rtol=rtol, atol=atol)


def test_costs_are_what_was_counted_by_hand() -> None:
    cost = add_rms_norm.cost
    assert cost("float32", rows=1, columns=1).flops == 7
    assert cost("float32", rows=2, columns=3).flops == 2 * (3 + 3 + 2 + 1 + 1 + 1 + 3 + 3)
    assert cost("bfloat16", rows=2, columns=3).traffic_bytes == 2 * (4 * 6 + 3)
    assert cost("bfloat16", rows=2, columns=3, weight_dtype="float32").traffic_bytes == 2 * 4 * 6 + 4 * 3
    assert cost("float16", rows=0, columns=8).flops == 0


def test_costs_of_gradients_are_what_was_counted_by_hand() -> None:
    """For two rows of three: sums of squares and of products, scale, both gradients, their sum over the rows."""
    cost = add_rms_norm_backward.cost
    scales = 2 * (3 + 2 + 1 + 1 + 1)  # squares, their sum, mean, epsilon, rsqrt
    means = 2 * (3 + 3 + 2 + 1)  # products with the weight and with hidden, their sum, mean
    gradient = 2 * (2 + 3 * 3)  # scale squared times the mean; times hidden, difference, times scale
    weight_gradient = 2 * 6 + 3
    assert (
        cost("float32", rows=2, columns=3, hidden_gradient=False).flops == scales + means + gradient + weight_gradient
    )
    assert cost("float32", rows=2, columns=3).flops == scales + means + gradient + weight_gradient + 6
    assert cost("bfloat16", rows=2, columns=3).traffic_bytes == 2 * (4 * 6 + 2 * 3)
    assert cost("bfloat16", rows=2, columns=3, hidden_gradient=False).traffic_bytes == 2 * (3 * 6 + 2 * 3)


def arguments(**changed: torch.Tensor) -> dict[str, Any]:
    given = {**dict.fromkeys(("x", "residual"), torch.zeros(2, 8)), "weight": torch.zeros(8), "epsilon": 1e-6}
    return {**given, **{name: torch.zeros(2, 8) for name in ("hidden", "out")}, **changed}


REFUSED: Mapping[str, tuple[dict[str, torch.Tensor], str]] = MappingProxyType(
    {
        "broadcast": ({"residual": torch.zeros(8)}, r"needs residual \[2, 8\].*got \[8\]"),
        "weight of another size": ({"weight": torch.zeros(4)}, r"needs weight \[8\]"),
        "mixed dtypes": ({"out": torch.zeros(2, 8, dtype=torch.float16)}, r"needs out .*float32.*got .*float16"),
        "float64": ({"x": torch.zeros(2, 8, dtype=torch.float64)}, r"of float32, float16, bfloat16 .*got .*float64"),
        "no dimension": ({"x": torch.zeros(())}, r"needs x \[any\].*got \[\]"),
        "another device": ({"residual": torch.zeros(2, 8, device="meta")}, r"on cpu; got .* on meta"),
        "columns first": ({"x": torch.zeros(8, 2).t()}, r"needs x row-major; \[2, 8\] has strides \[1, 2\]"),
        "strided output": ({"out": torch.zeros(2, 16)[:, ::2]}, r"needs out row-major"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    changed, message = REFUSED[case]
    with pytest.raises(ExecutionError, match=message):
        add_rms_norm.launch(**arguments(**changed))


@pytest.mark.parametrize(("output", "other"), [("hidden", "x"), ("out", "residual"), ("out", "hidden")])
def test_refuses_outputs_that_share_memory(output: str, other: str) -> None:
    memory = torch.zeros(3, 8)
    with pytest.raises(ExecutionError, match=rf"needs (hidden|out) in memory of its own; it overlaps {other}|{output}"):
        add_rms_norm.launch(**arguments(**{output: memory[:2], other: memory[1:]}))


def test_outputs_may_be_neighbours() -> None:
    """Regions that touch do not overlap: planned arenas have no gaps. Without a device, that is the next refusal."""
    memory = torch.zeros(4, 8)
    with pytest.raises(ExecutionError, match=r"needs tensors on a CUDA device; they are on cpu"):
        add_rms_norm.launch(**arguments(hidden=memory[:2], out=memory[2:]))


def test_the_operator_s_fake_checks_shapes() -> None:
    """A compiled graph is refused when it is traced, not when it runs; valid shapes give nothing and launch nothing."""
    with FakeTensorMode() as mode:
        x, residual, weight, epsilon, hidden, out = (
            mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments().values()
        )
        add_rms_norm.KERNEL.out_operator(x, residual, weight, epsilon, hidden, out)
        with pytest.raises(ExecutionError, match="needs out"):
            add_rms_norm.KERNEL.out_operator(x, residual, weight, epsilon, hidden, weight)


def test_gradients_refuse_what_they_cannot_compute() -> None:
    given = add_rms_norm_backward.arguments(torch.float32, rows=3, columns=8)
    outputs = dict(zip(add_rms_norm_backward.KERNEL.written, add_rms_norm_backward.allocate(**given), strict=True))
    for changed, message in (
        ({"out_gradient": torch.zeros(3, 4)}, r"needs out_gradient \[3, 8\]"),
        ({"hidden_gradient": torch.zeros(3, 8).half()}, "needs hidden_gradient .*of float32"),
        ({"weight": torch.zeros(3)}, r"needs weight \[8\]"),
        ({"partials": torch.zeros(2, 8)}, r"needs partials \[3, 8\]"),
        ({"weight_gradient": torch.zeros(8).half()}, "needs weight_gradient .*of float32"),
        ({"gradient": given["hidden"]}, "needs gradient in memory of its own; it overlaps hidden"),
        ({"gradient": given["hidden_gradient"]}, "it overlaps hidden_gradient"),
    ):
        with pytest.raises(ExecutionError, match=message):
            add_rms_norm_backward.launch(**{**given, **outputs, **changed})


def test_scratch_grows_with_rows_up_to_a_limit() -> None:
    for rows, programs in ((1, 1), (264, 264), (265, 264), (100000, 264)):
        given = add_rms_norm_backward.arguments(torch.bfloat16, "meta", rows=rows, columns=8)
        partials = add_rms_norm_backward.allocate(**given)[-1]
        assert (partials.shape, partials.dtype) == ((programs, 8), torch.float32)


@pytest.mark.parametrize("hidden_is_used", [False, True])
def test_a_compiled_model_has_the_gradients_of_eager(hidden_is_used: bool) -> None:
    """Forward and backward operators are in the graphs that autograd traces, with no graph break."""

    def loss(function: Any, *inputs: torch.Tensor) -> Any:
        hidden, out = function(*inputs, 1e-5)
        return out.square().sum() + (hidden.sin().sum() if hidden_is_used else 0)

    inputs = list(add_rms_norm.arguments(torch.float32, rows=5, columns=16).values())[:3]
    leaves, exact = ([v.detach().to(d).requires_grad_() for v in inputs] for d in (torch.float32, torch.float64))
    compiled = torch.compile(lambda *given: loss(add_rms_norm.KERNEL, *given), backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(add_rms_norm.eager, *exact), exact)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)
