"""What ``kernels/grouped_gated_linear.py`` does besides numerics: gradients, a whole layer, refusals, cost, matches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.kernels.expert_routing import KERNEL as ROUTING
from opweave.kernels.grouped_gated_linear import KERNEL, cost
from opweave.kernels.grouped_linear_scatter import KERNEL as SCATTER
from tests.kernels.experts import check_gradients, check_refusal, inputs_for


def test_is_what_a_loop_over_experts_computes() -> None:
    given = inputs_for(KERNEL)
    torch.testing.assert_close(KERNEL(*given.values()), KERNEL.eager(*given.values()))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gradients_are_those_of_a_loop_over_experts(activation: str) -> None:
    given = inputs_for(KERNEL, activation=activation)
    given["ends"] = torch.tensor([0, 11, 11, 18], dtype=torch.int32)  # two experts without rows
    check_gradients(KERNEL, given, "x", "gate_weight", "up_weight")


def test_gradients_of_narrow_and_strided_operands() -> None:
    check_gradients(KERNEL, inputs_for(KERNEL, torch.bfloat16), "x", "gate_weight", "up_weight")
    given = inputs_for(KERNEL)
    both = torch.cat([given["gate_weight"], given["up_weight"]], 2).transpose(1, 2).contiguous()
    gate, up = both.transpose(1, 2).chunk(2, dim=2)
    given |= {"gate_weight": gate, "up_weight": up, "x": given["x"].view(3, 3, 11)}
    check_gradients(KERNEL, given, "x", "gate_weight", "up_weight")


def layer(top_k: int, x: Any, router: Any, gate: Any, up: Any, down: Any) -> torch.Tensor:
    """A sparse layer by this package's kernels."""
    weights, _, order, ends = ROUTING(x @ router, top_k, True)
    hidden = KERNEL(x, gate, up, order, ends, top_k, "silu")
    out: torch.Tensor = SCATTER(hidden, down, order, ends, weights)
    return out


def dense(top_k: int, x: Any, router: Any, gate: Any, up: Any, down: Any) -> torch.Tensor:
    """The same with every expert for every token, and zero for its share where it was not chosen."""
    values, indices = (x @ router).topk(top_k, -1)
    shares = torch.zeros_like(x @ router).scatter(-1, indices, values.softmax(-1))
    hidden = functional.silu(torch.einsum("th,ehi->tei", x, gate)) * torch.einsum("th,ehi->tei", x, up)
    return torch.einsum("te,tei,eih->th", shares, hidden, down)


@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (8, 8), (3, 1)])
def test_a_layer_and_its_gradients_are_those_of_dense_products(experts: int, top_k: int) -> None:
    random = torch.Generator().manual_seed(1)
    shapes = ((13, 6), (6, experts), (experts, 6, 10), (experts, 6, 10), (experts, 10, 6))
    wide = [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]
    tight = [tensor.detach().float().requires_grad_() for tensor in wide]
    out, expected = layer(top_k, *tight), dense(top_k, *wide)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(out.shape, generator=random)
    actual = torch.autograd.grad(out, tight, weight)
    for one, other in zip(actual, torch.autograd.grad(expected, wide, weight.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=2e-4)


def test_cost_is_what_was_counted_by_hand() -> None:
    sizes = {"tokens": 3, "experts": 4, "top_k": 2, "hidden": 5, "intermediate": 7}
    assert cost("float32", **sizes).flops == 6 * 7 * (2 * 10 + 2)
    assert cost("bfloat16", **sizes).traffic_bytes == 2 * (3 * 5 + 2 * 4 * 5 * 7 + 6 * 7) + 4 * 6 + 4 * 4
    few = cost("float32", **sizes | {"tokens": 1}).traffic_bytes
    assert few == 4 * (5 + 2 * 2 * 5 * 7 + 2 * 7) + 4 * 2 + 4 * 4


def test_flops_are_counted_without_values() -> None:
    given = inputs_for(KERNEL)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        KERNEL(*given.values())
    assert counter.get_total_flops() == 18 * 7 * 4 * 11


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "float64": ({"x": torch.zeros(9, 11, dtype=torch.float64)}, r"got .*float64"),
        "another hidden size": ({"gate_weight": torch.zeros(4, 10, 7)}, r"needs gate_weight \[any, 11, any\]"),
        "weights of two sizes": ({"up_weight": torch.zeros(4, 11, 8)}, r"needs up_weight \[4, 11, 7\]"),
        "mixed dtypes": ({"up_weight": torch.zeros(4, 11, 7, dtype=torch.float16)}, r"needs up_weight .*float32"),
        "order of tokens": ({"order": torch.zeros(9, dtype=torch.int32)}, r"needs order \[18\]"),
        "another top_k": ({"top_k": 3}, r"needs order \[27\]"),
        "no choices": ({"top_k": 0}, r"needs top_k from 1; got 0"),
        "ends of another number": ({"ends": torch.zeros(5, dtype=torch.int32)}, r"needs ends \[4\]"),
        "an activation without gate": ({"activation": "relu6"}, r"needs an activation of silu, .*got 'relu6'"),
        "columns first": ({"x": torch.zeros(11, 9).t()}, r"needs x row-major"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    check_refusal(KERNEL, inputs_for(KERNEL), *REFUSED[case])
