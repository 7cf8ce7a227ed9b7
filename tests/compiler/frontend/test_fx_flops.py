"""Multiplications and additions of ATen calls, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch.utils.flop_counter import FlopCounterMode

from opweave.compiler.frontend.flops import count_flops
from opweave.compiler.frontend.fx import from_module
from tests.compiler.frontend.eager_check import Lambda


def total(function: Callable[..., Any], *args: torch.Tensor) -> int:
    return sum(op.flops for op in from_module(Lambda(lambda m, *a: function(*a)), args).graph.ops)


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], int]] = {
    "mm": (torch.mm, (tensor(2, 3), tensor(3, 5)), 2 * 2 * 3 * 5),
    "addmm": (torch.addmm, (tensor(5), tensor(2, 3), tensor(3, 5)), 2 * 2 * 3 * 5),
    "bmm": (torch.bmm, (tensor(7, 2, 3), tensor(7, 3, 5)), 7 * 2 * 2 * 3 * 5),
    "baddbmm": (torch.baddbmm, (tensor(7, 2, 5), tensor(7, 2, 3), tensor(7, 3, 5)), 7 * 2 * 2 * 3 * 5),
    "matmul, broadcast": (torch.matmul, (tensor(4, 1, 2, 3), tensor(7, 3, 5)), 4 * 7 * 2 * 2 * 3 * 5),
    "matmul, vector": (torch.matmul, (tensor(2, 3), tensor(3)), 2 * 2 * 3),
    "linear": (functional.linear, (tensor(4, 2, 3), tensor(5, 3), tensor(5)), 4 * 2 * 2 * 3 * 5),
    "conv2d": (functional.conv2d, (tensor(2, 3, 8, 8), tensor(4, 3, 3, 3)), 2 * 2 * 4 * 6 * 6 * 3 * 9),
    "conv1d": (functional.conv1d, (tensor(2, 3, 8), tensor(4, 3, 3)), 2 * 2 * 4 * 6 * 3 * 3),
    "depthwise": (
        lambda x, w: functional.conv2d(x, w, groups=4),
        (tensor(1, 4, 8, 8), tensor(4, 1, 3, 3)),
        2 * 4 * 36 * 9,
    ),
    "transposed convolution": (
        lambda x, w: functional.conv_transpose2d(x, w, groups=2, stride=2),
        (tensor(1, 4, 3, 3), tensor(4, 5, 2, 2)),
        2 * 4 * 9 * 5 * 4,
    ),
    "attention": (
        functional.scaled_dot_product_attention,
        (tensor(2, 3, 5, 8), tensor(2, 3, 7, 8), tensor(2, 3, 7, 4)),
        2 * 2 * 3 * 5 * 7 * (8 + 4),
    ),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (tensor(7, 2, 3), tensor(7, 3, 5)), 7 * 2 * 2 * 3 * 5),
    "einsum, ellipsis": (
        lambda a, b: torch.einsum("...ij,...jk->...ik", a, b),
        (tensor(4, 1, 2, 3), tensor(7, 3, 5)),
        4 * 7 * 2 * 2 * 3 * 5,
    ),
    "elementwise": (torch.add, (tensor(2, 3), tensor(3)), 6),
    "reduction": (lambda x: x.sum(0), (tensor(2, 3),), 6),
    "maximum with indices": (lambda x: x.max(0)[0], (tensor(4, 3),), 12),
    "pooling": (lambda x: functional.max_pool2d(x, 2), (tensor(1, 1, 4, 4),), 16),
    "view": (lambda x: x.t(), (tensor(2, 3),), 0),
}


@pytest.mark.parametrize(("function", "args", "expected"), CASES.values(), ids=CASES.keys())
def test_counts(function: Callable[..., Any], args: tuple[torch.Tensor, ...], expected: int) -> None:
    assert total(function, *args) == expected


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_as_onnx_spells_it(transposed: bool) -> None:
    x, w = tensor(1, 4, 6, 6), tensor(4, 4, 3, 3)
    target = torch.ops.aten.convolution.default
    args = (x, w, None, [1, 1], [0, 0], [1, 1], transposed, [0, 0], 1)
    pixels = 36 if transposed else 16
    assert count_flops(target, args, {}, [target(*args)]) == 2 * 4 * 4 * 9 * pixels


def test_products_agree_with_torchs_own_counter() -> None:
    """An independent count of a small network, by decomposition instead of by our table."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, groups=1),
        torch.nn.Conv2d(8, 8, 3, groups=4),
        torch.nn.ConvTranspose2d(8, 4, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 5 * 5, 6),
    )
    x = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    ops = from_module(model, (x,)).graph.ops
    assert sum(op.flops for op in ops) == counter.get_total_flops()
