"""What ``add_rms_norm_quantize`` does besides numerics: refusals, cost, matches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels import add_rms_norm_quantize
from opweave.kernels.add_rms_norm_quantize import KERNEL, LIMITS
from tests.kernels.matching import check_fusion, check_matches, exported

rms_norm = torch.nn.functional.rms_norm


@pytest.mark.parametrize("quantized", LIMITS)
def test_out_times_scale_is_the_normalisation_again(quantized: str) -> None:
    """Within half a step: of int8 one of the largest's 127 parts, of float8 1/16 of the element itself."""
    given = add_rms_norm_quantize.arguments(torch.float32, rows=7, columns=67, quantized=quantized)
    hidden, out, scale = add_rms_norm_quantize.reference(**given)
    normalized = rms_norm(hidden, (67,), given["weight"], 1e-5)
    half_step = scale / 2 if quantized == "int8" else normalized.abs() / 16 + scale * 2.0**-10
    assert bool(((out.float() * scale - normalized).abs() <= half_step * (1 + 1e-5)).all())


def test_cost_is_what_was_counted_by_hand() -> None:
    """For two rows of three: sum, squares, scale, normalisation, the largest and its scale, quotients, rounding."""
    cost = add_rms_norm_quantize.cost
    flops = 2 * (3 + 3 + 2 + 1 + 1 + 1 + 3 + 3 + 3 + 2 + 1 + 3 + 3)
    assert cost("float32", rows=2, columns=3).flops == flops
    assert cost("bfloat16", rows=2, columns=3).traffic_bytes == 2 * (3 * 6 + 3) + 6 + 2 * 4
    given: dict[str, Any] = {"rows": 2, "columns": 3, "weight_dtype": "float32", "quantized": "float8_e4m3fn"}
    assert cost("float16", **given).traffic_bytes == 2 * 3 * 6 + 4 * 3 + 6 + 2 * 4


def test_refuses_what_it_cannot_compute() -> None:
    given = add_rms_norm_quantize.arguments(torch.float32, rows=2, columns=8)
    outputs: dict[str, Any] = dict(zip(KERNEL.written, add_rms_norm_quantize.allocate(**given), strict=True))
    for changed, message in (
        ({"dtype": "int4"}, "quantises to int8 or float8_e4m3fn; got 'int4'"),
        ({"least_scale": -1.0}, "needs a least scale of zero or more; got -1"),
        ({"least_scale": math.nan}, "needs a least scale of zero or more"),
        ({"dtype": "float8_e4m3fn"}, "needs out .*of float8_e4m3fn.*got .*int8"),
        ({"residual": torch.zeros(8)}, r"needs residual \[2, 8\]"),
        ({"scale": torch.zeros(2)}, r"needs scale \[2, 1\]"),
        ({"scale": torch.zeros(2, 1).half()}, "needs scale .*of float32"),
        ({"hidden": given["x"]}, "needs hidden in memory of its own; it overlaps x"),
        ({}, "needs tensors on a CUDA device"),
    ):
        with pytest.raises(ExecutionError, match=message):
            add_rms_norm_quantize.launch(**{**given, **outputs, **changed})


def test_old_gpus_cannot_convert_to_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say so before Triton fails to compile."""
    monkeypatch.setattr(add_rms_norm_quantize, "architecture_of", lambda _: 80)
    monkeypatch.setattr(add_rms_norm_quantize, "check_device", lambda *_: None)
    given = add_rms_norm_quantize.arguments(torch.float32, rows=0, columns=8, quantized="float8_e4m3fn")
    outputs: dict[str, Any] = dict(zip(KERNEL.written, add_rms_norm_quantize.allocate(**given), strict=True))
    with pytest.raises(ExecutionError, match=r"needs compute capability 8.9 or later .*; this GPU has 8.0"):
        add_rms_norm_quantize.launch(**given, **outputs)
    add_rms_norm_quantize.launch(**{**given, "dtype": "int8"}, **{**outputs, "out": torch.empty(0, 8).to(torch.int8)})


def wide(result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.float() for value in result)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("least_scale", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", LIMITS)
def test_matches_what_a_model_says(quantized: str, dtype: torch.dtype, least_scale: float, decomposed: bool) -> None:
    """A normalisation that the model rounds to bfloat16 may tip a quotient into the next step."""
    sizes: dict[str, Any] = {"rows": 6, "columns": 16, "quantized": quantized, "least_scale": least_scale}
    *inputs, epsilon, least, name = add_rms_norm_quantize.arguments(dtype, **sizes).values()
    inputs[:2] = [value.view(2, 3, 16) for value in inputs[:2]]
    step = (0.0, 1.01) if quantized == "int8" else (2.0**-3, 0.0)
    rtol, atol = step if dtype == torch.bfloat16 else (1e-6, 1e-6)
    graph = check_fusion(
        KERNEL,
        lambda x, residual, weight: wide(add_rms_norm_quantize.eager(x, residual, weight, epsilon, least, name)),
        inputs,
        rtol=rtol + 2.0**-8 * (dtype == torch.bfloat16),
        atol=atol,
        decomposed=decomposed,
    )
    assert not [op for op in graph.ops if op.target.startswith("aten.") and "to" not in op.target]


def vllm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    """Float32 from the sum on, a reciprocal nowhere, the scale bounded from below: nothing is rounded in between."""
    hidden = x + residual
    normalized = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
    scale = (normalized.abs().amax(dim=-1, keepdim=True) / 448.0).clamp(min=1e-6)
    return hidden, (normalized / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float(), scale


def torchao(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    """The largest is bounded rather than the scale, and the lower limit is -128."""
    hidden = x + residual
    normalized = rms_norm(hidden, (16,), weight, 1e-6).float()
    scale = normalized.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return hidden, (normalized / scale).round().clamp(-128, 127).to(torch.int8), scale


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [vllm, torchao])
def test_matches_other_spellings(model: Callable[..., Any], dtype: torch.dtype, decomposed: bool) -> None:
    inputs = list(add_rms_norm_quantize.arguments(dtype, rows=6, columns=16).values())[:3]
    atol = 1.01 if dtype == torch.bfloat16 and model is torchao else 1e-6
    rtol = 2.0**-7 if dtype == torch.bfloat16 and model is torchao else 1e-6
    check_fusion(KERNEL, model, inputs, rtol=rtol, atol=atol, decomposed=decomposed)


def spelled(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    dims: Any = -1,
    limit: float = 127.0,
    bounds: tuple[float, float] = (-127.0, 127.0),
    least: float = 1e-6,
    rounded: bool = True,
    other: bool = False,
    dtype: torch.dtype = torch.int8,
) -> Any:
    """What is matched as it stands; each of the following changes one thing about it."""
    hidden = x + residual
    normalized = rms_norm(hidden, (16,), weight, 1e-6)
    scale = (normalized.abs().amax(dims, keepdim=True) / limit).clamp(min=least)
    quotient = ((hidden if other else normalized) / scale).clamp(*bounds)
    return hidden, (quotient.round() if rounded else quotient).to(dtype).float(), scale


CHANGED: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "the largest of a column": {"dims": 0},
        "the largest of all": {"dims": (0, 1)},
        "another limit": {"limit": 126.0},
        "other bounds": {"bounds": (-127.0, 126.0)},
        "bounds of another dtype": {"bounds": (-448.0, 448.0)},
        "negative bound of the scale": {"least": -1.0},
        "truncated": {"rounded": False},
        "another tensor is divided": {"other": True},
        "another dtype": {"dtype": torch.int16},
        "limits of another dtype": {"dtype": torch.float8_e4m3fn},
    }
)


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_leaves_other_arithmetic_alone(decomposed: bool) -> None:
    inputs = list(add_rms_norm_quantize.arguments(torch.float32, rows=6, columns=16).values())[:3]
    assert check_matches(KERNEL, exported(spelled, inputs, decomposed=decomposed).graph)
    for case, change in CHANGED.items():
        graph = exported(lambda *given, change=change: spelled(*given, **change), inputs, decomposed=decomposed).graph
        assert not check_matches(KERNEL, graph), case


def test_leaves_scales_alone_that_may_be_zero() -> None:
    """A row of zeros is divided by zero there, and gives NaN in float8."""

    def careless(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        normalized = rms_norm(x + residual, (16,), weight, 1e-6)
        scale = normalized.abs().amax(-1, keepdim=True) / 448
        return (normalized / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(), scale

    inputs = list(add_rms_norm_quantize.arguments(torch.float32, rows=6, columns=16).values())[:3]
    assert not check_matches(KERNEL, exported(careless, inputs, decomposed=False).graph)
