"""A linear layer and LoRA's up-projection in one accumulator.

    y = x @ w + scale * s @ b + bias

the second kernel of LoRAFusion (Zhu and others, arXiv 2510.00206): ``s`` is the rank-r tensor that ``lora_down``
writes. Its product with ``b`` comes first and is multiplied by ``scale`` while nothing else is in the accumulator; the
main loop over ``x @ w`` goes on from there. So ``scale`` costs neither a rounding nor a second accumulator. All sums
are in float32 and ``y`` is rounded once, where separate operators round the products, the scaled product and the sum.

With ``offsets`` tokens are sorted by adapter and ``b`` holds a matrix for each (`_lora` says how); a tile that several
adapters share adds up the rows of each.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._lora import accumulated, as_matrix, check_adapter, even_offsets, layout_of, owners, segment, strides, touched
from ._lora_rules import low_rank_sums
from ._match import Cost, Match, Walk
from ._tiles import swizzled

__all__ = ["KERNEL"]

NAME = "lora_linear"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def lora_linear_kernel(
    x_pointer: tl.tensor,
    w_pointer: tl.tensor,
    s_pointer: tl.tensor,
    b_pointer: tl.tensor,
    bias_pointer: tl.tensor,
    offsets_pointer: tl.tensor,
    y_pointer: tl.tensor,
    tokens: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    stride_b: tl.tensor,
    stride_b_r: tl.tensor,
    stride_b_n: tl.tensor,
    stride_bias: tl.tensor,
    scale: tl.tensor,
    columns: tl.constexpr,
    depth: tl.constexpr,
    rank: tl.constexpr,
    adapters: tl.constexpr,
    block_adapters: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_r: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Compute one tile of row-major ``y``; the grid is the number of tiles."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(tokens, block_m), tl.cdiv(columns, block_n), group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    has_column = (column < columns)[None, :]
    total = tl.zeros([block_m, block_n], tl.float32)
    first_adapter, last_adapter = touched(offsets_pointer, tile_m * block_m, block_m, adapters, block_adapters)
    for adapter in range(first_adapter, last_adapter):
        begin, end = segment(offsets_pointer, adapter, tokens)
        mine = ((row >= begin) & (row < end))[:, None]
        b_first = b_pointer + tl.full([], adapter, tl.int64) * stride_b
        for first in range(0, rank, block_r):
            lane = first + tl.arange(0, block_r)
            s = tl.load(
                s_pointer + row.to(tl.int64)[:, None] * rank + lane[None, :],
                mask=mine & (lane < rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_first + lane.to(tl.int64)[:, None] * stride_b_r + column.to(tl.int64)[None, :] * stride_b_n,
                mask=(lane < rank)[:, None] & has_column,
                other=0.0,
            )
            total = tl.dot(s, b, total, input_precision="ieee")
    total = accumulated(
        total * scale, x_pointer, w_pointer, row, column, tokens, stride_k, stride_n, columns, depth, block_k
    )
    if bias_pointer is not None:
        bias = tl.load(bias_pointer + column.to(tl.int64) * stride_bias, mask=column < columns, other=0.0)
        total += bias.to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y_pointer + at, total.to(y_pointer.dtype.element_ty), mask=(row < tokens)[:, None] & has_column)


def launch(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    y: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``x @ w + scale * s @ b + bias`` into ``y``, on the current stream.

    Args:
        x: ``[..., depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        w: ``[depth, columns]`` of x's dtype and any strides: ``linear.weight.t()`` of a torch Linear.
        s: ``[..., rank]`` of x's dtype, row-major, with x's leading dimensions.
        b: ``[rank, columns]`` of x's dtype and any strides: ``lora_B.weight.t()`` of PEFT. With ``offsets``
            ``[adapters, rank, columns]``.
        bias: ``[columns]``, of any of the three dtypes and any stride, or None.
        offsets: int32 or int64 ``[adapters + 1]``, ascending; or None.
        scale: what the adapters' part is multiplied by: PEFT's ``lora_alpha / r``.
        y: ``[..., columns]`` of x's dtype, row-major; written, shares no memory with any other argument.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or the output overlaps something.
    """
    _check(x, w, s, b, bias, offsets)
    (depth, columns), rank = w.shape, s.shape[-1]
    check_tensor(NAME, "y", y, (*x.shape[:-1], columns), x.dtype, x.device)
    read = {"x": x, "w": w, "s": s, "b": b, "bias": bias, "offsets": offsets}
    check_apart(NAME, {"y": y}, {name: tensor for name, tensor in read.items() if tensor is not None})
    check_device(NAME, lora_linear_kernel, x)
    if y.numel() == 0:
        return
    tokens, adapters = y.numel() // columns, 1 if offsets is None else b.shape[0]
    config = config or CONFIGS.choose(
        x.device, x.dtype, tokens=tokens, columns=columns, depth=depth, rank=rank, **layout_of(x, w, columns=columns)
    )
    tiles = triton.cdiv(tokens, config.constants["block_m"]) * triton.cdiv(columns, config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        lora_linear_kernel[(tiles,)](
            x,
            w,
            s,
            b,
            bias,
            offsets,
            y,
            tokens,
            *w.stride(),
            *strides(b),
            bias.stride(0) if bias is not None else 0,
            scale,
            columns=columns,
            depth=depth,
            rank=rank,
            adapters=adapters,
            block_adapters=triton.next_power_of_2(adapters),
            **config.options,
        )


def _check(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> None:
    check_tensor(NAME, "x", x, (*[None] * max(x.dim(), 1),), FLOATS, x.device)
    check_tensor(NAME, "w", w, (x.shape[-1], None), x.dtype, x.device, row_major=False)
    check_adapter(NAME, "b", b, (None, w.shape[1]), offsets, x)
    check_tensor(NAME, "s", s, (*x.shape[:-1], b.shape[-2]), x.dtype, x.device)
    if bias is not None:
        check_tensor(NAME, "bias", bias, (w.shape[1],), FLOATS, x.device, row_major=False)


def allocate(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor]:
    """A new ``y``, not filled. Raises ExecutionError as ``launch`` does."""
    _check(x, w, s, b, bias, offsets)
    return (x.new_empty(*x.shape[:-1], w.shape[1]),)


def reference(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor]:
    """``(y,)`` by plain PyTorch on any device, with the kernel's one rounding; shapes as ``launch``."""
    total = as_matrix(x).float() @ w.float()
    low = as_matrix(s).float()
    owner = owners(offsets, len(low), x.device)[:, None]
    for adapter, matrix in enumerate(b if offsets is not None else b[None]):
        total = total + scale * (torch.where(owner == adapter, low, 0.0) @ matrix.float())
    if bias is not None:
        total = total + bias.float()
    return (total.to(x.dtype).reshape(*x.shape[:-1], w.shape[1]),)


def eager(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """What PEFT says: two linear layers, a product and a sum; several adapters one after the other."""
    y = torch.nn.functional.linear(x, w.t(), bias)
    if offsets is None:
        return y + scale * torch.nn.functional.linear(s, b.t())
    rows, low, bounds = y.view(-1, w.shape[1]), s.flatten(0, -2), offsets.tolist()
    for matrix, (begin, end) in zip(b, pairwise(bounds), strict=True):
        rows[begin:end] += scale * torch.nn.functional.linear(low[begin:end], matrix.t())
    return y


def cost(dtype: str, tokens: int, depth: int, columns: int, rank: int, adapters: int = 0, bias: bool = False) -> Cost:
    """Flops and bytes of one launch: two products, a scaling, and the bias; each tensor read or written once.

    The second product adds to what the first left, so it counts as many additions as multiplications.
    """
    elements = tokens * columns
    values = tokens * (depth + rank) + depth * columns + max(adapters, 1) * rank * columns + elements + bias * columns
    return Cost(elements * (2 * depth + 2 * rank + 1 + bias), values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    tokens: int,
    depth: int,
    columns: int,
    rank: int,
    adapters: int = 0,
    bias: bool = False,
    scale: float = 0.3,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; ``w`` and ``b`` are weights of torch layers, transposed."""
    random = normal(device, seed)
    matrices = (random(max(adapters, 1), columns, rank) / math.sqrt(max(rank, 1))).to(dtype).transpose(1, 2)
    return {
        "x": random(tokens, depth).to(dtype),
        "w": (random(columns, depth) / math.sqrt(max(depth, 1))).to(dtype).t(),
        "s": random(tokens, rank).to(dtype),
        "b": matrices if adapters else matrices[0],
        "bias": random(columns).to(dtype) if bias else None,
        "offsets": even_offsets(tokens, adapters, device),
        "scale": scale,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Where a graph adds a product of low rank, scaled or not, to a linear layer: ``linear(x, w) + 2 * (s @ b)``.

    Whatever computed ``s`` stays: a product with or without PyTorch's dropout. The same sum is the gradient of the
    input of a layer without dropout, ``grad_y @ w.T + grad_s @ a.T``. Where a model rounds both products and the
    scaled one, the kernel rounds the sum.
    """
    walk = Walk(graph)
    found = []
    for item in low_rank_sums(walk):
        (depth, columns), tokens = item.base.weight.shape, math.prod(item.out.shape[:-1])
        arguments = {"x": item.base.x, "w": item.base.weight, "s": item.s, "b": item.b, "bias": item.base.bias}
        launch_cost = cost(item.out.dtype, tokens, depth, columns, item.rank, bias=item.base.bias is not None)
        match = walk.match(NAME, {**arguments, "offsets": None, "scale": item.scale}, (item.out,), launch_cost)
        if match is not None:
            found.append(match)
    return tuple(found)


def _workload(name: str, tokens: int, depth: int, columns: int, rank: int, adapters: int = 0) -> Workload:
    sizes = {"tokens": tokens, "depth": depth, "columns": columns, "rank": rank, "adapters": adapters}
    return Workload(name, sizes)


KERNEL = Kernel(
    name=NAME,
    launch=launch,
    allocate=allocate,
    reference=reference,
    eager=eager,
    cost=cost,
    matches=matches,
    arguments=arguments,
    workloads=(
        _workload("Llama-3 8B query, rank 16, 4096 tokens", 4096, 4096, 4096, 16),
        _workload("Llama-3 8B MLP up, rank 64, 8192 tokens", 8192, 4096, 14336, 64),
        _workload("Llama-3 70B query, rank 64, 8192 tokens", 8192, 8192, 8192, 64),
        _workload("Llama-3 8B query, 4 adapters of rank 16, 8192 tokens", 8192, 4096, 4096, 16, 4),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
)
