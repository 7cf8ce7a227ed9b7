"""Small models of every build that stages are made of, and how they are compared with themselves cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from opweave.compiler.frontend.stages.split import StageModules

WIDE, HEADS, VOCABULARY = 16, 2, 32


class Block(torch.nn.Module):
    """Attention and a multilayer perceptron behind normalisations, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = torch.nn.LayerNorm(WIDE), torch.nn.LayerNorm(WIDE)
        self.mixed, self.out = torch.nn.Linear(WIDE, 3 * WIDE), torch.nn.Linear(WIDE, WIDE)
        self.up, self.down = torch.nn.Linear(WIDE, 2 * WIDE), torch.nn.Linear(2 * WIDE, WIDE)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` [batch, tokens, WIDE]; ``mask`` [tokens, tokens], true where a query sees a key."""
        query, key, value = self.mixed(self.before(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))  # type: ignore[no-any-return]


class Language(torch.nn.Module):
    """A language model of blocks; with ``tied``, the head has the embedding's weights."""

    def __init__(self, blocks: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDE)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(blocks))
        self.head = torch.nn.Linear(WIDE, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, kept: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """``tokens`` [batch, tokens]; ``kept`` masks keys. The mask is the same for all blocks."""
        places = torch.arange(tokens.shape[1])
        mask = places[:, None] >= places[None, :]
        if kept is not None:
            mask = mask & kept[:, None, None, :]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return {"logits": self.head(x)}


class Skipping(torch.nn.Module):
    """A U of convolutions: what goes down is joined on the way up."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.enter = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
        self.up = torch.nn.ModuleList(torch.nn.Conv2d(8, 4, 3, padding=1) for _ in range(depth))
        self.leave = torch.nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [batch, 3, rows, columns]."""
        x, skipped = self.enter(x), []
        for layer in self.down:
            skipped.append(x)
            x = layer(x).tanh()
        for layer in self.up:
            x = layer(torch.cat([x, skipped.pop()], 1)).tanh()
        return self.leave(x)  # type: ignore[no-any-return]


class Updating(torch.nn.Module):
    """Batch normalisation, an activation in place, a counter, and a constant that is no buffer."""

    seen: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` [batch, 3, rows, columns]."""
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        self.seen += 1
        x = self.second(x) + x
        return self.last(x.mean((2, 3)) * self.scale + torch.tensor([1.0, 2.0])[1]), x


def run(stages: StageModules, args: Sequence[Any]) -> Any:
    """What the model returns, computed by its stages one after the other."""
    values: Any = stages.program.flatten(args)
    for module in stages.modules:
        values = module(*values)
        values = values if isinstance(values, tuple) else (values,)
    return stages.program.unflatten(values)


def backward(results: Any) -> None:
    """Gradients of the sum of all squares."""
    torch.stack([leaf.square().sum() for leaf in pytree.tree_leaves(results)]).sum().backward()  # type: ignore[no-untyped-call]


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy to compare with, in the same mode."""
    return copy.deepcopy(model)
