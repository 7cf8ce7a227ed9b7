"""Small PyTorch networks of our own: branchy ones, whose order of operators has slack, and a plain transformer.

The branchy ones are those on which Inductor's order of memory was found farthest from the exact optimum of its own
estimate: experts of uneven width, an Inception block, and randomly wired graphs.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DecoderBlock", "Inception", "RandomlyWired", "Transformer", "UnevenExperts", "wiring"]


class UnevenExperts(nn.Module):
    """A dense mixture: expert ``i`` of ``experts`` has ``(i + 1) * width`` hidden units. Float [N, width] to the same.

    Every expert sees every token, so the experts are independent branches of very different sizes.
    """

    def __init__(self, width: int, experts: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.ModuleList([nn.Linear(width, (i + 1) * width) for i in range(experts)])
        self.down = nn.ModuleList([nn.Linear((i + 1) * width, width) for i in range(experts)])

    def forward(self, tokens: Tensor) -> Tensor:
        """The experts' outputs, weighted by the router's softmax."""
        weights = self.router(tokens).softmax(-1)
        total = torch.zeros_like(tokens)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            total = total + weights[:, number : number + 1] * down(functional.gelu(up(tokens)))
        return total


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Inception(nn.Module):
    """The block 3a of Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, with batch normalisation.

    Float [N, 192 * scale, H, W] to [N, 256 * scale, H, W].
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        inputs, *narrow = (int(scale * channels) for channels in (192, 64, 96, 128, 16, 32, 32))
        self.point = _convolution(inputs, narrow[0], 1)
        self.three = nn.Sequential(_convolution(inputs, narrow[1], 1), _convolution(narrow[1], narrow[2], 3))
        self.five = nn.Sequential(_convolution(inputs, narrow[3], 1), _convolution(narrow[3], narrow[4], 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _convolution(inputs, narrow[5], 1))

    def forward(self, image: Tensor) -> Tensor:
        """The four branches, concatenated along the channels."""
        return torch.cat([self.point(image), self.three(image), self.five(image), self.pool(image)], 1)


def wiring(nodes: int, seed: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """What ``RandomlyWired`` draws: the sources of each node but the first, and the channels of every node."""
    draw = random.Random(seed)
    sources = []
    for node in range(1, nodes):
        count = draw.choice((1, 1, 2, 3))
        sources.append(tuple(sorted(draw.sample(range(node), min(node, count)))))
    return tuple(sources), tuple(draw.choice((8, 16, 32, 64, 128)) for _ in range(nodes))


class RandomlyWired(nn.Module):
    """``nodes`` values; each is the rectified sum of 1x1 convolutions of one to three earlier ones, drawn by ``seed``.

    Channels are drawn from 8 to 128, times ``scale``; ``self.channels[0]`` are the input's. The value of the last node
    is the output, so nodes that nothing leads from are dead.
    """

    def __init__(self, nodes: int, seed: int, scale: int = 1) -> None:
        super().__init__()
        self.sources, channels = wiring(nodes, seed)
        self.channels = tuple(scale * each for each in channels)
        self.nodes = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(self.channels[s], self.channels[node], 1, bias=False) for s in sources)
            for node, sources in enumerate(self.sources, start=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """The last node's value, [N, channels[-1], H, W]."""
        values = [image]
        for sources, edges in zip(self.sources, self.nodes, strict=True):
            assert isinstance(edges, nn.ModuleList)  # for the type checker: a ModuleList forgets what it holds
            terms = [edge(values[source]) for source, edge in zip(sources, edges, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            values.append(functional.relu(total))
        return values[-1]


class DecoderBlock(nn.Module):
    """Pre-norm causal attention and a SwiGLU feed-forward layer, float [N, T, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The residual stream after attention and feed-forward."""
        packed = self.query_key_value(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(attended.transpose(1, 2).flatten(2))
        normed = self.feed_forward_norm(hidden)
        fed: Tensor = self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return hidden + fed


class Transformer(nn.Module):
    """``layers`` decoder blocks between an embedding and a head that is not tied: int64 [N, T] to [N, T, vocabulary].

    Positions are left out: they are one addition, and the model is measured, not trained.
    """

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits
