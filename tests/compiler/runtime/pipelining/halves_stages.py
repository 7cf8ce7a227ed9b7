"""Modules that pipeline stages are made of, and a comparison of a split stage with eager autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from opweave.compiler.runtime.pipelining.halves import SplitStage

Args = tuple[Any, ...]


class Block(nn.Module):
    """A transformer block with attention that keeps no matrix of scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> Any:
        """``x`` and the result are (batch, tokens, width)."""
        batch, tokens, width = x.shape
        packed = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Several(nn.Module):
    """Several inputs and outputs, nested, some of them integers, views of each other, detached, or inputs again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor, k: int) -> Any:
        z, w = self.a(x) * k, self.b(y)
        w = w + z
        return {"z": z.view(-1), "t": (w, i + 1, w[0], i, None, y, z.argmax(-1)), "d": z.detach(), "k": k}


class Convolutions(nn.Module):
    """Their backward makes gradients of inputs and weights in one operator; a batch norm between updates buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(functional.relu(self.norm(self.first(x))))


class Tied(nn.Module):
    """One weight under two names, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.tanh(self.a(self.a(x))))


class Counting(nn.Module):
    """Multiplies by a buffer that it updates: the gradient needs the value from before."""

    n: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones(8))
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        result = self.a(x) * self.n.clone()
        self.n.mul_(1.5)
        return result


class Shifted(nn.Module):
    """Gradients of weights that are the gradient of the output, and views of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.row, self.column = (nn.Parameter(torch.randn(*s)) for s in ((4, 8), (8,), (1, 8)))

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.all + self.row + self.column


def perceptron() -> nn.Sequential:
    """Two linear layers; on inputs of three dimensions the output is a view."""
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def x(*shape: int, gradient: bool = True) -> torch.Tensor:
    """An input."""
    return torch.randn(*shape, requires_grad=gradient)


def fresh(args: Args) -> Args:
    """``args`` with tensors of their own."""
    own = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), args)
    return tuple(own)


def outputs_of(returned: object) -> list[torch.Tensor]:
    """What a backward may begin from."""
    leaves = pytree.tree_leaves(returned)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def stepped(
    module: nn.Module, batches: Sequence[Args], order: Sequence[int], later: Sequence[int], autocast: bool = False
) -> dict[str, Any]:
    """All that a step over microbatches leaves: their F, their I in ``order``, and their W in the order ``later``.

    Eager autograd has all of the backward where its W would be, but for the gradients of inputs, which W does not see.
    """
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        returned = [module(*args) for args in batches]
    kept = [pytree.tree_map_only(torch.Tensor, torch.clone, results) for results in returned]
    left: dict[str, Any] = {f"outputs {i}": results for i, results in enumerate(kept)}
    runs: dict[int, Callable[[], None]] = {}
    for i in order if isinstance(module, SplitStage) else later:
        torch.manual_seed(100 + i)
        results = outputs_of(returned[i])
        torch.autograd.backward(results, [torch.randn_like(result) for result in results])
        if isinstance(module, SplitStage):
            runs[i] = module.dw_builder()
    for i in later if runs else ():
        runs[i]()
    own = module.module if isinstance(module, SplitStage) else module
    given = [leaf for args in batches for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    left |= {f"gradient of input {i}": tensor.grad for i, tensor in enumerate(given)}
    left |= {f"input {i}": tensor.detach() for i, tensor in enumerate(given)}
    for name, parameter in own.named_parameters():
        is_sparse = parameter.grad is not None and parameter.grad.is_sparse
        left[f"gradient of {name}"] = parameter.grad.to_dense() if is_sparse else parameter.grad  # type: ignore[union-attr]
    return left | dict(own.named_buffers())


def differences(
    module: nn.Module, batches: Sequence[Args], *, autocast: bool = False, compile: Any = False
) -> dict[str, float]:
    """Where a split stage and eager autograd leave other values, and by how much, relative to the largest there."""
    reference = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        stage = SplitStage(module, fresh(batches[0]), compile=compile)
    order = [*range(1, len(batches)), 0]
    later = [*reversed(range(len(batches)))]
    split = stepped(stage, [fresh(args) for args in batches], order, later, autocast)
    eager = stepped(reference, [fresh(args) for args in batches], order, later, autocast)
    assert split.keys() == eager.keys()
    return {name: error for name in split if (error := _difference(split[name], eager[name]))}


def _difference(one: Any, other: Any) -> float:
    ones, structure = pytree.tree_flatten(one)
    others, expected = pytree.tree_flatten(other)
    assert structure == expected
    worst = 0.0
    for a, b in zip(ones, others, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            assert a is b or a == b
        else:
            assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
            if not torch.equal(a, b):
                worst = max(worst, float((a - b).detach().abs().max() / b.detach().abs().max()))
    return worst
