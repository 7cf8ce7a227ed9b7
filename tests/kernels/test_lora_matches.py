"""Where ``lora`` and ``lora_linear`` stand in a graph, and where they must not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from torch import nn
from torch.nn.functional import linear

from opweave.kernels import lora, lora_linear
from tests.kernels.matching import check_fusion, check_matches, exported

KERNELS = (lora.KERNEL, lora_linear.KERNEL)
ROUNDING: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-5, torch.bfloat16: 2.0**-5})


class Peft(nn.Module):
    """What PEFT makes of a linear layer, in its words."""

    def __init__(self, dtype: torch.dtype, bias: bool = True, scaling: float = 2.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(24, 40, bias=bias, dtype=dtype)
        self.lora_A = nn.Linear(24, 4, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(4, 40, bias=False, dtype=dtype)
        self.lora_dropout = nn.Dropout(0.1)
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Base layer and adapter."""
        result: torch.Tensor = self.base_layer(x)
        result = result + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling
        return result


def tensors(dtype: torch.dtype = torch.float32, *leading: int) -> list[torch.Tensor]:
    """``x [..., 24]`` and the weights of torch layers: ``[40, 24]``, ``[4, 24]``, ``[40, 4]``, and a bias ``[40]``."""
    torch.manual_seed(2)
    shapes = ((*(leading or (6,)), 24), (40, 24), (4, 24), (40, 4), (40,))
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]


def spelled(x: Any, w: Any, a: Any, b: Any, bias: Any) -> torch.Tensor:
    return linear(x, w, bias) + 0.5 * linear(linear(x, a), b)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_matches_linear_layers(kernel: Any, decomposed: bool, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    bound = ROUNDING[dtype]
    for inputs in (tensors(dtype, *leading), [*tensors(dtype, *leading)[:4], None]):
        given = [tensor for tensor in inputs if tensor is not None]
        function = spelled if len(given) == 5 else (lambda x, w, a, b: spelled(x, w, a, b, None))
        graph = check_fusion(kernel, function, given, rtol=bound, atol=bound, decomposed=decomposed)
        assert len(graph.ops) == (1 if kernel is lora.KERNEL else 2)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_matches_what_peft_says(kernel: Any, decomposed: bool) -> None:
    for module in (Peft(torch.float32), Peft(torch.float32, bias=False, scaling=1.0)):
        inputs = [torch.randn(2, 5, 24)]
        check_fusion(kernel, module.eval(), inputs, rtol=1e-5, atol=1e-5, decomposed=decomposed)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
def test_matches_its_own_eager(kernel: Any, decomposed: bool) -> None:
    sizes = {"tokens": 6, "depth": 24, "columns": 40, "rank": 4, "bias": True}
    given = kernel.arguments(torch.float32, **sizes)
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor) and name != "seed"]

    def function(*values: torch.Tensor) -> torch.Tensor:
        result = kernel.eager(**{**given, **dict(zip(names, values, strict=True))})
        y: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return y

    check_fusion(kernel, function, [given[name] for name in names], rtol=1e-5, atol=1e-5, decomposed=decomposed)


def test_dropout_stays_and_the_rest_is_fused() -> None:
    def function(x: Any, w: Any, a: Any, b: Any, mask: Any) -> torch.Tensor:
        return linear(x, w) + 2.0 * linear(linear(x * mask, a), b)

    inputs = [*tensors()[:4], 2.0 * torch.randint(2, (6, 24))]
    graph = check_fusion(lora_linear.KERNEL, function, inputs, rtol=1e-5, atol=1e-5)
    assert len(graph.ops) == 3
    assert not check_matches(lora.KERNEL, exported(function, inputs, decomposed=False).graph)


def test_a_low_rank_tensor_that_somebody_else_reads_stays() -> None:
    def function(x: Any, w: Any, a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
        s = linear(x, a)
        return linear(x, w) + linear(s, b), s

    graph = check_fusion(lora.KERNEL, function, tensors()[:4], rtol=1e-5, atol=1e-5)
    assert len(graph.ops) == 2


def test_matches_the_gradient_of_the_input() -> None:
    def function(grad_y: torch.Tensor, w: torch.Tensor, grad_s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return grad_y @ w + grad_s @ a

    inputs = [torch.randn(6, 40), torch.randn(40, 24), torch.randn(6, 4), torch.randn(4, 24)]
    check_fusion(lora_linear.KERNEL, function, inputs, rtol=1e-5, atol=1e-5)


REFUSED: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "a scale for each column": lambda x, w, a, b, v: linear(x, w) + v * linear(linear(x, a), b),
        "a bias of the adapter": lambda x, w, a, b, v: linear(x, w) + linear(linear(x, a), b, v),
        "a scaled bias of the adapter": lambda x, w, a, b, v: linear(x, w) + 2 * linear(linear(x, a), b, v),
        "subtracted": lambda x, w, a, b, v: linear(x, w) - linear(linear(x, a), b),
        "scaled by alpha": lambda x, w, a, b, v: torch.add(linear(x, w), linear(linear(x, a), b), alpha=2),
        "scaled as a whole": lambda x, w, a, b, v: 2 * linear(x, w) + linear(linear(x, a), b),
        "one row for all": lambda x, w, a, b, v: linear(x, w) + linear(linear(x[:1], a), b),
        "no low rank": lambda x, w, a, b, v: linear(x, w) + linear(x, w + 1),
        "an activation between": lambda x, w, a, b, v: linear(x, w) + linear(linear(x, a), b).relu(),
        "float64": lambda x, w, a, b, v: linear(x.double(), w.double()) + linear(linear(x, a), b).double(),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_is_something_else(case: str) -> None:
    for decomposed in (False, True):
        graph = exported(REFUSED[case], tensors(), decomposed=decomposed).graph
        assert not check_matches(lora_linear.KERNEL, graph)
        assert not check_matches(lora.KERNEL, graph)


def test_the_adapter_of_another_input_is_for_the_up_projection_only() -> None:
    def function(x: Any, w: Any, a: Any, b: Any) -> torch.Tensor:
        return linear(x, w) + linear(linear(x.abs(), a), b)

    graph = exported(function, tensors()[:4], decomposed=False).graph
    assert not check_matches(lora.KERNEL, graph)
    assert check_matches(lora_linear.KERNEL, graph)
