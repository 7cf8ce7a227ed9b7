"""What ``add_rms_norm_backward`` and ``add_layer_norm_backward`` replace in a graph, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.kernels import add_layer_norm_backward, add_rms_norm_backward
from tests.kernels.matching import check_fusion, check_matches, exported

COLUMNS = 16
DECOMPOSED = pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])


def tensors_of(module: Any, dtype: torch.dtype, **sizes: Any) -> dict[str, torch.Tensor]:
    given = module.arguments(dtype, rows=6, columns=COLUMNS, **sizes)
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


@DECOMPOSED
@pytest.mark.parametrize("hidden_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", [add_rms_norm_backward, add_layer_norm_backward], ids=["rms", "layer"])
def test_matches_what_a_user_says(module: Any, dtype: torch.dtype, hidden_gradient: bool, decomposed: bool) -> None:
    """All of it becomes one launch. On a CPU, PyTorch decomposes with mean and scale rounded to bfloat16: no match."""
    tensors = tensors_of(module, dtype, hidden_gradient=hidden_gradient)
    rounds = module is add_layer_norm_backward and dtype == torch.bfloat16 and decomposed
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for leading in ((6,), (2, 3)):
        inputs = [value.view(*leading, COLUMNS) if value.dim() == 2 else value for value in tensors.values()]

        def function(*given: torch.Tensor) -> Any:
            return module.eager(**{"hidden_gradient": None, **dict(zip(tensors, given, strict=True))}, epsilon=1e-5)

        graph = check_fusion(
            module.KERNEL,
            function,
            inputs,
            rtol=tolerance,
            atol=tolerance,
            decomposed=decomposed,
            count=int(not rounds),
        )
        assert rounds or len(graph.ops) == 1


def rms(
    out_gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    power: int = 2,
    dim: int = -1,
    count: int = COLUMNS,
    other: bool = False,
    rows: int = 0,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ATen decomposes ``_fused_rms_norm_backward``."""
    if scale is None:
        scale = torch.rsqrt(hidden.pow(power).mean(dim, keepdim=True) + 1e-6)
    normalized = hidden * scale
    weighted = out_gradient * weight
    total = torch.sum(normalized * weighted, dim=[1], keepdim=True)
    gradient = (weighted - (normalized / count) * total) * scale
    return gradient, torch.sum((hidden if other else out_gradient) * normalized, dim=[rows])


def layer(
    out_gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    correction: int = 0,
    count: int = COLUMNS,
    other: bool = False,
    rows: int = 0,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """As ATen decomposes ``native_layer_norm_backward``."""
    variance, mean = torch.var_mean(hidden, -1, correction=correction, keepdim=True)
    if scale is None:
        scale = torch.rsqrt(variance + 1e-6)
    normalized = (hidden - mean) * scale
    weighted = out_gradient * weight
    total = (weighted * normalized).sum(1, keepdim=True)
    gradient = (scale / COLUMNS) * (weighted * count - weighted.sum(1, keepdim=True) - normalized * total)
    return gradient, (out_gradient * normalized).sum(rows), (hidden if other else out_gradient).sum(rows)


def square(module: Any) -> list[torch.Tensor]:
    """As many rows as columns, so that no shape gives away which dimension was meant."""
    given = module.arguments(torch.float32, rows=COLUMNS, columns=COLUMNS)
    return [given[name] for name in ("out_gradient", "hidden", "weight")]


@DECOMPOSED
@pytest.mark.parametrize(("module", "function"), [(add_rms_norm_backward, rms), (add_layer_norm_backward, layer)])
def test_matches_aten_s_decomposition(module: Any, function: Callable[..., Any], decomposed: bool) -> None:
    graph = check_fusion(module.KERNEL, function, square(module), rtol=1e-5, atol=1e-5, decomposed=decomposed)
    assert len(graph.ops) == 1


CHANGED: Mapping[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = MappingProxyType(
    {
        "a cube": (add_rms_norm_backward, rms, {"power": 3}),
        "the mean of a column": (add_rms_norm_backward, rms, {"dim": 0}),
        "another count": (add_rms_norm_backward, rms, {"count": 15}),
        "the weight's gradient of something else": (add_rms_norm_backward, rms, {"other": True}),
        "sums over columns": (add_rms_norm_backward, rms, {"rows": 1}),
        "a scale from elsewhere": (add_rms_norm_backward, rms, {"scale": torch.ones(COLUMNS, 1)}),
        "sample variance": (add_layer_norm_backward, layer, {"correction": 1}),
        "another count of layers": (add_layer_norm_backward, layer, {"count": 15}),
        "the bias's gradient of something else": (add_layer_norm_backward, layer, {"other": True}),
        "sums over columns of layers": (add_layer_norm_backward, layer, {"rows": 1}),
        "a scale of layers from elsewhere": (add_layer_norm_backward, layer, {"scale": torch.ones(COLUMNS, 1)}),
    }
)


@DECOMPOSED
@pytest.mark.parametrize("case", CHANGED)
def test_leaves_other_arithmetic_alone(case: str, decomposed: bool) -> None:
    module, function, change = CHANGED[case]
    graph = exported(lambda *given: function(*given, **change), square(module), decomposed=decomposed).graph
    assert not check_matches(module.KERNEL, graph)


@DECOMPOSED
def test_leaves_a_gradient_without_the_weight_s_alone(decomposed: bool) -> None:
    graph = exported(lambda *given: rms(*given)[0], square(add_rms_norm_backward), decomposed=decomposed).graph
    assert not check_matches(add_rms_norm_backward.KERNEL, graph)


@DECOMPOSED
def test_leaves_other_rounding_and_layouts_alone(decomposed: bool) -> None:
    """A gradient in float32 for bfloat16 operands; a matrix that lies by columns."""
    out_gradient, hidden, weight = square(add_rms_norm_backward)
    narrow = [value.bfloat16() for value in (out_gradient, hidden, weight)]
    for function, inputs in (
        (lambda g, h, w: rms(g.float(), h.float(), w), narrow),
        (lambda g, h, w: rms(g.t(), h, w), [out_gradient, hidden, weight]),
        (lambda g, h, w: rms(g, h.t(), w), [out_gradient, hidden, weight]),
        (lambda g, h, w: rms(g, h, w[:, 0]), [out_gradient, hidden, hidden]),
    ):
        graph = exported(function, inputs, decomposed=decomposed).graph
        assert not check_matches(add_rms_norm_backward.KERNEL, graph)
