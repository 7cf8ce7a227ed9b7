"""What ``kernels/lora.py`` does besides numerics: gradients, seeds, several adapters, refusals, cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from opweave.errors import ExecutionError
from opweave.kernels._dropout import mask
from opweave.kernels.lora import KERNEL, lora
from tests.kernels.lora import TOLERANCE

Inputs = dict[str, Any]


def inputs_for(dtype: torch.dtype = torch.float32, **sizes: Any) -> Inputs:
    """Arguments of ``lora`` of which all but ``w`` want gradients."""
    given = KERNEL.arguments(dtype, **{"tokens": 12, "depth": 21, "columns": 18, "rank": 4, "bias": True, **sizes})
    for name in ("x", "a", "b", "bias"):
        given[name] = given[name].requires_grad_()
    return given


def with_mask(x: Any, w: Any, a: Any, b: Any, bias: Any, seed: Any, offsets: Any, scale: float, p: float) -> Any:
    """Adapter by adapter in PyTorch's own operators, with the kernels' mask; autograd differentiates it."""
    rows = x.flatten(0, -2)
    dropped = rows * mask(rows.shape, p, seed) / (1 - p) if p else rows
    bounds = [0, len(rows)] if offsets is None else offsets.tolist()
    parts = [torch.zeros(bounds[0], w.shape[1], dtype=x.dtype)]
    for i, (begin, end) in enumerate(pairwise(bounds)):
        parts.append(dropped[begin:end] @ (a if offsets is None else a[i]) @ (b if offsets is None else b[i]))
    parts.append(torch.zeros(len(rows) - bounds[-1], w.shape[1], dtype=x.dtype))
    return (rows @ w + bias + scale * torch.cat(parts)).view(*x.shape[:-1], -1)


def gradients(function: Callable[..., torch.Tensor], given: Inputs) -> Sequence[torch.Tensor]:
    """The result and the gradients of all that want one, for a fixed gradient of the result."""
    y = function(**given)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return y, *torch.autograd.grad(y, [given[name] for name in ("x", "a", "b", "bias")], weight)


def compare(given: Inputs) -> None:
    """``lora`` in its dtype against PyTorch in float64, result and gradients."""
    exact = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }
    rtol, atol = TOLERANCE[given["x"].dtype]
    for actual, expected in zip(gradients(lora, given), gradients(with_mask, exact), strict=True):
        assert actual.dtype == given["x"].dtype
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, rtol=4 * rtol, atol=16 * atol)


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapters", [0, 3])
def test_gradients_are_autograd_s(dtype: torch.dtype, p: float, adapters: int) -> None:
    compare(inputs_for(dtype, p=p, adapters=adapters))


def test_tokens_without_an_adapter_go_through_the_base_layer_only() -> None:
    given = {**inputs_for(adapters=2, p=0.5), "offsets": torch.tensor([2, 5, 9])}
    compare(given)
    y = lora(**given)
    base = given["x"] @ given["w"] + given["bias"]
    torch.testing.assert_close(y[:2], base[:2])
    torch.testing.assert_close(y[9:], base[9:])
    assert not torch.allclose(y[2:9], base[2:9])


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    given = inputs_for(p=0.2)
    wide = given["x"].detach().view(3, 4, 21).transpose(0, 1).requires_grad_()
    compare({**given, "x": wide.detach().contiguous().requires_grad_()})
    strided = {**given, "x": wide, "w": given["w"].contiguous(), "a": given["a"].detach().contiguous().requires_grad_()}
    y, grad_x, *_ = gradients(lora, strided)
    again, grad_again, *_ = gradients(lora, {**given, "x": wide.detach().contiguous().requires_grad_()})
    torch.testing.assert_close(y, again)
    torch.testing.assert_close(grad_x, grad_again)


def test_gradients_that_are_expanded_or_not_wanted() -> None:
    given = inputs_for(p=0.2)
    y = lora(**given)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), given["bias"])[0], torch.full((18,), 12.0))
    frozen = {**given, "x": given["x"].detach(), "bias": None, "a": given["a"].detach()}
    (grad_b,) = torch.autograd.grad(lora(**frozen).sum(), frozen["b"])
    torch.testing.assert_close(grad_b, torch.autograd.grad(lora(**given).sum(), given["b"])[0])


def test_without_dropout_it_is_what_peft_says() -> None:
    given = inputs_for()
    expected = gradients(lambda **kw: KERNEL.eager(**kw)[0], given)
    for one, other in zip(gradients(lora, {**given, "seed": torch.tensor([5])}), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(lora(**{**given, "p": 0.3}), expected[0])


def test_the_seed_says_which_elements_are_dropped() -> None:
    given = {**inputs_for(), "p": 0.5}
    assert torch.equal(lora(**{**given, "seed": 3}), lora(**{**given, "seed": torch.tensor([3])}))
    assert not torch.equal(lora(**{**given, "seed": 3}), lora(**{**given, "seed": 4}))
    assert not torch.equal(lora(**{**given, "seed": 3}), lora(**{**given, "seed": 3 + 2**32}))
    torch.manual_seed(1)
    first = lora(**{**given, "seed": None})
    assert not torch.equal(first, lora(**{**given, "seed": None}))
    torch.manual_seed(1)
    assert torch.equal(first, lora(**{**given, "seed": None}))


def test_only_the_result_is_differentiable() -> None:
    """The low-rank tensor is there for the backward; a gradient through it would miss ``x`` and ``a``."""
    y, low_rank = KERNEL(*inputs_for().values())
    assert y.requires_grad
    assert not low_rank.requires_grad


def test_gradients_pass_through_torch_compile() -> None:
    given = inputs_for(p=0.3, adapters=2)
    compiled = torch.compile(lambda **kw: lora(**kw), backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(compiled, given), gradients(lora, given), strict=True):
        torch.testing.assert_close(one, other)


def test_a_base_weight_that_is_trained_as_well_has_its_gradient() -> None:
    given = inputs_for(p=0.3)
    given["w"] = given["w"].detach().requires_grad_()
    ours, theirs = (torch.autograd.grad(function(**given).square().sum(), given["w"]) for function in (lora, with_mask))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_cannot_compute() -> None:
    given = inputs_for(adapters=2)
    for changes, message in (
        ({"p": 1.5}, "a dropout probability from 0 to 1; got 1.5"),
        ({"p": float("nan")}, "a dropout probability from 0 to 1; got nan"),
        ({"seed": torch.tensor(3)}, r"needs seed \[1\]"),
        ({"offsets": None}, r"needs a \[21, any\].*got \[2, 21, 4\]"),
        ({"offsets": torch.tensor([0])}, r"needs offsets of at least one adapter"),
        ({"offsets": torch.tensor([0, 1])}, r"needs a \[1, 21, any\]"),
        ({"b": given["b"].double()}, r"needs b \[2, any, 18\] of float32"),
        ({"bias": torch.zeros(4)}, r"needs bias \[18\]"),
    ):
        with pytest.raises(ExecutionError, match=message):
            lora(**{**given, **changes})
    with pytest.raises(ExecutionError, match=r"needs a seed to drop out with p = 0.5"):
        KERNEL.operator(*{**given, "seed": None, "p": 0.5}.values())


def test_cost_is_that_of_two_launches() -> None:
    cost = KERNEL.cost("bfloat16", tokens=5, depth=3, columns=7, rank=2, bias=True, p=0.1)
    assert cost.flops == 5 * 2 * (2 * 3 + 1) + 5 * 7 * (2 * 3 + 2 * 2 + 1 + 1)
    assert cost.traffic_bytes == 2 * ((5 * 3 + 3 * 2 + 5 * 2) + (5 * 3 + 3 * 7 + 5 * 2 + 2 * 7 + 7 + 5 * 7))
    four = KERNEL.cost("bfloat16", tokens=5, depth=3, columns=7, rank=2, bias=True, p=0.1, adapters=4)
    assert four.flops == cost.flops
    assert four.traffic_bytes == cost.traffic_bytes + 2 * 3 * (3 * 2 + 2 * 7)
