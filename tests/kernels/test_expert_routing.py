"""What ``kernels/expert_routing.py`` does besides numerics: ties, gradients, refusals, cost, matches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels.expert_routing import KERNEL, cost
from tests.kernels.experts import check_refusal


def logits(tokens: int = 12, experts: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
def test_is_what_models_compute(normalize: bool) -> None:
    for one, other in zip(KERNEL(logits(), 3, normalize), KERNEL.eager(logits(), 3, normalize), strict=True):
        torch.testing.assert_close(one, other)


def test_equal_logits_go_to_the_lower_expert_first() -> None:
    given = torch.tensor([[0.0, 1.0, 1.0, -0.0], [2.0, 2.0, 2.0, 2.0], [-0.0, 0.0, -1.0, 0.0]])
    weights, indices, order, ends = KERNEL(given, 2, True)
    assert indices.tolist() == [[1, 2], [0, 1], [0, 1]]
    assert weights.unique().tolist() == [0.5]
    assert ends.tolist() == [2, 5, 6, 6]
    assert order.tolist() == [2, 4, 0, 3, 5, 1]


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_softmax_and_topk(normalize: bool) -> None:
    tight, wide = logits().requires_grad_(), logits().double().requires_grad_()
    values, indices = torch.softmax(wide, -1).topk(3, -1)
    expected = values / values.sum(-1, keepdim=True) if normalize else values
    weights, *integers = KERNEL(tight, 3, normalize)
    assert not any(tensor.requires_grad for tensor in integers)
    assert torch.equal(integers[0], indices)
    weight = logits(12, 3, seed=1)
    (actual,) = torch.autograd.grad(weights, tight, weight)
    (truth,) = torch.autograd.grad(expected, wide, weight.double())
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-6)


def test_gradients_have_the_dtype_of_the_logits() -> None:
    given = logits().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(KERNEL(given, 2, False)[0].sum(), given)
    assert gradient.dtype == torch.bfloat16


def test_cost_is_what_was_counted_by_hand() -> None:
    # of each token 5 subtractions and powers, 4 sums, 2 quotients; per assignment float32, int64 and int64
    assert cost("float32", 3, 5, 2).flops == 3 * (5 + 5 + 4 + 2)
    assert cost("bfloat16", 3, 5, 2).traffic_bytes == 2 * 15 + 6 * (4 + 8 + 8) + 4 * 5
    assert cost("float32", 0, 5, 2).traffic_bytes == 4 * 5


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "more than there are": ({"top_k": 8}, r"no more than experts; got 7 experts and top_k=8"),
        "many": ({"logits": torch.zeros(2, 18), "top_k": 17}, r"top_k from 1 to 16.*top_k=17"),
        "none": ({"top_k": 0}, r"got 7 experts and top_k=0"),
        "many experts": ({"logits": torch.zeros(2, 513)}, r"needs 1 to 512 experts"),
        "no experts": ({"logits": torch.zeros(2, 0)}, r"needs 1 to 512 experts"),
        "float64": ({"logits": torch.zeros(2, 7, dtype=torch.float64)}, r"got .*float64"),
        "no dimension": ({"logits": torch.zeros(())}, r"needs logits \[any\].*got \[\]"),
        "columns first": ({"logits": torch.zeros(7, 12).t()}, r"needs logits row-major"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_compute(case: str) -> None:
    check_refusal(KERNEL, {"logits": logits(), "top_k": 2, "normalize": True}, *REFUSED[case])


def test_refuses_more_assignments_than_an_order_can_count() -> None:
    with pytest.raises(ExecutionError, match=r"fewer than 2\*\*31 assignments"):
        KERNEL.allocate(torch.empty(2**28, 8, device="meta"), 8, True)


def test_needs_a_device() -> None:
    made = dict(zip(KERNEL.written, KERNEL.allocate(logits(), 2, True), strict=True))
    with pytest.raises(ExecutionError, match="needs tensors on a CUDA device"):
        KERNEL.launch(logits(), 2, True, **made)
