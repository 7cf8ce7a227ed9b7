"""Small models as one rank of a group runs them, with functional collectives written out.

All are in float64, with weights drawn from a seed and the rank, so that ranks differ where real ranks would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives
from torch import Tensor, nn
from torch.nn import functional

collectives = torch.ops._c10d_functional

#: The name of the default process group.
GROUP = "0"


def _waited(x: Any) -> Tensor:
    result: Tensor = collectives.wait_tensor(x)
    return result


def all_reduce(x: Tensor) -> Tensor:
    """The sum over the ranks."""
    return _waited(collectives.all_reduce(x, "sum", GROUP))


def all_gather(x: Tensor, ranks: int) -> Tensor:
    """The ranks' slices, one behind the other along dimension 0."""
    return _waited(collectives.all_gather_into_tensor(x.contiguous(), ranks, GROUP))


def reduce_scatter(x: Tensor, ranks: int) -> Tensor:
    """A slice for each rank, along dimension 0, of the sum over the ranks."""
    return _waited(collectives.reduce_scatter_tensor(x.contiguous(), "sum", ranks, GROUP))


def all_to_all(x: Tensor, ranks: int) -> Tensor:
    """Equal blocks along dimension 0 to every rank."""
    sizes = [x.shape[0] // ranks] * ranks
    return _waited(collectives.all_to_all_single(x.contiguous(), sizes, sizes, GROUP))


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """What a function with its own gradient returns."""
    result: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class ToRanks(torch.autograd.Function):
    """The same value into the ranks' column-parallel halves; gradients come back summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.contiguous())


class FromRanks(torch.autograd.Function):
    """The sum of the ranks' row-parallel products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Gather(torch.autograd.Function):
    """Sequence parallel to tensor parallel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient, ctx.ranks), None


class Scatter(torch.autograd.Function):
    """Tensor parallel to sequence parallel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return reduce_scatter(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.ranks), None


class Exchange(torch.autograd.Function):
    """Equal blocks to every rank; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return all_to_all(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_to_all(gradient, ctx.ranks), None


def weight(generator: torch.Generator, *shape: int) -> nn.Parameter:
    """Normal numbers that keep a product's variance."""
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5)


class RmsNorm(nn.Module):
    """Root mean square normalisation; ``written`` out, or by the operator."""

    def __init__(self, generator: torch.Generator, hidden: int, written: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(hidden, generator=generator, dtype=torch.float64))
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        if self.written:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: ``x`` is [batch, heads, sequence, features], the tables [sequence, features]."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


def tables(sequence: int, features: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [sequence, features]."""
    angles = torch.outer(
        torch.arange(sequence, dtype=torch.float64), 100.0 ** -torch.linspace(0, 1, features // 2, dtype=torch.float64)
    )
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal self-attention with grouped queries; ``form`` is "fused" or "written" (products and a softmax)."""

    def __init__(self, generator: torch.Generator, hidden: int, heads: int, groups: int, form: str = "fused") -> None:
        super().__init__()
        self.heads, self.groups, self.features, self.form = heads, groups, 4, form
        self.query = weight(generator, heads * 4, hidden)
        self.key = weight(generator, groups * 4, hidden)
        self.value = weight(generator, groups * 4, hidden)
        self.out = weight(generator, hidden, heads * 4)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, sequence, _ = x.shape

        def headed(projection: Tensor, heads: int) -> Tensor:
            return functional.linear(x, projection).view(batch, sequence, heads, self.features).transpose(1, 2)

        query = rotated(headed(self.query, self.heads), cosine, sine)
        key = rotated(headed(self.key, self.groups), cosine, sine)
        value = headed(self.value, self.groups)
        if self.form == "fused":
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            key = key.repeat_interleave(self.heads // self.groups, 1)
            value = value.repeat_interleave(self.heads // self.groups, 1)
            scores = query @ key.transpose(-1, -2) / self.features**0.5
            allowed = torch.ones(sequence, sequence, dtype=torch.bool).tril()
            mixed = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ value
        return functional.linear(mixed.transpose(1, 2).reshape(batch, sequence, -1), self.out)


class SwiGlu(nn.Module):
    """Gated feed-forward layer, column then row parallel."""

    def __init__(self, generator: torch.Generator, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = weight(generator, inner, hidden)
        self.up = weight(generator, inner, hidden)
        self.down = weight(generator, hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up), self.down
        )


class LlamaLayer(nn.Module):
    """One rank's half of a layer: tensor parallel, or sequence parallel between the norms."""

    def __init__(
        self,
        shared: torch.Generator,
        own: torch.Generator,
        hidden: int,
        *,
        ranks: int,
        parallel: str,
        form: str,
        written: bool,
    ) -> None:
        super().__init__()
        self.ranks, self.parallel = ranks, parallel
        self.attention_norm = RmsNorm(shared, hidden, written)
        self.attention = Attention(own, hidden, 2, 1, form)
        self.inner_norm = RmsNorm(shared, hidden, written)
        self.inner = SwiGlu(own, hidden, 6)

    def enter(self, x: Tensor) -> Tensor:
        if self.parallel == "tensor":
            return applied(ToRanks, x)
        gathered = applied(Gather, x.transpose(0, 1), self.ranks)  # [sequence, batch, hidden]
        return gathered.transpose(0, 1)

    def leave(self, x: Tensor) -> Tensor:
        if self.parallel == "tensor":
            return applied(FromRanks, x)
        return applied(Scatter, x.transpose(0, 1), self.ranks).transpose(0, 1)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.leave(self.attention(self.enter(self.attention_norm(x)), cosine, sine))
        return x + self.leave(self.inner(self.enter(self.inner_norm(x))))


class Llama(nn.Module):
    """Layers on activations [batch, sequence (a rank's share if sequence parallel), hidden]."""

    def __init__(
        self,
        rank: int = 0,
        ranks: int = 2,
        layers: int = 2,
        hidden: int = 8,
        parallel: str = "tensor",
        form: str = "fused",
        written: bool = False,
    ) -> None:
        super().__init__()
        shared = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(1000 + rank)
        self.layers = nn.ModuleList(
            LlamaLayer(shared, own, hidden, ranks=ranks, parallel=parallel, form=form, written=written)
            for _ in range(layers)
        )

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return x


class Language(nn.Module):
    """Tokens in, loss out: embeddings of words and positions, LayerNorm, biases, GELU, cross-entropy."""

    def __init__(
        self,
        rank: int = 0,
        ranks: int = 2,
        hidden: int = 8,
        words: int = 11,
        sequence: int = 6,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        shared = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(2000 + rank)
        self.words = weight(shared, words, hidden)
        self.positions = weight(shared, sequence, hidden)
        self.scale, self.shift = weight(shared, hidden), weight(shared, hidden)
        self.attention = Attention(own, hidden, 2, 2)
        self.up, self.up_bias = weight(own, 6, hidden), weight(own, 6)
        self.down, self.down_bias = weight(own, hidden, 6), weight(shared, hidden)
        self.head = weight(shared, words, hidden)
        self.reduction = reduction

    def forward(self, tokens: Tensor, targets: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = functional.embedding(tokens, self.words) + self.positions
        entering = applied(ToRanks, functional.layer_norm(x, (x.shape[-1],), self.scale, self.shift))
        x = x + applied(FromRanks, self.attention(entering, cosine, sine))
        inner = functional.gelu(functional.linear(applied(ToRanks, x), self.up, self.up_bias))
        x = x + applied(FromRanks, functional.linear(inner, self.down)) + self.down_bias
        logits = functional.linear(x, self.head)
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction=self.reduction, ignore_index=-1
        )


class Vision(nn.Module):
    """Convolutions over [batch, channels, height, width], then a linear layer."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        own = torch.Generator().manual_seed(3000 + rank)
        self.first, self.bias = weight(own, 4, 2, 3, 3), weight(own, 4)
        self.second = weight(own, 3, 4, 3, 3)
        self.head, self.head_bias = weight(own, 5, 3), weight(own, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(functional.conv2d(applied(ToRanks, x), self.first, self.bias, padding=1))
        x = functional.max_pool2d(functional.conv2d(x, self.second), 2)
        return applied(FromRanks, functional.linear(x.mean((2, 3)), self.head, self.head_bias))
