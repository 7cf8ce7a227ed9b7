"""Layers of parallel models, as each rank runs them, to capture, split and schedule: shapes of models that are known.

Weights are random, drawn whole from a seed and then cut, so that the ranks of one seed hold one model; under fake
tensors they have shapes only. Nothing is read from a file.

* ``DenseTensorParallel``: Llama-like layers cut as Megatron-LM does (arXiv 1909.08053), by functional collectives: an
  all-reduce behind attention and one behind the MLP; with ``sequence_parallel`` (arXiv 2205.05198) a reduce-scatter
  and an all-gather instead.
* ``ExpertParallelMoE``: attention on each rank's own tokens, experts spread over the ranks behind two all-to-alls.

``parallel_dtensor`` has the layers that DTensor spreads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

__all__ = [
    "LLAMA_3_70B",
    "MIXTRAL_8X22B",
    "QWEN_2_5_72B",
    "TINY",
    "TINY_MOE",
    "DenseTensorParallel",
    "ExpertParallelMoE",
    "Sizes",
    "cut",
    "tokens_of",
]


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder layer in elements; ``experts`` is 0 for a dense one."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    layers: int
    experts: int = 0
    experts_per_token: int = 0

    @property
    def head(self) -> int:
        """Elements of one attention head."""
        return self.hidden // self.heads

    def with_layers(self, layers: int) -> Sizes:
        """The same widths, ``layers`` deep."""
        return replace(self, layers=layers)


#: From the models' published ``config.json``.
LLAMA_3_70B = Sizes("llama-3-70b", 8192, 28672, 64, 8, 80)
QWEN_2_5_72B = Sizes("qwen-2.5-72b", 8192, 29568, 64, 8, 80)
MIXTRAL_8X22B = Sizes("mixtral-8x22b", 6144, 16384, 48, 8, 56, experts=8, experts_per_token=2)
#: For tests: small, and divisible by 8 ranks.
TINY = Sizes("tiny", 64, 128, 8, 8, 2)
TINY_MOE = Sizes("tiny-moe", 32, 64, 4, 4, 2, experts=8, experts_per_token=2)


def tokens_of(sizes: Sizes, batch: int, length: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Uninitialised activations of ``batch`` sequences of ``length`` tokens: (batch, length, hidden)."""
    return torch.empty(batch, length, sizes.hidden, dtype=dtype)


def cut(whole: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """Part ``rank`` of ``ranks`` equal parts along ``dim``, in memory of its own."""
    if whole.shape[dim] % ranks:
        raise ValueError(f"{whole.shape[dim]} rows do not divide among {ranks} ranks")
    return whole.chunk(ranks, dim)[rank].clone()


class _Drawn:
    """Weights, one after the other, of one seed: ``rank`` of ``ranks`` gets its parts of them."""

    def __init__(self, seed: int, dtype: torch.dtype, rank: int, ranks: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype, self.rank, self.ranks = dtype, rank, ranks

    def whole(self, *shape: int) -> nn.Parameter:
        """Of variance 1 / (elements a result sums over)."""
        return nn.Parameter(self._draw(shape))

    def part(self, dim: int, *shape: int) -> nn.Parameter:
        """What this rank has along ``dim`` of what all ranks draw alike."""
        return nn.Parameter(cut(self._draw(shape), dim, self.rank, self.ranks))

    def parts(self, dim: int, *shapes: Sequence[int]) -> nn.Parameter:
        """Parts of several weights, one behind the other: one matrix product does for all."""
        return nn.Parameter(torch.cat([cut(self._draw(shape), dim, self.rank, self.ranks) for shape in shapes], dim))

    def ones(self, extent: int) -> nn.Parameter:
        """A norm's scale."""
        return nn.Parameter(torch.ones(extent, dtype=self._dtype))

    def _draw(self, shape: Sequence[int]) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self._generator)
        return drawn.mul_(shape[-1] ** -0.5).to(self._dtype)


def _all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))  # type: ignore[no-any-return]


def _all_gather(x: torch.Tensor, group: str, ranks: int) -> torch.Tensor:
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), ranks, group))  # type: ignore[no-any-return]


def _reduce_scatter(x: torch.Tensor, group: str, ranks: int) -> torch.Tensor:
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.reduce_scatter_tensor(x.contiguous(), "sum", ranks, group))  # type: ignore[no-any-return]


def _all_to_all(x: torch.Tensor, group: str, ranks: int) -> torch.Tensor:
    collectives = torch.ops._c10d_functional
    sizes = [x.shape[0] // ranks] * ranks
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), sizes, sizes, group))  # type: ignore[no-any-return]


class _Conjugate(torch.autograd.Function):
    """A collective forward, and the one that is its transpose backward; ``"copy"`` is none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: str, backward: str, group: str, ranks: int) -> torch.Tensor:
        """``x`` after collective ``forward``."""
        ctx.how = backward, group, ranks
        return _collective(x, forward, group, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient after collective ``backward``."""
        return _collective(gradients[0], *ctx.how), None, None, None, None


def _collective(x: torch.Tensor, kind: str, group: str, ranks: int) -> torch.Tensor:
    match kind:
        case "all_reduce":
            return _all_reduce(x, group)
        case "all_gather":
            return _all_gather(x, group, ranks)
        case "reduce_scatter":
            return _reduce_scatter(x, group, ranks)
        case "all_to_all":
            return _all_to_all(x, group, ranks)
        case _:
            return x.view_as(x)


class _Group:
    """The process group of a layer: its name, this rank's place in it and its size."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        chosen = group or dist.group.WORLD
        assert chosen is not None, "init_process_group or fake_ranks first"
        self.name, self.rank, self.ranks = chosen.group_name, chosen.rank(), chosen.size()

    def over(self, x: torch.Tensor, forward: str, backward: str) -> torch.Tensor:
        """``x`` after collective ``forward``; its gradient goes through ``backward``."""
        return _Conjugate.apply(x, forward, backward, self.name, self.ranks)  # type: ignore[no-any-return, no-untyped-call]


def _norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), scale, 1e-5)


def _attended(qkv: torch.Tensor, heads: int, key_heads: int, head: int) -> torch.Tensor:
    """Causal attention of (batch, length, ...) queries, keys and values that lie side by side."""
    batch, length, _ = qkv.shape
    query, key, value = torch.split(qkv, [heads * head, key_heads * head, key_heads * head], -1)
    query = query.reshape(batch, length, heads, head).transpose(1, 2)
    key = key.reshape(batch, length, key_heads, head).transpose(1, 2)
    value = value.reshape(batch, length, key_heads, head).transpose(1, 2)
    if heads != key_heads:
        key, value = (kept.repeat_interleave(heads // key_heads, 1) for kept in (key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2).reshape(batch, length, heads * head)


class DenseTensorParallel(nn.Module):
    """Layers of ``sizes`` on one rank of ``group`` (all ranks where ``None``), cut along heads and intermediate.

    Takes and returns (batch, length, hidden); with ``sequence_parallel`` (length / ranks, batch, hidden): this rank's
    tokens. ``attention`` of ``False`` leaves the MLPs alone.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        group: dist.ProcessGroup | None = None,
        attention: bool = True,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.group, self.sizes = _Group(group), sizes
        self.before, self.behind = ("copy", "all_reduce"), ("all_reduce", "copy")
        self.sequence_parallel = sequence_parallel
        if sequence_parallel:
            self.before, self.behind = ("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")
        drawn = _Drawn(seed, dtype, self.group.rank, self.group.ranks)
        wide, keys, inner = sizes.hidden, sizes.key_heads * sizes.head, sizes.intermediate
        self.layers = nn.ModuleList()
        for _ in range(sizes.layers):
            layer = nn.ParameterDict()
            if attention:
                layer["attention_norm"] = drawn.ones(wide)
                layer["qkv"] = drawn.parts(0, (wide, wide), (keys, wide), (keys, wide))
                layer["out"] = drawn.part(1, wide, wide)
            layer["mlp_norm"] = drawn.ones(wide)
            layer["gate_up"] = drawn.parts(0, (inner, wide), (inner, wide))
            layer["down"] = drawn.part(1, wide, inner)
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers."""
        layer: Any
        for layer in self.layers:
            if "qkv" in layer:
                x = x + self._attention(x, layer)
            x = x + self._mlp(x, layer)
        return x

    def _attention(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        heads, keys = self.sizes.heads // self.group.ranks, self.sizes.key_heads // self.group.ranks
        qkv = functional.linear(self.group.over(_norm(x, layer["attention_norm"]), *self.before), layer["qkv"])
        if self.sequence_parallel:
            qkv = qkv.transpose(0, 1)
        mixed = _attended(qkv, heads, keys, self.sizes.head)
        if self.sequence_parallel:
            mixed = mixed.transpose(0, 1)
        return self.group.over(functional.linear(mixed, layer["out"]), *self.behind)

    def _mlp(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        whole = self.group.over(_norm(x, layer["mlp_norm"]), *self.before)
        gate, up = functional.linear(whole, layer["gate_up"]).chunk(2, -1)
        return self.group.over(functional.linear(functional.silu(gate) * up, layer["down"]), *self.behind)


class ExpertParallelMoE(nn.Module):
    """Layers whose experts are spread over the ranks of ``group``; attention and router are whole on every rank.

    Takes and returns this rank's own sequences, (batch, length, hidden). Each expert takes at most ``capacity`` tokens
    of a sequence: ``capacity_factor`` times its even share, at least one; what is more passes by (GShard,
    arXiv 2006.16668). Sizes are fixed by that, and sequences stay independent of one another.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        group: dist.ProcessGroup | None = None,
        attention: bool = True,
        capacity_factor: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.group, self.sizes, self.capacity_factor = _Group(group), sizes, capacity_factor
        drawn = _Drawn(seed, dtype, self.group.rank, self.group.ranks)
        wide, keys, inner, experts = sizes.hidden, sizes.key_heads * sizes.head, sizes.intermediate, sizes.experts
        self.layers = nn.ModuleList()
        for _ in range(sizes.layers):
            layer = nn.ParameterDict()
            if attention:
                layer["attention_norm"] = drawn.ones(wide)
                layer["qkv"] = drawn.whole(wide + 2 * keys, wide)
                layer["out"] = drawn.whole(wide, wide)
            layer["mlp_norm"] = drawn.ones(wide)
            layer["router"] = drawn.whole(experts, wide)
            layer["gate_up"] = drawn.part(0, experts, wide, 2 * inner)
            layer["down"] = drawn.part(0, experts, inner, wide)
            self.layers.append(layer)

    def capacity(self, length: int) -> int:
        """Most tokens that an expert takes of a sequence of ``length``."""
        even = length * self.sizes.experts_per_token / self.sizes.experts
        return max(1, int(even * self.capacity_factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers."""
        layer: Any
        for layer in self.layers:
            if "qkv" in layer:
                qkv = functional.linear(_norm(x, layer["attention_norm"]), layer["qkv"])
                mixed = _attended(qkv, self.sizes.heads, self.sizes.key_heads, self.sizes.head)
                x = x + functional.linear(mixed, layer["out"])
            x = x + self._experts(_norm(x, layer["mlp_norm"]), layer)
        return x

    def _experts(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        batch, length, wide = x.shape
        each, experts, picks = self.capacity(length), self.sizes.experts, self.sizes.experts_per_token
        weight, choice = functional.linear(x, layer["router"]).softmax(-1).topk(picks, -1)
        slot = _slots(choice.reshape(batch, length * picks), experts, each)
        index = slot.unsqueeze(-1).expand(-1, -1, wide)
        copies = x.unsqueeze(2).expand(-1, -1, picks, -1).reshape(batch, length * picks, wide)
        sent = x.new_zeros(batch, experts * each + 1, wide).scatter(1, index, copies)[:, :-1]
        sent = sent.reshape(batch, experts, each, wide).transpose(0, 1)
        back = self._computed(self.group.over(sent, "all_to_all", "all_to_all"), layer)
        back = self.group.over(back, "all_to_all", "all_to_all").transpose(0, 1).reshape(batch, experts * each, wide)
        passed = torch.cat([back, back.new_zeros(batch, 1, wide)], 1).gather(1, index)
        return (passed.reshape(batch, length, picks, wide) * weight.unsqueeze(-1)).sum(2)

    def _computed(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """The experts of this rank on what all ranks sent them: (ranks x experts, batch, capacity, hidden)."""
        ranks, (_, batch, each, wide) = self.group.ranks, x.shape
        own = x.shape[0] // ranks
        rows = x.reshape(ranks, own, batch, each, wide).permute(1, 2, 0, 3, 4).reshape(own, -1, wide)
        gate, up = torch.bmm(rows, layer["gate_up"]).chunk(2, -1)
        done = torch.bmm(functional.silu(gate) * up, layer["down"]).reshape(own, batch, ranks, each, wide)
        return done.permute(2, 0, 1, 3, 4).reshape(ranks * own, batch, each, wide)


def _slots(choice: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """Where each choice's token lies among all experts' slots of its sequence; ``experts * capacity`` is nowhere."""
    picked = functional.one_hot(choice, experts)
    place = (picked.cumsum(1) * picked).sum(-1) - 1
    return torch.where(place < capacity, choice * capacity + place, experts * capacity)
