"""Mixtures of experts in the forms that occur: every expert on every token, sorted by expert, with room per expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.passes.split.models import Exchange, FromRanks, RmsNorm, ToRanks, applied, weight


def routed(x: Tensor, router: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Weights and experts of each row, [tokens, chosen]."""
    weights, experts = torch.topk(torch.softmax(functional.linear(x, router), -1), chosen, -1)
    return weights / weights.sum(-1, keepdim=True), experts


class Experts(nn.Module):
    """Weights of ``count`` gated experts, stacked."""

    def __init__(self, generator: torch.Generator, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = weight(generator, count, hidden, inner)
        self.up = weight(generator, count, hidden, inner)
        self.down = weight(generator, count, inner, hidden)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """Rows through one expert."""
        return (functional.silu(x @ self.gate[expert]) * (x @ self.up[expert])) @ self.down[expert]

    def forward(self, x: Tensor) -> Tensor:
        """Rows [count, tokens, hidden], each expert its own."""
        return torch.bmm(functional.silu(torch.bmm(x, self.gate)) * torch.bmm(x, self.up), self.down)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert; ``ends`` are where each expert's rows end. The operator takes bfloat16 alone."""

        def product(rows: Tensor, weights: Tensor) -> Tensor:
            result: Tensor = torch._grouped_mm(rows, weights.to(torch.bfloat16), ends)
            return result

        rows = x.to(torch.bfloat16)
        return product(functional.silu(product(rows, self.gate)) * product(rows, self.up), self.down).to(x.dtype)


class Mixture(nn.Module):
    """A norm, a router and experts with a residual, on [batch, sequence, hidden].

    ``form``: "dense" (each expert on every token, tensor parallel), "exchange" (the same, experts spread over the
    ranks by an all-to-all), "sorted" (rows sorted by expert, grouped products), "added" (sorted, brought back by
    ``index_add``), "inverse" (sorted, with a bias for each expert, brought back by the inverse order), "slots" (a slot
    per expert and token, which never overflow), "capacity" (fewer slots: tokens are dropped).
    """

    def __init__(
        self, form: str, rank: int = 0, ranks: int = 2, hidden: int = 8, experts: int = 4, chosen: int = 2
    ) -> None:
        super().__init__()
        shared = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(4000 + rank)
        self.form, self.ranks, self.count, self.chosen = form, ranks, experts, chosen
        self.norm = RmsNorm(shared, hidden, written=True)
        self.router = weight(shared, experts, hidden)
        if form == "inverse":
            self.bias = weight(own, experts, hidden)
        self.experts = Experts(own, experts // ranks if form == "exchange" else experts, hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = applied(ToRanks, self.norm(x)).flatten(0, 1)
        weights, experts = routed(rows, self.router, self.chosen)
        mixed: Tensor = getattr(self, self.form)(rows, weights, experts)
        return x + applied(FromRanks, mixed).view_as(x)

    def shares(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """How much of each expert each row takes, [tokens, experts]."""
        return rows.new_zeros(rows.shape[0], self.count).scatter(1, experts, weights)

    def dense(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        shares = self.shares(rows, weights, experts)
        result = torch.zeros_like(rows)
        for expert in range(self.count):
            result = result + shares[:, expert : expert + 1] * self.experts.one(expert, rows)
        return result

    def exchange(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        shares = self.shares(rows, weights, experts)
        local = self.count // self.ranks
        sent = applied(Exchange, rows.expand(self.count, *rows.shape).contiguous(), self.ranks)
        sent = sent.view(self.ranks, local, *rows.shape).transpose(0, 1).flatten(1, 2)
        done = self.experts(sent).view(local, self.ranks, *rows.shape).transpose(0, 1).flatten(0, 1)
        back = applied(Exchange, done.contiguous(), self.ranks)
        return torch.einsum("te,eth->th", shares, back)

    def dispatched(self, rows: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows through their experts, sorted by expert; and the order."""
        flat = experts.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.histc(flat.to(torch.float32), self.count, 0, self.count)
        ends = torch.cumsum(counts, 0).to(torch.int32)
        return self.experts.grouped(rows[order // self.chosen], ends), order

    def sorted(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        done, order = self.dispatched(rows, experts)
        back = torch.empty_like(done).index_put((order,), done)
        return (back.view(rows.shape[0], self.chosen, -1) * weights[..., None]).sum(1)

    def added(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        done, order = self.dispatched(rows, experts)
        weighted = done * weights.flatten()[order][:, None]
        return torch.zeros_like(rows).index_add(0, order // self.chosen, weighted)

    def inverse(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        flat, tokens = experts.reshape(-1), torch.arange(rows.shape[0])
        order = torch.argsort(flat)
        ends = torch.cumsum(torch.histc(flat.float(), self.count, 0, self.count - 1), 0, dtype=torch.int32)
        repeated = rows[tokens.unsqueeze(1).expand(-1, self.chosen).reshape(-1)]
        done = self.experts.grouped(repeated[order], ends) + self.bias[flat[order]]
        done = (done * weights.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
        return done.view(rows.shape[0], self.chosen, -1).sum(1)

    def seats(self, rows: Tensor, weights: Tensor, experts: Tensor, room: int) -> Tensor:
        """Each token takes the next free seat of its experts, if there is one among ``room``."""
        taken = functional.one_hot(experts.flatten(), self.count)
        seat = ((torch.cumsum(taken, 0) - 1) * taken).sum(-1)
        kept = (seat < room).to(rows.dtype)
        place = experts.flatten() * room + seat.clamp(max=room - 1)
        sent = rows.repeat_interleave(self.chosen, 0) * kept[:, None]
        hall = rows.new_zeros(self.count * room, rows.shape[1]).index_add(0, place, sent)
        done = self.experts(hall.view(self.count, room, -1)).flatten(0, 1)
        back = done[place] * (kept * weights.flatten())[:, None]
        result: Tensor = back.view(rows.shape[0], self.chosen, -1).sum(1)
        return result

    def slots(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self.seats(rows, weights, experts, rows.shape[0])

    def capacity(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return self.seats(rows, weights, experts, max(1, rows.shape[0] // self.count))
