"""What the layers of ``parallel_models`` are built from: weights that ranks draw alike, collectives with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

__all__ = ["Drawn", "Group", "attended", "cut", "norm"]


def cut(whole: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """Part ``rank`` of ``ranks`` equal parts along ``dim``, in memory of its own."""
    if whole.shape[dim] % ranks:
        raise ValueError(f"{whole.shape[dim]} rows do not divide among {ranks} ranks")
    return whole.chunk(ranks, dim)[rank].clone()


class Drawn:
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


class Group:
    """The process group of a layer: its name, this rank's place in it and its size."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        chosen = group or dist.group.WORLD
        assert chosen is not None, "init_process_group or fake_ranks first"
        self.name, self.rank, self.ranks = chosen.group_name, chosen.rank(), chosen.size()

    def over(self, x: torch.Tensor, forward: str, backward: str) -> torch.Tensor:
        """``x`` after collective ``forward``; its gradient goes through ``backward``."""
        return _Conjugate.apply(x, forward, backward, self.name, self.ranks)  # type: ignore[no-any-return, no-untyped-call]

    def same(self, parameter: torch.Tensor) -> torch.Tensor:
        """``parameter``, which all ranks hold and use on data of their own: its gradients are summed."""
        return self.over(parameter, "copy", "all_reduce")


def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension."""
    return functional.rms_norm(x, (x.shape[-1],), scale, 1e-5)


def attended(qkv: torch.Tensor, heads: int, key_heads: int, head: int) -> torch.Tensor:
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
