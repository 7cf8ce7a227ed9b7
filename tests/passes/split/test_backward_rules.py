"""Backward operators in parts: slices of gradients of activations, summands of gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from opweave.passes.split.rule import Call, Divided, Outcome, Rule
from opweave.passes.split.rules import backward, losses
from opweave.passes.split.split import Split, split
from opweave.passes.split.state import WHOLE
from tests.passes.split.kernels import REPLACED, graph_of
from tests.passes.split.traced import difference

aten = torch.ops.aten

SIZES = (1, 4, 2)
TOKENS = sum(SIZES)
EXACT = 1e-10
NONE, MEAN, SUM = 0, 1, 2


def numbers(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole(below: int, *shape: int, least: int = 0) -> Tensor:
    """Whole numbers from ``least`` to below ``below``."""
    return torch.randint(least, below, shape, generator=torch.Generator().manual_seed(below))


@dataclass(frozen=True)
class Case:
    """A function, its inputs, the dimension of tokens of each, and what is said of a join, if there is one."""

    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    axes: tuple[int | None, ...]
    joined: str = ""


def layer_norm(g: Tensor, x: Tensor, mean: Tensor, spread: Tensor, w: Tensor, b: Tensor) -> Any:
    return aten.native_layer_norm_backward(g, x, [6], mean, spread, w, b, [True, True, True])


def tokens_norm(g: Tensor, x: Tensor, mean: Tensor, spread: Tensor) -> Any:
    return aten.native_layer_norm_backward(g, x, [TOKENS, 6], mean, spread, None, None, [True, False, False])[:1]


def convolution(g: Tensor, x: Tensor, w: Tensor) -> Any:
    return aten.convolution_backward(g, x, w, [4], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])


def scores(reduction: int, weighted: bool = False) -> Callable[..., Any]:
    """The loss of rows of logarithms, some of whose targets are ignored."""

    def run(x: Tensor, targets: Tensor, *weight: Tensor) -> Any:
        return aten.nll_loss_forward(x, targets, weight[0] if weighted else None, reduction, -1)[:1]

    return run


def scores_back(reduction: int) -> Callable[..., Any]:
    """Its gradient."""

    def run(g: Tensor, x: Tensor, targets: Tensor) -> Any:
        total = aten.nll_loss_forward(x, targets, None, reduction, -1)[1]
        return (aten.nll_loss_backward(g, x, targets, None, reduction, -1, total),)

    return run


X, G, W = numbers(2, TOKENS, 6), numbers(2, TOKENS, 6) * 2, numbers(6)
IMAGES, PLANES = numbers(TOKENS, 3, 4, 4), numbers(TOKENS, 4, 4, 4)
LOGITS, TARGETS = numbers(TOKENS, 5), whole(5, TOKENS, least=-1)
ROW = numbers(2, TOKENS, 1)
BATCHED = (*(each.transpose(0, 1).contiguous() for each in (G, X, ROW, ROW)), W, W)
CASES = {
    "layer norm": Case(layer_norm, (G, X, ROW, ROW.abs(), W, W), (1, 1, 1, 1, None, None)),
    "layer norm by batch": Case(layer_norm, BATCHED, (0, 0, 0, 0, None, None)),
    "norm over tokens": Case(
        tokens_norm, (G, X, ROW[:, :1], ROW[:, :1].abs()), (1, 1, None, None), "a norm over the tokens"
    ),
    "rms norm": Case(
        lambda g, x, r, w: aten._fused_rms_norm_backward(g, x, [6], r, w, [True, True]),
        (G, X, ROW.abs(), W),
        (1, 1, 1, None),
    ),
    "group norm": Case(
        lambda x, w: aten.native_group_norm(x, w, None, TOKENS, 4, 16, 2, 1e-5), (PLANES, numbers(4)), (0, None)
    ),
    "group norm back": Case(
        lambda g, x, m, r, w: aten.native_group_norm_backward(g, x, m, r, w, TOKENS, 4, 16, 2, [True] * 3),
        (PLANES, PLANES * 2, numbers(TOKENS, 2), numbers(TOKENS, 2).abs(), numbers(4)),
        (0, 0, 0, 0, None),
    ),
    "softmax": Case(lambda g, y: (aten._softmax_backward_data(g, y, -1, torch.float64),), (G, X.softmax(-1)), (1, 1)),
    "softmax of tokens": Case(
        lambda g, y: (aten._softmax_backward_data(g, y, 1, torch.float64),), (G, X.softmax(1)), (1, 1), "softmax over"
    ),
    "log softmax": Case(lambda g, y: (aten._log_softmax_backward_data(g, y, 2, torch.float64),), (G, X), (1, 1)),
    "embedding": Case(
        lambda g, i: (aten.embedding_dense_backward(g, i, 9, 2, False),), (G, whole(9, 2, TOKENS)), (1, 1)
    ),
    "embedding by frequency": Case(
        lambda g, i: (aten.embedding_dense_backward(g, i, 9, 2, True),), (G, whole(9, 2, TOKENS)), (1, 1), "how often"
    ),
    "silu": Case(lambda g, x: (aten.silu_backward(g, x),), (G, X), (1, 1)),
    "gelu": Case(lambda g, x: (aten.gelu_backward(g, x),), (G, X), (1, 1)),
    "relu": Case(lambda g, x: (aten.threshold_backward(g, x, 0),), (G, X), (1, 1)),
    "dropout": Case(lambda g, m: (aten.native_dropout_backward(g, m, 2.0),), (G, X > 0), (1, 1)),
    "elu": Case(lambda g, x: (aten.elu_backward(g, 1.0, 1, 1, False, x),), (G, X), (1, 1)),
    "leaky relu": Case(lambda g, x: (aten.leaky_relu_backward(g, x, 0.1, False),), (G, X), (1, 1)),
    "hard tanh": Case(lambda g, x: (aten.hardtanh_backward(g, x, -1.0, 1.0),), (G, X), (1, 1)),
    "softplus": Case(lambda g, x: (aten.softplus_backward(g, x, 1.0, 20.0),), (G, X), (1, 1)),
    "one row of many": Case(lambda g: (aten.select_backward(g, [2, TOKENS, 3, 6], 2, 1),), (G,), (1,)),
    "one row in front": Case(lambda g: (aten.select_backward(g, [3, 2, TOKENS, 6], 0, 1),), (G,), (1,)),
    "some columns": Case(lambda g: (aten.slice_backward(g, [2, TOKENS, 9], 2, 1, 7, 1),), (G,), (1,)),
    "some tokens": Case(
        lambda g: (aten.slice_backward(g, [2, TOKENS + 1, 6], 1, 0, TOKENS, 1),), (G,), (1,), "some of the tokens"
    ),
    "one row written": Case(lambda x, v: (aten.select_scatter(x, v, 0, 1),), (X, numbers(TOKENS, 6)), (1, 0)),
    "columns written": Case(lambda x, v: (aten.slice_scatter(x, v, 2, 1, 4),), (X, numbers(2, TOKENS, 3)), (1, 1)),
    "a token written": Case(
        lambda x, v: (aten.select_scatter(x, v, 1, 1),), (X, numbers(2, 6)), (1, None), "some of the tokens"
    ),
    "convolution": Case(
        lambda x, w: (aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),),
        (IMAGES, numbers(4, 3, 3, 3)),
        (0, None),
    ),
    "convolution back": Case(convolution, (PLANES, IMAGES, numbers(4, 3, 3, 3)), (0, 0, None)),
    "convolution along an image": Case(
        lambda x, w: (aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),),
        (numbers(2, 3, TOKENS, 4), numbers(4, 3, 3, 3)),
        (2, None),
        "neighbours",
    ),
    "pooling": Case(lambda x: aten.max_pool2d_with_indices(x, [2, 2]), (IMAGES,), (0,)),
    "pooling back": Case(
        lambda x: (aten.avg_pool2d_backward(aten.avg_pool2d(x, [2, 2]), x, [2, 2], [2, 2], 0, False, True, None),),
        (IMAGES,),
        (0,),
    ),
    "adaptive pooling": Case(lambda x: (aten._adaptive_avg_pool2d(x, [2, 1]),), (IMAGES,), (0,)),
    "adaptive pooling back": Case(
        lambda x: (aten._adaptive_avg_pool2d_backward(aten._adaptive_avg_pool2d(x, [2, 1]), x),), (IMAGES,), (0,)
    ),
    "pooling along an image": Case(
        lambda x: aten.max_pool2d_with_indices(x, [2, 2]), (numbers(2, 3, 2 * TOKENS, 4),), (2,), "neighbours"
    ),
    "scores": Case(scores(MEAN), (LOGITS, TARGETS), (0, 0)),
    "scores added": Case(scores(SUM), (LOGITS, TARGETS), (0, 0)),
    "scores of each": Case(scores(NONE), (LOGITS, TARGETS), (0, 0)),
    "scores by class": Case(
        scores(MEAN, True), (LOGITS, TARGETS, numbers(5).abs()), (0, 0, None), "weighted by classes"
    ),
    "scores added by class": Case(scores(SUM, True), (LOGITS, TARGETS, numbers(5).abs()), (0, 0, None)),
    "scores back": Case(scores_back(MEAN), (numbers(), LOGITS, TARGETS), (None, 0, 0), "a mean over the tokens"),
    "scores of each back": Case(scores_back(NONE), (numbers(TOKENS), LOGITS, TARGETS), (0, 0, 0)),
    "squares": Case(lambda x, y: (aten.mse_loss(x, y),), (X, G), (1, 1)),
    "squares added": Case(lambda x, y: (aten.mse_loss(x, y, SUM),), (X, G), (1, 1)),
    "squares of each": Case(lambda x, y: (aten.mse_loss(x, y, NONE),), (X, G), (1, 1)),
    "squares back": Case(lambda g, x, y: (aten.mse_loss_backward(g, x, y, MEAN),), (numbers(), X, G), (None, 1, 1)),
    "squares of each back": Case(lambda g, x, y: (aten.mse_loss_backward(g, x, y, NONE),), (G, X, G), (1, 1, 1)),
}


def divided(case: Case, rules: dict[str, Rule] | None = None) -> tuple[fx.GraphModule, Split]:
    """The graph of a case, and its split."""
    graph = graph_of(case.run, *case.inputs)
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    axes = {name: dim for name, dim in zip(names, case.axes, strict=True) if dim is not None}
    return graph, split(graph, axes, SIZES, rules=rules)


@pytest.mark.parametrize("name", list(CASES))
def test_each_operator_in_parts(name: str) -> None:
    """The same numbers; joined where it must be, for the reason given, and nowhere else."""
    graph, made = divided(CASES[name])
    assert difference(graph, made.module, [CASES[name].inputs], REPLACED) < EXACT
    reasons = {entry.reason for entry in made.joined}
    assert all(CASES[name].joined in reason for reason in reasons)
    assert bool(reasons) == bool(CASES[name].joined)


def test_a_mean_of_parts_means_is_caught() -> None:
    """The control of the losses: a part's mean is divided by its own number of targets."""

    def naive(call: Call) -> Outcome:
        outcome = losses.RULES["aten::nll_loss_forward"].divide(call)
        assert isinstance(outcome, Divided)
        return replace(outcome, emit=None)

    case = CASES["scores"]
    graph, made = divided(case, {"aten::nll_loss_forward": Rule(naive)})
    assert difference(graph, made.module, [case.inputs]) > 1e-3


def test_a_summand_taken_for_the_sum_is_caught() -> None:
    """The control of gradients of parameters: those of part 0 alone."""

    def naive(call: Call) -> Outcome:
        outcome = backward.RULES["aten::native_layer_norm_backward"].divide(call)
        assert isinstance(outcome, Divided)
        assert isinstance(outcome.result, tuple)
        return replace(outcome, result=(outcome.result[0], WHOLE, WHOLE))

    case = CASES["layer norm"]
    graph, made = divided(case, {"aten::native_layer_norm_backward": Rule(naive)})
    assert difference(graph, made.module, [case.inputs]) > 1e-3
