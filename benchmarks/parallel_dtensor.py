"""The layers of ``parallel_models`` as plain modules, spread over the ranks of a mesh by DTensor.

* ``tensor_parallel``: ``parallelize_module`` with column- and row-wise linears, and sequence parallelism if asked for.
* ``fully_sharded``: each parameter is cut over all ranks, gathered where it is used, and its gradient reduce-scattered,
  by a parametrisation as in SimpleFSDP (arXiv 2411.00284): plain operators to whoever traces it.
* ``data_parallel``: the same with parameters that every rank holds, whose gradients are all-reduced.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.utils import parametrize

from .parallel_models import Sizes

__all__ = ["PlainDense", "data_parallel", "fully_sharded", "tensor_parallel"]


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        wide, keys = sizes.hidden, sizes.key_heads * sizes.head
        self.head = sizes.head
        self.query = nn.Linear(wide, wide, bias=False, dtype=dtype)
        self.key = nn.Linear(wide, keys, bias=False, dtype=dtype)
        self.value = nn.Linear(wide, keys, bias=False, dtype=dtype)
        self.out = nn.Linear(wide, wide, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention of (batch, length, hidden); heads as many as the linears give."""
        heads = [
            linear(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        ]
        query, key, value = heads
        if query.shape[1] != key.shape[1]:
            key, value = (kept.repeat_interleave(query.shape[1] // key.shape[1], 1) for kept in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.hidden, sizes.intermediate, bias=False, dtype=dtype)
        self.up = nn.Linear(sizes.hidden, sizes.intermediate, bias=False, dtype=dtype)
        self.down = nn.Linear(sizes.intermediate, sizes.hidden, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The gated MLP of (batch, length, hidden)."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.hidden, 1e-5, dtype=dtype)
        self.attention = _Attention(sizes, dtype)
        self.mlp_norm = nn.RMSNorm(sizes.hidden, 1e-5, dtype=dtype)
        self.mlp = _MLP(sizes, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer of (batch, length, hidden)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class PlainDense(nn.Sequential):
    """Llama-like layers of ``sizes`` on one device: (batch, length, hidden) to the same; torch's own initialisation."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(*(_Layer(sizes, dtype) for _ in range(sizes.layers)))


def tensor_parallel(module: PlainDense, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> PlainDense:
    """``module`` with heads and intermediate cut over ``mesh``; then tokens are cut too, in dimension 1, if asked for.

    A sequence-parallel module takes and returns this rank's tokens.
    """
    plan: dict[str, ParallelStyle] = {
        **{f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")},
        **{f"mlp.{name}": ColwiseParallel() for name in ("gate", "up")},
        "attention.out": RowwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    if sequence_parallel:
        whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        rows = {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.out", "mlp.down")}
        norms = {name: SequenceParallel(use_local_output=True) for name in ("attention_norm", "mlp_norm")}
        plan |= {"attention": whole, "mlp": whole, **rows, **norms}
    for layer in module:
        parallelize_module(layer, mesh, plan)
    return module


class _Whole(nn.Module):
    """Makes a parameter whole where it is used; the gradients of the ranks' own data are summed on the way back."""

    def forward(self, parameter: DTensor) -> torch.Tensor:
        """All of ``parameter``, as a plain tensor."""
        whole = parameter.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])


def fully_sharded(module: PlainDense, mesh: DeviceMesh) -> PlainDense:
    """``module`` with each parameter cut along its first dimension over ``mesh``; ranks take different data."""
    return _spread(module, mesh, Shard(0))


def data_parallel(module: PlainDense, mesh: DeviceMesh) -> PlainDense:
    """``module`` with the same parameters on all ranks of ``mesh``, which take different data."""
    return _spread(module, mesh, Replicate())


def _spread(module: PlainDense, mesh: DeviceMesh, placement: Placement) -> PlainDense:
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            spread = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
            part.register_parameter(name, spread)
            parametrize.register_parametrization(part, name, _Whole(), unsafe=True)
    return module
