"""Numerics of ``kernels/add_rms_norm.py`` under Triton's interpreter; `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from opweave.kernels import add_rms_norm
from opweave.kernels.add_rms_norm import launch, operator, reference
from tests.kernels.add_rms_norm_cases import SHAPES, TOLERANCE, check, operands
from tests.support.interpreter import correct


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_float64_computation(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct(monkeypatch)
    check(*shape, dtype=dtype, weight_dtype=dtype, device="cpu")


@pytest.mark.parametrize("weight_dtype", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_weight_may_have_another_dtype(
    dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct(monkeypatch)
    check(3, 97, dtype=dtype, weight_dtype=weight_dtype, device="cpu")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_its_reference_twin(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both round at the same places, so ``hidden`` has the same bits and ``out`` differs by float32's order of sums."""
    correct(monkeypatch)
    inputs = operands(5, 193, dtype=dtype, weight_dtype=dtype)
    hidden, out = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    launch(*inputs, 1e-6, hidden=hidden, out=out)
    expected_hidden, expected_out = reference(*inputs, 1e-6)
    assert torch.equal(hidden, expected_hidden)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected_out, rtol=rtol, atol=atol)


def test_every_bfloat16_survives_the_upcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """All finite values come through load, upcast, sum with zero and downcast; subnormals included."""
    correct(monkeypatch)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    every = every[every.isfinite()].reshape(4, -1)
    hidden, out = torch.empty_like(every), torch.empty_like(every)
    weight = torch.ones(every.shape[-1], dtype=torch.bfloat16)
    launch(every, torch.zeros_like(every), weight, 1.0, hidden=hidden, out=out)
    assert torch.equal(hidden, every)


def test_the_interpreter_as_it_comes_is_off_by_one_rounding_only() -> None:
    """With Triton's own casts little but the last place changes: no arithmetic is done in bfloat16."""
    inputs = operands(3, 257, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    hidden, out = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    launch(*inputs, 1e-6, hidden=hidden, out=out)
    expected_hidden, expected_out = reference(*inputs, 1e-6)
    torch.testing.assert_close(hidden, expected_hidden, rtol=2.0**-7, atol=0)
    torch.testing.assert_close(out, expected_out, rtol=2.0**-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
def test_empty_tensors_launch_nothing(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_rms_norm, "add_rms_norm_kernel", None)
    inputs = operands(*shape, dtype=torch.float32, weight_dtype=torch.float32)
    launch(*inputs, 1e-6, hidden=torch.empty(shape), out=torch.empty(shape))


def test_huge_and_tiny_values_behave_as_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that overflows float16 is infinite, and a row of zeros stays zero for a positive epsilon."""
    correct(monkeypatch)
    x = torch.tensor([[6e4, 1.0], [0.0, 0.0], [1e-7, -1e-7]], dtype=torch.float16)
    hidden, out = torch.empty_like(x), torch.empty_like(x)
    weight = torch.ones(2, dtype=torch.float16)
    launch(x, x, weight, 1e-6, hidden=hidden, out=out)
    for actual, expected in zip((hidden, out), reference(x, x, weight, 1e-6), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2.0**-10, atol=2.0**-24, equal_nan=True)


def test_the_operator_obeys_the_rules_of_custom_operators() -> None:
    """PyTorch's own checks: schema against what is written, fake tensors, dispatch under ``torch.compile``."""
    inputs = operands(3, 33, dtype=torch.float32, weight_dtype=torch.float32)
    outputs = torch.zeros(3, 33), torch.zeros(3, 33)
    results = torch.library.opcheck(operator, (*inputs, 1e-6, *outputs))
    assert set(results.values()) == {"SUCCESS"}


def test_the_operator_is_reached_by_name() -> None:
    inputs = operands(3, 33, dtype=torch.float32, weight_dtype=torch.float32)
    hidden, out = torch.empty(3, 33), torch.empty(3, 33)
    torch.ops.opweave.add_rms_norm_out(*inputs, 1e-6, hidden, out)
    torch.testing.assert_close(out, reference(*inputs, 1e-6)[1])
