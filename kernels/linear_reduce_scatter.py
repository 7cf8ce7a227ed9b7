"""A linear layer whose depth is split over ranks, and the sum of what they compute, of which each rank keeps some rows.

    out of a rank = its rows of the sum over ranks of (x of the rank) @ (weight of the rank)

This is the GEMM + reduce-scatter of Flux (arXiv 2406.06858) and T3 (arXiv 2401.16677): each tile of a rank's partial
product goes straight into the memory of the rank that owns these rows, while other tiles are computed. Every rank has a
staging buffer ``[peers, rows, columns]`` with a slot for each rank, so that no two write to one place: a second, small
kernel sums the slots in the order of the ranks, without atomics, and the same inputs give the same bits. Programs walk
over tiles; their number is an argument, because other kernels may need the rest of the machine. A rank begins with the
tiles of the rank behind it and ends with its own, so that what travels is sent first, and to different peers at a time.

Products are summed in float32 and rounded once as they are sent, as a library's product is before it is reduced; slots
are summed in float32 and that sum is rounded once.

`launch_partials_on_rank` and `launch_sum_on_rank` are the kernels as a rank of many calls them, one after the other.
Before the first, all ranks must have stopped reading their staging buffers; between the two, all must have finished the
first; both is the caller's to ensure by barriers over all ranks on the same stream, such as ``barrier`` of PyTorch's
symmetric memory, which also hands out the addresses (``buffer_ptrs``). The kernels themselves wait for nobody and
cannot hang.

The operator, and `launch`, stand for all ranks at once: one process, operands stacked in one tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match
from ._matmul import multiplied, sizes_of
from ._peers import ALIGNMENT, alignment_of, at_address, write_addresses
from ._tiles import swizzled

__all__ = ["KERNEL", "launch_partials_on_rank", "launch_sum_on_rank"]

NAME = "linear_reduce_scatter"
CONFIGS = Configs.beside(__file__)


@triton.jit(do_not_specialize=["rank"])  # type: ignore[untyped-decorator] # triton ships no types
def linear_reduce_scatter_partials_kernel(
    x_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    addresses_pointer: tl.tensor,
    rank: tl.tensor,
    rows: tl.tensor,
    peers: tl.constexpr,
    alignment: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    stride_k: tl.constexpr,
    stride_n: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
) -> None:
    """Tiles of ``x`` [peers * rows, depth] times the weight, each program as many as it finds, a grid's size apart.

    Each goes into slot ``rank`` of the staging buffer [peers, rows, columns] of the rank that owns its rows.
    """
    tiles_m, tiles_n = tl.cdiv(rows, block_m), tl.cdiv(columns, block_n)
    tiles = tiles_m * tiles_n
    for index in range(tl.program_id(0), peers * tiles, tl.num_programs(0)):
        turn = index // tiles
        owner = (rank + 1 + turn) % peers
        tile_m, tile_n = swizzled(index - turn * tiles, tiles_m, tiles_n, group_m)
        row = tile_m * block_m + tl.arange(0, block_m)
        column = tile_n * block_n + tl.arange(0, block_n)
        first = owner.to(tl.int64) * rows
        value = multiplied(
            x_pointer + first * depth, weight_pointer, row, column, rows, stride_k, stride_n, columns, depth, block_k
        )
        slot = at_address(addresses_pointer, owner, x_pointer, alignment) + tl.full([], rank, tl.int64) * rows * columns
        pointers = slot + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(pointers, value.to(x_pointer.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def linear_reduce_scatter_sum_kernel(
    staging_pointer: tl.tensor,
    out_pointer: tl.tensor,
    elements: tl.tensor,
    peers: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Sum ``block`` elements of all slots, in order."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < elements
    total = tl.load(staging_pointer + place, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(1, peers):
        offset = tl.full([], slot, tl.int64) * elements
        total += tl.load(staging_pointer + offset + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_pointer + place, total.to(out_pointer.dtype.element_ty), mask=inside)


def launch_partials_on_rank(
    x: torch.Tensor,
    weight: torch.Tensor,
    rank: int,
    programs: int,
    *,
    staging: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write ``x @ weight`` into slot ``rank`` of the staging buffers of all ranks, on the current stream.

    The buffers are given by a table of addresses, int64 on the same device, in the order of the ranks; each is that of
    a row-major ``[peers, rows, columns]`` of x's dtype, and a multiple of 16. A kernel cannot check what an address
    points to: neither that nor the barriers that the module's description asks for are seen to here.

    Args:
        x: ``[peers * rows, depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        weight: ``[depth, columns]`` of x's dtype and any strides: this rank's part of the depth.
        rank: which slot to write.
        programs: how many run at most, each tile after tile.
        staging: addresses of each rank's staging buffer, ``[peers]``.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or there is no such rank or no program.
    """
    peers = len(staging) if staging.dim() else 0
    check_tensor(NAME, "x", x, (None, None), FLOATS, x.device)
    check_tensor(NAME, "weight", weight, (x.shape[1], None), x.dtype, x.device, row_major=False)
    check_tensor(NAME, "staging", staging, (peers,), torch.int64, x.device)
    if not 0 <= rank < peers:
        raise fail(NAME, f"needs a rank of the {peers} that staging is of; got {rank}")
    _check_split(len(x), peers, programs)
    check_device(NAME, linear_reduce_scatter_partials_kernel, x)
    _launch_partials(x, weight, rank, programs, staging, peers, ALIGNMENT, config)


def _launch_partials(
    x: torch.Tensor,
    weight: torch.Tensor,
    rank: int,
    programs: int,
    addresses: torch.Tensor,
    peers: int,
    alignment: int,
    config: Config | None,
) -> None:
    (depth, columns), rows = weight.shape, len(x) // peers
    if rows * columns == 0:
        return
    config = config or CONFIGS.choose(x.device, x.dtype, **sizes_of(rows, weight))
    tiles = peers * -(-rows // config.constants["block_m"]) * -(-columns // config.constants["block_n"])
    with torch.accelerator.device_index(x.device.index):
        linear_reduce_scatter_partials_kernel[(min(programs, tiles),)](
            x,
            weight,
            addresses,
            rank,
            rows,
            peers=peers,
            alignment=alignment,
            columns=columns,
            depth=depth,
            stride_k=weight.stride(0),
            stride_n=weight.stride(1),
            **config.options,
        )


def launch_sum_on_rank(staging: torch.Tensor, *, out: torch.Tensor) -> None:
    """Write the sum over the slots of this rank's own staging buffer into ``out``, on the current stream.

    Args:
        staging: ``[peers, rows, columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        out: ``[rows, columns]`` of the same dtype, row-major; written, shares no memory with ``staging``.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or they overlap.
    """
    check_tensor(NAME, "staging", staging, (None, None, None), FLOATS, staging.device)
    check_tensor(NAME, "out", out, staging.shape[1:], staging.dtype, staging.device)
    check_apart(NAME, {"out": out}, {"staging": staging})
    check_device(NAME, linear_reduce_scatter_sum_kernel, staging)
    if len(staging) == 0:
        raise fail(NAME, "needs staging of at least one rank; got none")
    if out.numel() == 0:
        return
    block = 2048  # 16 bytes of bfloat16 for each thread, from every slot
    with torch.accelerator.device_index(staging.device.index):
        linear_reduce_scatter_sum_kernel[(-(-out.numel() // block),)](
            staging, out, out.numel(), peers=len(staging), block=block, num_warps=8, num_stages=1, enable_fp_fusion=True
        )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    programs: int,
    *,
    out: torch.Tensor,
    staging: torch.Tensor,
    addresses: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write what all ranks together would, for operands stacked in one tensor each, on the current stream.

    Args:
        x: ``[peers, peers * rows, depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        weight: ``[peers, depth, columns]`` of x's dtype and any strides.
        programs: how many run at most, each tile after tile.
        out: ``[peers, rows, columns]`` of x's dtype, row-major, what each rank keeps; written, as are the next two.
            None shares memory with any other argument.
        staging: scratch, ``[peers, peers, rows, columns]`` of x's dtype: a staging buffer for each rank.
        addresses: scratch, int64 ``[peers + 2]``, for the table that `launch_partials_on_rank` is given.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    peers, rows, columns = _check(x, weight, programs)
    check_tensor(NAME, "out", out, (peers, rows, columns), x.dtype, x.device)
    check_tensor(NAME, "staging", staging, (peers, peers, rows, columns), x.dtype, x.device)
    check_tensor(NAME, "addresses", addresses, (peers + 2,), torch.int64, x.device)
    written = {"out": out, "staging": staging, "addresses": addresses}
    check_apart(NAME, written, {"x": x, "weight": weight})
    check_device(NAME, linear_reduce_scatter_partials_kernel, x)
    if out.numel() == 0:
        return
    with torch.accelerator.device_index(x.device.index):
        write_addresses(addresses, staging, out, out)
    for rank in range(peers):
        _launch_partials(x[rank], weight[rank], rank, programs, addresses, peers, alignment_of(*staging), config)
    for rank in range(peers):
        launch_sum_on_rank(staging[rank], out=out[rank])


def _check(x: torch.Tensor, weight: torch.Tensor, programs: int) -> tuple[int, int, int]:
    """Numbers of ranks, of the rows that each keeps, and of columns."""
    check_tensor(NAME, "x", x, (None, None, None), FLOATS, x.device)
    check_tensor(NAME, "weight", weight, (x.shape[0], x.shape[2], None), x.dtype, x.device, row_major=False)
    _check_split(x.shape[1], x.shape[0], programs)
    return x.shape[0], x.shape[1] // x.shape[0], weight.shape[2]


def _check_split(tokens: int, peers: int, programs: int) -> None:
    if peers == 0 or tokens % peers:
        raise fail(NAME, f"needs x with as many rows for each of {peers} ranks; got {tokens}")
    if programs < 1:
        raise fail(NAME, f"needs at least one program; got {programs}")


def allocate(x: torch.Tensor, weight: torch.Tensor, programs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(out, staging, addresses)``, not filled. Raises ExecutionError as ``launch`` does."""
    peers, rows, columns = _check(x, weight, programs)
    return (
        x.new_empty(peers, rows, columns),
        x.new_empty(peers, peers, rows, columns),
        x.new_empty(peers + 2, dtype=torch.int64),
    )


def reference(x: torch.Tensor, weight: torch.Tensor, programs: int) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's roundings and order; shapes as ``launch``."""
    partials = (x.float() @ weight.float()).to(x.dtype).float()
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return (total.to(x.dtype).view(len(x), x.shape[1] // len(x), weight.shape[2]),)


def eager(x: torch.Tensor, weight: torch.Tensor, programs: int) -> torch.Tensor:
    """What a model says, were the reduce-scatter a sum: products of all ranks, then their sum."""
    return torch.bmm(x, weight).sum(0).view(len(x), x.shape[1] // len(x), weight.shape[2])


def cost(dtype: str, peers: int, rows: int, depth: int, columns: int, programs: int = 132) -> Cost:
    """Flops and bytes of one launch for all ranks together; a rank does ``1 / peers`` of it.

    Each operand is read and each result written once; partial products are written and read once. Of these bytes, all
    but ``1 / peers`` are written over links.
    """
    tokens = peers * rows
    flops = peers * tokens * columns * 2 * depth + (peers - 1) * tokens * columns
    values = peers * (tokens * depth + depth * columns + 2 * tokens * columns) + tokens * columns
    return Cost(flops, values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    peers: int,
    rows: int,
    depth: int,
    columns: int,
    programs: int = 132,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; weights are torch Linears', transposed."""
    random = normal(device, seed)
    return {
        "x": random(peers, peers * rows, depth).to(dtype),
        "weight": (random(peers, columns, depth) / math.sqrt(max(peers * depth, 1))).to(dtype).transpose(1, 2),
        "programs": programs,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Nothing: a graph of one rank holds no other rank's products, and no operator of ATen names staging buffers.

    A pass that places buffers in memory that ranks share calls `launch_partials_on_rank` and `launch_sum_on_rank` in
    the place of a linear layer and the reduce-scatter behind it.
    """
    return ()


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
        Workload(
            "Llama-3 70B MLP down, 8 ranks, 8192 tokens", {"peers": 8, "rows": 1024, "depth": 3584, "columns": 8192}
        ),
        Workload(
            "Llama-3 70B attention output, 8 ranks, 2048 tokens",
            {"peers": 8, "rows": 256, "depth": 1024, "columns": 8192},
        ),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("staging", "addresses"),
)
