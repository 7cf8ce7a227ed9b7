"""What normalisations do with extreme values, and their gradients; `test_interpreted.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opweave.kernels import add_layer_norm, add_rms_norm, add_rms_norm_quantize
from opweave.kernels._configs import Config
from tests.support.interpreter import correct

BLOCKS = [None, Config({"block": 32}, num_warps=1)]
IDS = ["whole rows", "in blocks"]


@pytest.fixture(autouse=True)
def _corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)


def launched(module: Any, *inputs: Any, config: Config | None = None) -> dict[str, torch.Tensor]:
    """What one launch writes, by name."""
    kernel = module.KERNEL
    outputs = dict(zip(kernel.written, kernel.allocate(*inputs), strict=True))
    kernel.launch(*inputs, **outputs, config=config)
    return outputs


def test_every_bfloat16_survives_the_upcast() -> None:
    """All finite values come through load, upcast, sum with zero and downcast; subnormals included."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    every = every[every.isfinite()].reshape(4, -1)
    weight = torch.ones(every.shape[-1], dtype=torch.bfloat16)
    made = launched(add_rms_norm, every, torch.zeros_like(every), weight, 1.0)
    assert torch.equal(made["hidden"], every)


@pytest.mark.parametrize("config", BLOCKS, ids=IDS)
def test_huge_and_tiny_values_behave_as_in_torch(config: Config | None) -> None:
    """A sum that overflows float16 is infinite, and a row of zeros stays zero for a positive epsilon."""
    x = torch.tensor([[6e4, 1.0] * 20, [0.0, 0.0] * 20, [1e-7, -1e-7] * 20], dtype=torch.float16)
    weight = torch.ones(40, dtype=torch.float16)
    for module, inputs in ((add_rms_norm, (x, x, weight, 1e-6)), (add_layer_norm, (x, x, weight, weight, 1e-6))):
        made = launched(module, *inputs, config=config)
        for actual, expected in zip(made.values(), module.reference(*inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2.0**-10, atol=2.0**-24, equal_nan=True)


@pytest.mark.parametrize("config", BLOCKS, ids=IDS)
def test_layers_far_from_zero_lose_no_digits(config: Config | None) -> None:
    """E(x^2) - E(x)^2 would be off by far here: squares are 2**26, and float32 has 24 digits."""
    noise = torch.randint(-8, 9, (3, 101), generator=torch.Generator().manual_seed(0)) / 8
    x, weight, bias = 8192 + noise, torch.ones(101), torch.zeros(101)
    made = launched(add_layer_norm, x, torch.zeros_like(x), weight, bias, 1e-5, config=config)
    expected = torch.nn.functional.layer_norm(noise.double(), (101,), eps=1e-5)
    torch.testing.assert_close(made["out"].double(), expected, rtol=1e-4, atol=1e-3)


def gradients(function: Any, inputs: list[Any], use: str) -> list[torch.Tensor | None]:
    """Of a loss that reads ``hidden``, ``out`` or both."""
    leaves = [value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value for value in inputs]
    hidden, out = function(*leaves)
    loss: Any = sum(value.sin().square().sum() for value, name in ((hidden, "hidden"), (out, "out")) if name in use)
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


@pytest.mark.parametrize("use", ["hidden and out", "out", "hidden"])
@pytest.mark.parametrize("module", [add_rms_norm, add_layer_norm], ids=["rms", "layer"])
def test_gradients_are_those_of_eager_in_float64(module: Any, use: str) -> None:
    inputs = list(module.KERNEL.arguments(torch.float32, rows=6, columns=37).values())
    inputs[:2] = [value.view(2, 3, 37) for value in inputs[:2]]
    exact = [value.double() if isinstance(value, torch.Tensor) else value for value in inputs]
    wanted = gradients(module.eager, exact, use)
    for actual, expected in zip(gradients(module.KERNEL, inputs, use), wanted, strict=True):
        if expected is None or actual is None:
            assert expected is actual
        else:
            torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("module", [add_rms_norm, add_layer_norm], ids=["rms", "layer"])
def test_gradients_have_the_same_bits_each_time(module: Any) -> None:
    inputs = list(module.KERNEL.arguments(torch.float32, rows=9, columns=37).values())
    first, second = (gradients(module.KERNEL, inputs, "out") for _ in range(2))
    pairs = zip(first, second, strict=True)
    assert all(one is not None and other is not None and torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("dtype", add_rms_norm_quantize.LIMITS)
@pytest.mark.parametrize("config", BLOCKS, ids=IDS)
def test_quantisation_says_where_numbers_are_none(config: Config | None, dtype: str) -> None:
    """A NaN or an infinity spoils its own row only, and the scale of that row shows it."""
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    clean = launched(add_rms_norm_quantize, x, x, torch.ones(40), 1e-5, 0.0, dtype, config=config)
    x[1, 3], x[2, 35] = torch.nan, torch.inf
    made = launched(add_rms_norm_quantize, x, x, torch.ones(40), 1e-5, 0.0, dtype, config=config)
    assert made["scale"].isnan().flatten().tolist() == [False, True, True, False]
    for name in ("hidden", "out", "scale"):
        for row in (0, 3):
            assert torch.equal(made[name][row].float(), clean[name][row].float())
    if dtype == "float8_e4m3fn":
        assert made["out"][1].float().isnan().all()
        assert made["out"][2].float().isnan().all()


@pytest.mark.parametrize("dtype", add_rms_norm_quantize.LIMITS)
@pytest.mark.parametrize("config", BLOCKS, ids=IDS)
def test_quantisation_rounds_ties_to_even(config: Config | None, dtype: str) -> None:
    """Rows as long as their root mean square, so that the normalisation is exact, and the largest the limit itself."""
    limit = add_rms_norm_quantize.LIMITS[dtype]
    ties = {"int8": [0.5, 1.5, -2.5, 126.5], "float8_e4m3fn": [17.0, -19.0, 424.0, 2.0**-10]}[dtype]
    row = torch.tensor([limit, *ties, *[1.0] * 35])
    # Every row is a power of two times itself when the rest of its mean square is put into a column of weight zero.
    rest = 41 * 4.0**9 - row.square().sum()
    x = torch.cat([row, rest.sqrt()[None]])[None]
    weight = torch.ones(41)
    weight[-1] = 0
    made = launched(add_rms_norm_quantize, x, torch.zeros_like(x), weight, 0.0, 0.0, dtype, config=config)
    wanted = {"int8": [127, 0, 2, -2, 126], "float8_e4m3fn": [448.0, 16.0, -20.0, 416.0, 0.0]}[dtype]
    reference = add_rms_norm_quantize.reference(x, torch.zeros_like(x), weight, 0.0, 0.0, dtype)
    assert made["out"][0, :5].float().tolist() == wanted
    assert torch.equal(made["out"].float(), reference[1].float())


@pytest.mark.parametrize("config", BLOCKS, ids=IDS)
def test_quantisation_saturates_where_the_scale_is_a_subnormal_number(config: Config | None) -> None:
    """190 / 127 of the smallest number is rounded to that number itself, so that 190 has no place in int8."""
    weight = torch.tensor([190.0, 100.0, -190.0, *[3.0] * 37], dtype=torch.float64).mul(2.0**-149).float()
    ones = torch.ones(2, 40)
    made = launched(add_rms_norm_quantize, ones, torch.zeros(2, 40), weight, 0.0, 0.0, "int8", config=config)
    assert made["scale"].double().tolist() == [[2.0**-149]] * 2
    assert made["out"][:, :4].tolist() == [[127, 100, -127, 3]] * 2
