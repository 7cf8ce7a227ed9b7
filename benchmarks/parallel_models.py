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

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from .parallel_parts import Drawn, Group, attended, norm

__all__ = [
    "LLAMA_3_70B",
    "MIXTRAL_8X22B",
    "QWEN_2_5_72B",
    "TINY",
    "TINY_MOE",
    "DenseTensorParallel",
    "ExpertParallelMoE",
    "Sizes",
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
        self.group, self.sizes = Group(group), sizes
        self.before, self.behind = ("copy", "all_reduce"), ("all_reduce", "copy")
        self.sequence_parallel = sequence_parallel
        if sequence_parallel:
            self.before, self.behind = ("all_gather", "reduce_scatter"), ("reduce_scatter", "all_gather")
        drawn = Drawn(seed, dtype, self.group.rank, self.group.ranks)
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
        scale = self._scale(layer["attention_norm"])
        qkv = functional.linear(self.group.over(norm(x, scale), *self.before), layer["qkv"])
        if self.sequence_parallel:
            qkv = qkv.transpose(0, 1)
        mixed = attended(qkv, heads, keys, self.sizes.head)
        if self.sequence_parallel:
            mixed = mixed.transpose(0, 1)
        return self.group.over(functional.linear(mixed, layer["out"]), *self.behind)

    def _scale(self, scale: torch.Tensor) -> torch.Tensor:
        return self.group.same(scale) if self.sequence_parallel else scale

    def _mlp(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        whole = self.group.over(norm(x, self._scale(layer["mlp_norm"])), *self.before)
        gate, up = functional.linear(whole, layer["gate_up"]).chunk(2, -1)
        return self.group.over(functional.linear(functional.silu(gate) * up, layer["down"]), *self.behind)


class ExpertParallelMoE(nn.Module):
    """Layers whose experts are spread over the ranks of ``group``; every rank has the same attention and router.

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
        self.group, self.sizes, self.capacity_factor = Group(group), sizes, capacity_factor
        drawn = Drawn(seed, dtype, self.group.rank, self.group.ranks)
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
                x = x + self._attention(x, layer)
            x = x + self._experts(norm(x, self.group.same(layer["mlp_norm"])), layer)
        return x

    def _attention(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        scale, weight, out = (self.group.same(layer[name]) for name in ("attention_norm", "qkv", "out"))
        qkv = functional.linear(norm(x, scale), weight)
        return functional.linear(attended(qkv, self.sizes.heads, self.sizes.key_heads, self.sizes.head), out)

    def _experts(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        batch, length, wide = x.shape
        each, experts, picks = self.capacity(length), self.sizes.experts, self.sizes.experts_per_token
        weight, choice = functional.linear(x, self.group.same(layer["router"])).softmax(-1).topk(picks, -1)
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
    picked = (choice.unsqueeze(-1) == torch.arange(experts, device=choice.device)).long()
    place = (picked.cumsum(1) * picked).sum(-1) - 1
    return torch.where(place < capacity, choice * capacity + place, experts * capacity)
