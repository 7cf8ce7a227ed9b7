"""What ``kernels/linear_cross_entropy.py`` and its backward do besides numerics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

import torch
from torch.nn import functional

from opweave.errors import ExecutionError
from opweave.kernels import linear_cross_entropy
from opweave.kernels.linear_cross_entropy import KERNEL, SLICE
from opweave.kernels.linear_cross_entropy_backward import KERNEL as BACKWARD
from tests.kernels.matching import check_fusion, check_matches, exported

TOKENS, DEPTH, VOCABULARY = 12, 16, 40


def operands(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 6)) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, DEPTH, generator=random).to(dtype)
    weight = torch.randn(VOCABULARY, DEPTH, generator=random).to(dtype)
    target = torch.randint(0, VOCABULARY, shape, generator=random)
    target.view(-1)[::5] = -100
    return [x, weight, target]


FACTORS = ((-100, 0.0, 0.0, 0.0), (-100, 0.1, 0.0, 0.0), (7, 0.2, 0.01, 3.0))


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_reference_is_what_eager_says(factors: tuple[Any, ...]) -> None:
    x, weight, target = operands()
    target[target == -100] = factors[0]
    torch.testing.assert_close(
        KERNEL.reference(x, weight, target, *factors)[0], KERNEL.eager(x, weight, target, *factors)
    )


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_reference_of_gradients_is_what_eager_says(factors: tuple[Any, ...]) -> None:
    x, weight, target = operands()
    target[target == -100] = factors[0]
    given = (
        x,
        weight,
        target,
        *KERNEL.reference(x, weight, target, *factors)[2:],
        torch.linspace(-2, 2, 12).view(2, 6),
    )
    for actual, expected in zip(BACKWARD.reference(*given, *factors), BACKWARD.eager(*given, *factors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_gradients_are_those_of_eager(factors: tuple[Any, ...]) -> None:
    """By autograd, through the mean and through a weighted sum of each token's loss."""
    x, weight, target = operands()
    target[target == -100] = factors[0]
    weights = torch.linspace(-1, 3, 12).view(2, 6)
    grads = []
    for function in (KERNEL.operator, KERNEL.reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        loss, losses, log_sum_exp = function(*leaves, target, *factors)
        assert function is not KERNEL.operator or not log_sum_exp.requires_grad
        torch.autograd.backward(3 * loss + (losses * weights).sum())
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1])
    ignored = (target == factors[0]).nonzero(as_tuple=True)
    assert ignored[0].numel()
    assert grads[0][0] is not None
    assert not grads[0][0][ignored].any()


def test_gradients_of_a_mean_are_pytorch_s() -> None:
    x, weight, target = operands()
    grads = []
    functions: tuple[Callable[..., Any], ...] = (lambda *given: KERNEL(*given)[0], KERNEL.eager)
    for function in functions:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        torch.autograd.backward(function(*leaves, target))
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight, target = operands()
    x.requires_grad_()
    with mock.patch.object(linear_cross_entropy, "BACKWARD", side_effect=BACKWARD) as backward:
        KERNEL(x, weight, target)[0].backward()
    assert BACKWARD(*backward.call_args.args)[1].shape == (0, DEPTH)
    expected = x.grad
    x.grad = None
    KERNEL.eager(x, weight, target).backward()
    torch.testing.assert_close(expected, x.grad)


def test_operators_obey_the_rules_of_autograd() -> None:
    x, weight, target = operands()
    torch.library.opcheck(KERNEL.operator, (x.requires_grad_(), weight.requires_grad_(), target))


def test_all_ignored_is_nan_with_gradients_of_zero() -> None:
    x, weight, target = operands()
    x.requires_grad_()
    loss, losses, _ = KERNEL(x, weight, torch.full_like(target, -100))
    loss.backward()
    assert loss.isnan()
    assert not losses.any()
    assert x.grad is not None
    assert not x.grad.any()


def test_cost_is_what_was_counted_by_hand() -> None:
    assert KERNEL.cost("float32", 1, 1, 1).flops == 2 + 4
    assert KERNEL.cost("bfloat16", 3, 5, 7, 0.1, 0.0, 30.0).flops == 21 * (10 + 4 + 1 + 3)
    assert KERNEL.cost("bfloat16", 3, 5, 7).traffic_bytes == 2 * (15 + 35) + 3 * 8 + 3 * 8 + 4
    assert BACKWARD.cost("float32", 1, 1, 1).flops == 6 + 5
    assert BACKWARD.cost("bfloat16", 3, 5, 7).traffic_bytes == 2 * 2 * (15 + 35) + 3 * (8 + 4 + 4)
    frozen = BACKWARD.cost("bfloat16", 3, 5, 7, needs_dweight=False)
    assert frozen.flops == 21 * (4 * 5 + 5)
    assert frozen.traffic_bytes == 2 * (2 * 15 + 35) + 3 * (8 + 4 + 4)


def test_scratch_is_a_small_part_of_the_logits() -> None:
    tokens, depth, vocabulary = 8192, 4096, 128256
    inputs = KERNEL.arguments(torch.bfloat16, "meta", tokens=tokens, depth=depth, vocabulary=vocabulary)
    made = dict(zip(KERNEL.written, KERNEL.allocate(*inputs.values()), strict=True))
    assert made["partials"].shape == (2, 126, tokens)
    assert sum(made[name].nbytes for name in KERNEL.scratch) < tokens * vocabulary * 2 / 128
    assert -(-vocabulary // SLICE) == 126
    inputs = BACKWARD.arguments(torch.bfloat16, "meta", tokens=tokens, depth=depth, vocabulary=vocabulary)
    made = dict(zip(BACKWARD.written, BACKWARD.allocate(*inputs.values()), strict=True))
    assert made["logit_gradients"].shape == (tokens, 8192)
    assert made["logit_gradients"].nbytes == 2**27
    assert made["dx_sum"].shape == (tokens, depth)


@pytest.mark.parametrize(
    ("dtype", "scratch_bytes", "width", "summed"),
    [
        (torch.float32, 2**27, 512, 0),
        (torch.bfloat16, 2**27, 512, 0),
        (torch.float32, 0, 256, 0),
        (torch.bfloat16, 0, 256, 12),
        (torch.bfloat16, 2 * 2 * 256 * 12 - 1, 256, 12),
        (torch.bfloat16, 2 * 2 * 256 * 12, 512, 0),
    ],
)
def test_chunks_fit_into_scratch(dtype: torch.dtype, scratch_bytes: int, width: int, summed: int) -> None:
    inputs = BACKWARD.arguments(dtype, "meta", tokens=12, depth=8, vocabulary=300, scratch_bytes=scratch_bytes)
    made = dict(zip(BACKWARD.written, BACKWARD.allocate(*inputs.values()), strict=True))
    assert made["logit_gradients"].shape == (12, width)
    assert made["dx_sum"].shape == (summed, 8)


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        "weight of another depth": ({"weight": torch.zeros(5, 4)}, r"needs weight \[any, 8\] of float32 on cpu"),
        "weight of another dtype": ({"weight": torch.zeros(5, 8).half()}, r"needs weight .*; got .* of float16"),
        "float64": ({"x": torch.zeros(2, 8).double()}, r"of float32, float16, bfloat16 on cpu; got .*float64"),
        "columns first": ({"x": torch.zeros(8, 2).t()}, r"needs x row-major"),
        "target of another shape": ({"target": torch.zeros(3, dtype=torch.int64)}, r"needs target \[2\] of int64"),
        "target of another dtype": ({"target": torch.zeros(2, dtype=torch.int32)}, r"needs target \[2\] of int64"),
        "too smooth": ({"label_smoothing": 1.5}, r"needs label_smoothing from 0 to 1.*; got 1.5, 0.0 and 0.0"),
        "negative cap": ({"soft_cap": -1.0}, r"soft_cap of at least 0; got 0.0, 0.0 and -1.0"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kernel", [KERNEL, BACKWARD], ids=["forward", "backward"])
def test_refuses_what_it_cannot_compute(kernel: Any, case: str) -> None:
    inputs = kernel.arguments(torch.float32, tokens=2, depth=8, vocabulary=5)
    made = dict(zip(kernel.written, kernel.allocate(*inputs.values()), strict=True))
    changed, message = REFUSED[case]
    with pytest.raises(ExecutionError, match=message):
        kernel.launch(**inputs | changed, **made)


def test_refuses_outputs_that_share_memory() -> None:
    inputs = KERNEL.arguments(torch.float32, tokens=2, depth=8, vocabulary=5)
    made = dict(zip(KERNEL.written, KERNEL.allocate(*inputs.values()), strict=True))
    with pytest.raises(ExecutionError, match=r"needs losses in memory of its own; it overlaps log_sum_exp"):
        KERNEL.launch(**inputs, **made | {"losses": made["log_sum_exp"]})
    inputs = BACKWARD.arguments(torch.float32, tokens=2, depth=8, vocabulary=5)
    made = dict(zip(BACKWARD.written, BACKWARD.allocate(*inputs.values()), strict=True))
    with pytest.raises(ExecutionError, match=r"needs dx in memory of its own; it overlaps x"):
        BACKWARD.launch(**inputs, **made | {"dx": inputs["x"]})
    with pytest.raises(ExecutionError, match=r"needs log_sum_exp \[2\] of float32"):
        BACKWARD.launch(**inputs | {"log_sum_exp": inputs["x"]}, **made)


def flat(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(x, weight).float()
    return functional.cross_entropy(logits.view(-1, VOCABULARY), target.view(-1))


def matmul(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = (x @ weight.t()).float().flatten(0, 1)
    return functional.cross_entropy(logits, target.clamp(min=3).flatten(), ignore_index=3)


def gemma(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(x, weight)
    logits = torch.tanh(logits / 30.0) * 30.0
    return functional.cross_entropy(logits.float().view(-1, VOCABULARY), target.view(-1))


def each(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(x, weight).float()
    return functional.cross_entropy(logits.view(-1, VOCABULARY), target.view(-1), reduction="none").view(target.shape)


def two_steps(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(x, weight).float()
    return functional.nll_loss(torch.log_softmax(logits, -1).flatten(0, 1), target.flatten())


MATCHED = (KERNEL.eager, flat, matmul, gemma, each, two_steps)


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("function", MATCHED)
def test_matches_what_models_say(function: Callable[..., Any], decomposed: bool, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    graph = check_fusion(KERNEL, function, operands(dtype), rtol=tolerance, atol=tolerance, decomposed=decomposed)
    assert not [op.target for op in graph.ops if re.search("mm|linear[.]|soft|exp", op.target)]


def test_matches_label_smoothing() -> None:
    def smooth(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(x, weight), target, label_smoothing=0.1)

    check_fusion(KERNEL, smooth, operands(shape=(12,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_ignored_class_of_zero_is_not_left_out(decomposed: bool) -> None:
    def padded(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(x, weight), target, ignore_index=0)

    x, weight, _ = operands(shape=(12,))
    graph = exported(padded, [x, weight, torch.arange(12) % 3], decomposed=decomposed).graph
    assert {match.arguments["ignore_index"] for match in check_matches(KERNEL, graph)} == {0}


def test_matches_a_module() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(DEPTH, VOCABULARY, bias=False)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
            return torch.nn.CrossEntropyLoss()(self.head(x).flatten(0, 1), target.flatten())

    x, _, target = operands()
    with torch.no_grad():
        check_fusion(KERNEL, Head(), [x, target], rtol=1e-5, atol=1e-5)
        check_fusion(KERNEL, Head(), [x, target], rtol=1e-5, atol=1e-5, decomposed=True)


def over_classes(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, target, weight=torch.linspace(0, 1, VOCABULARY))


def over_tokens(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.t(), target.repeat(4)[:VOCABULARY].clamp(0, TOKENS - 1))


def over_positions(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.view(2, 6, -1).transpose(1, 2), target.view(2, 6))


def over_others(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, target, reduction="none").sum() / (target != 5).sum()


#: Losses of logits and targets that the kernel does not compute.
OTHER: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "in bfloat16": lambda logits, target: functional.cross_entropy(logits.bfloat16(), target),
        "weighted classes": over_classes,
        "softmax over tokens": lambda logits, target: functional.nll_loss(torch.log_softmax(logits, 0), target),
        "over tokens": over_tokens,
        "over positions behind": over_positions,
        "probabilities": lambda logits, target: functional.cross_entropy(logits, torch.softmax(logits, -1)),
        "changed logits": lambda logits, target: functional.cross_entropy(logits + 1.0, target),
        "two caps": lambda logits, target: functional.cross_entropy(torch.tanh(logits / 30.0) * 20.0, target),
    }
)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", OTHER)
def test_does_not_match_other_losses(name: str, decomposed: bool) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return OTHER[name](functional.linear(x, weight).float().flatten(0, 1), target.flatten())

    assert check_matches(KERNEL, exported(function, operands(), decomposed=decomposed).graph) == ()


@pytest.mark.parametrize("decomposed", [False, True])
def test_does_not_match_classes_along_another_dimension_than_softmax(decomposed: bool) -> None:
    """As many tokens as classes, so that shapes do not tell."""

    def function(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.nll_loss(torch.log_softmax(functional.linear(x, weight), -1), target)

    graph = exported(function, operands(shape=(2, VOCABULARY)), decomposed=decomposed).graph
    assert check_matches(KERNEL, graph) == ()


@pytest.mark.parametrize("decomposed", [False, True])
def test_does_not_match_a_bias(decomposed: bool) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(x, weight, torch.ones(VOCABULARY)).flatten(0, 1)
        return functional.cross_entropy(logits, target.flatten())

    assert check_matches(KERNEL, exported(function, operands(), decomposed=decomposed).graph) == ()


def test_matches_losses_that_are_summed_otherwise() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return over_others(functional.linear(x, weight).flatten(0, 1), target.flatten())

    for decomposed in (False, True):
        graph = check_fusion(KERNEL, function, operands(), rtol=1e-5, atol=1e-5, decomposed=decomposed)
        assert any(op.target.startswith("aten.sum") for op in graph.ops)


def test_logits_that_are_returned_stay() -> None:
    def both(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = functional.linear(x, weight)
        return functional.cross_entropy(logits.flatten(0, 1), target.flatten()), logits

    graph = check_fusion(KERNEL, both, operands(), rtol=1e-5, atol=1e-5)
    assert any(op.target == "aten.linear.default" for op in graph.ops)
