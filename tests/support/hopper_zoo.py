"""Small functions whose programs for an H100 have every kind of kernel and call that Inductor makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 # the name everybody knows it by

__all__ = ["ZOO", "Case"]

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A function of tensors, shapes and dtype, and the difference from eager to allow, whose kernels round earlier."""

    function: Callable[..., Tensors]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    trains: bool = False

    def inputs(self) -> Tensors:
        """Random numbers, the same in each call, that keep activations near one."""
        generator = torch.Generator().manual_seed(0)
        scales = [
            shape[0] ** -0.5 if len(shape) == 2 and position else 1.0 for position, shape in enumerate(self.shapes)
        ]
        return tuple(
            (torch.randn(shape, generator=generator) * scale).to(self.dtype)
            for shape, scale in zip(self.shapes, scales, strict=True)
        )


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """Llama's feed-forward block."""
    return (x + (F.silu(x @ gate) * (x @ up)) @ down,)


def perceptron(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor) -> Tensors:
    """Two layers and a loss."""
    return ((F.gelu(x @ w1 + b1) @ w2).square().mean(),)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> Tensors:
    """The seam between two blocks of Llama: the sum goes on, normalised and as it is."""
    hidden = x + residual
    wide = hidden.float()
    return hidden, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) @ w


def convolution(x: torch.Tensor, w: torch.Tensor, statistics: torch.Tensor) -> Tensors:
    """Convolution, normalisation, activation, residual."""
    mean, variance, scale, shift = statistics.unbind(0)
    y = F.batch_norm(F.conv2d(x, w, padding=1), mean, variance.abs() + 0.5, scale, shift, False)
    return (F.max_pool2d(F.relu(y) + x, 2),)


def experts(x: torch.Tensor, router: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Tensors:
    """Uneven experts, each on every row, weighed by the two likeliest: branches whose order is free."""
    weights = torch.softmax(x @ router, -1)
    top, index = weights.topk(2, -1)
    share = torch.zeros_like(weights).scatter(-1, index, top)
    widths = (8, 16, 32, 40)
    total, begin = torch.zeros_like(x), 0
    for number, width in enumerate(widths):
        hidden = F.gelu(x @ first[:, begin : begin + width])
        total = total + share[:, number : number + 1] * (hidden @ second[begin : begin + width])
        begin += width
    return total, share.argmax(-1)


def branches(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> Tensors:
    """Three branches that meet in a normalisation."""
    joined = F.gelu(x @ a) + torch.tanh(x @ b) * F.silu(x @ c)
    hidden = F.layer_norm(joined, joined.shape[-1:])
    return (torch.softmax(hidden @ d, -1) + x.mean(-1, keepdim=True),)


def convolution_loss(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> Tensors:
    """A strided convolution whose backward pass returns two gradients at once, and batch statistics."""
    y = F.conv2d(x, w, stride=2, padding=1)
    y = (y - y.mean((0, 2, 3), keepdim=True)) * torch.rsqrt(y.var((0, 2, 3), keepdim=True) + 1e-5)
    return (F.relu(y * scale[:, None, None]).square().mean(),)


def attention(x: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> Tensors:
    """Causal attention of four heads, written out, and a loss."""
    rows, width = x.shape
    heads = (x @ qkv).view(rows, 3, 4, width // 4).permute(1, 2, 0, 3)
    q, k, v = heads.unbind(0)
    scores = (q @ k.transpose(-1, -2)).float() * (width // 4) ** -0.5
    mask = torch.ones(rows, rows, device=x.device, dtype=torch.bool).tril()
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).to(x.dtype)
    return (((weights @ v).transpose(0, 1).reshape(rows, width) @ out).float().square().mean(),)


def classifier(table: torch.Tensor, x: torch.Tensor, head: torch.Tensor) -> Tensors:
    """Looked-up rows, whose gradients add up where indices repeat, and cross entropy."""
    index, label = ((x[:, column].abs() * 7).long() for column in (0, 1))
    hidden = table.index_select(0, index % table.shape[0]) + x
    return (F.cross_entropy(hidden @ head, label % head.shape[1]),)


def order_of_things(x: torch.Tensor, y: torch.Tensor) -> Tensors:
    """Concatenation, running sums, sorting, what is largest where."""
    both = torch.cat([x, y], 1)
    values, places = both.sort(-1)
    return both.cumsum(1), values[:, ::2] * 2, places, both.argmax(0), (both > 0).any(1)


def branches_loss(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> Tensors:
    """As `branches`, with a loss."""
    return (branches(x, a, b, c, d)[0].square().sum(),)


def reductions(x: torch.Tensor) -> Tensors:
    """Few results of many numbers: partial sums first."""
    return x.sum(), x.var(0), x.amax()


def softmax(x: torch.Tensor) -> Tensors:
    """Rows too long for one block."""
    return torch.softmax(x, -1), torch.logsumexp(x, -1)


def embedding(table: torch.Tensor, x: torch.Tensor) -> Tensors:
    """Rows looked up by computed indices, and added up where indices repeat."""
    index = (x[:, 0].abs() * 7).long() % table.shape[0]
    return table[index] * 2, torch.zeros_like(table).index_add(0, index, x)


ZOO: Mapping[str, Case] = MappingProxyType(
    {
        "swiglu": Case(swiglu, ((16, 32), (32, 64), (32, 64), (64, 32)), torch.bfloat16, 2e-2),
        "perceptron": Case(perceptron, ((16, 24), (24, 48), (48,), (48, 8)), trains=True),
        "add_rms_norm": Case(add_rms_norm, ((8, 96), (8, 96), (96, 32)), torch.bfloat16, 4e-2),
        "convolution": Case(convolution, ((2, 8, 12, 12), (8, 8, 3, 3), (4, 8))),
        "experts": Case(experts, ((24, 16), (16, 4), (16, 96), (96, 16))),
        "branches": Case(branches, ((16, 24), (24, 32), (24, 32), (24, 32), (32, 16))),
        "branches_loss": Case(branches_loss, ((16, 24), (24, 32), (24, 32), (24, 32), (32, 16)), trains=True),
        "convolution_loss": Case(convolution_loss, ((2, 4, 8, 8), (8, 4, 3, 3), (8,)), trains=True),
        "attention": Case(attention, ((8, 32), (32, 96), (32, 32)), torch.bfloat16, 2e-2, trains=True),
        "classifier": Case(classifier, ((10, 16), (64, 16), (16, 6)), trains=True),
        "order_of_things": Case(order_of_things, ((4, 7), (4, 9))),
        "reductions": Case(reductions, ((4096, 16),), tolerance=1e-3),
        "softmax": Case(softmax, ((3, 5000),)),
        "embedding": Case(embedding, ((10, 16), (64, 16))),
    }
)
