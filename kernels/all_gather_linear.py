"""A linear layer over rows that all ranks hold a part of, read from the ranks' memory tile by tile.

    out = concatenation over ranks of (x of the rank) @ weight

This is the all-gather + GEMM of Flux (arXiv 2406.06858): no gathered copy of ``x`` is made. Each rank computes the
tiles of its own rows first and those of the others in the order of their ranks behind it, so that ranks read from
different peers at any time, and while it computes what is there, later rows may still be on their way. Programs walk
over tiles; their number is an argument, because other kernels may need the rest of the machine (T3, arXiv 2401.16677).

`launch_on_rank` is the kernel as a rank of many calls it, with the addresses of all ranks' rows. What it reads must
be written before: either by a barrier over all ranks on the same stream (``flags`` is None), such as ``barrier`` of
PyTorch's symmetric memory, which also hands out the addresses (``buffer_ptrs``), or row by row of ranks with flags:
a rank that has written its ``x`` then writes ``epoch``, with release semantics at the scope of the system, to the
element of its number in every rank's ``flags`` (``put_signal``, or cuStreamWriteValue32 behind a fence). The kernel
waits until a flag is at least ``epoch``; with a larger one for each call, flags need no reset. A rank may overwrite
its ``x`` when all others have finished: that, again, takes a barrier. A flag that never comes hangs the kernel, and
ranks whose flags wait for work behind this kernel on the same stream wait for ever.

The operator, and `launch`, stand for one rank where all ranks' rows are stacked in one tensor, in one process. Sums
are in float32, rounded once.
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

__all__ = ["KERNEL", "launch_on_rank"]

NAME = "all_gather_linear"
CONFIGS = Configs.beside(__file__)


@triton.jit(do_not_specialize=["rank", "epoch"])  # type: ignore[untyped-decorator] # triton ships no types
def all_gather_linear_kernel(
    addresses_pointer: tl.tensor,
    flags_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    out_pointer: tl.tensor,
    rank: tl.tensor,
    epoch: tl.tensor,
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
    """Tiles of ``out`` [peers * rows, columns], each program as many as it finds, by the size of the grid apart.

    The rows of one peer are those that lie at its address, ``rows`` of them, and follow each other in ``out``.
    """
    tiles_m, tiles_n = tl.cdiv(rows, block_m), tl.cdiv(columns, block_n)
    tiles = tiles_m * tiles_n
    for index in range(tl.program_id(0), peers * tiles, tl.num_programs(0)):
        turn = index // tiles
        peer = (rank + turn) % peers
        if flags_pointer is not None:
            flag = tl.atomic_add(flags_pointer + peer, 0, sem="acquire", scope="sys")  # a load that orders what follows
            while flag < epoch:
                flag = tl.atomic_add(flags_pointer + peer, 0, sem="acquire", scope="sys")
        tile_m, tile_n = swizzled(index - turn * tiles, tiles_m, tiles_n, group_m)
        row = tile_m * block_m + tl.arange(0, block_m)
        column = tile_n * block_n + tl.arange(0, block_n)
        x_pointer = at_address(addresses_pointer, peer, weight_pointer, alignment)
        value = multiplied(x_pointer, weight_pointer, row, column, rows, stride_k, stride_n, columns, depth, block_k)
        first = out_pointer + (peer.to(tl.int64) * rows) * columns
        out_pointers = first + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(out_pointers, value.to(out_pointer.dtype.element_ty), mask=inside)


def launch_on_rank(
    x: torch.Tensor,
    weight: torch.Tensor,
    flags: torch.Tensor | None,
    epoch: int,
    rank: int,
    programs: int,
    *,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the product of all ranks' rows with this rank's ``weight`` into ``out``, on the current stream.

    Rows are given by a table of addresses, int64 on the same device, in the order of the ranks; each is that of a
    row-major ``[rows, depth]`` of weight's dtype, and a multiple of 16. A kernel cannot check what an address points
    to: neither that nor what the module's description asks of callers is seen to here.

    Args:
        x: addresses of each rank's rows, ``[peers]``.
        weight: ``[depth, columns]``, float32, float16 or bfloat16, of any strides, on a CUDA device.
        flags: ``[peers]`` of int32, which others write; or None, if nothing is to be waited for.
        epoch: from what value on a flag says that a rank's rows are there.
        rank: whose rows are first.
        programs: how many run at most, each tile after tile.
        out: ``[peers * rows, columns]`` of weight's dtype, row-major; written.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or there is no such rank or no program.
    """
    peers = len(x) if x.dim() else 0
    _check(weight, peers, rank, programs)
    check_tensor(NAME, "x", x, (peers,), torch.int64, weight.device)
    if flags is not None:
        check_tensor(NAME, "flags", flags, (peers,), torch.int32, weight.device)
    check_tensor(NAME, "out", out, (None, weight.shape[1]), weight.dtype, weight.device)
    if len(out) % peers:
        raise fail(NAME, f"needs out with as many rows of each of {peers} ranks; got {len(out)}")
    check_apart(NAME, {"out": out}, {"x": x, "weight": weight} | ({} if flags is None else {"flags": flags}))
    check_device(NAME, all_gather_linear_kernel, weight)
    _launch(x, weight, flags, epoch, rank, programs, out, peers, ALIGNMENT, config)


def _launch(
    addresses: torch.Tensor,
    weight: torch.Tensor,
    flags: torch.Tensor | None,
    epoch: int,
    rank: int,
    programs: int,
    out: torch.Tensor,
    peers: int,
    alignment: int,
    config: Config | None,
) -> None:
    if out.numel() == 0:
        return
    (depth, columns), rows = weight.shape, len(out) // peers
    config = config or CONFIGS.choose(weight.device, weight.dtype, **sizes_of(rows, weight))
    tiles = peers * -(-rows // config.constants["block_m"]) * -(-columns // config.constants["block_n"])
    with torch.accelerator.device_index(weight.device.index):
        all_gather_linear_kernel[(min(programs, tiles),)](
            addresses,
            flags,
            weight,
            out,
            rank,
            epoch,
            rows,
            peers=peers,
            alignment=alignment,
            columns=columns,
            depth=depth,
            stride_k=weight.stride(0),
            stride_n=weight.stride(1),
            **config.options,
        )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    rank: int,
    programs: int,
    *,
    out: torch.Tensor,
    addresses: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write what ``rank`` would, for rows of all ranks stacked in one tensor, on the current stream.

    Args:
        x: ``[peers, rows, depth]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        weight: ``[depth, columns]`` of x's dtype and any strides: ``linear.weight.t()`` of a torch Linear.
        rank: whose rows are first.
        programs: how many run at most, each tile after tile.
        out: ``[peers * rows, columns]`` of x's dtype, row-major; written, as is the next. Neither shares memory with
            any other argument.
        addresses: scratch, int64 ``[peers + 2]``, for the table that `launch_on_rank` is given.
        config: how to launch; chosen by sizes and dtype if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, an output overlaps something, or there is
            no such rank or no program.
    """
    peers, rows = _check_stacked(x, weight, rank, programs)
    check_tensor(NAME, "out", out, (peers * rows, weight.shape[1]), x.dtype, x.device)
    check_tensor(NAME, "addresses", addresses, (peers + 2,), torch.int64, x.device)
    check_apart(NAME, {"out": out, "addresses": addresses}, {"x": x, "weight": weight})
    check_device(NAME, all_gather_linear_kernel, x)
    if out.numel():
        with torch.accelerator.device_index(x.device.index):
            write_addresses(addresses, x, out, out)
        _launch(addresses, weight, None, 0, rank, programs, out, peers, alignment_of(*x), config)


def _check_stacked(x: torch.Tensor, weight: torch.Tensor, rank: int, programs: int) -> tuple[int, int]:
    """Numbers of ranks and of the rows of each."""
    check_tensor(NAME, "x", x, (None, None, None), FLOATS, x.device)
    peers, rows, depth = x.shape
    check_tensor(NAME, "weight", weight, (depth, None), x.dtype, x.device, row_major=False)
    _check(weight, peers, rank, programs)
    return peers, rows


def _check(weight: torch.Tensor, peers: int, rank: int, programs: int) -> None:
    check_tensor(NAME, "weight", weight, (None, None), FLOATS, weight.device, row_major=False)
    if not 0 <= rank < peers:
        raise fail(NAME, f"needs a rank of the {peers} that x is of; got {rank}")
    if programs < 1:
        raise fail(NAME, f"needs at least one program; got {programs}")


def allocate(x: torch.Tensor, weight: torch.Tensor, rank: int, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New ``(out, addresses)``, not filled. Raises ExecutionError as ``launch`` does."""
    peers, rows = _check_stacked(x, weight, rank, programs)
    return x.new_empty(peers * rows, weight.shape[1]), x.new_empty(peers + 2, dtype=torch.int64)


def reference(x: torch.Tensor, weight: torch.Tensor, rank: int, programs: int) -> tuple[torch.Tensor]:
    """``(out,)`` by plain PyTorch on any device, with the kernel's one rounding; shapes as ``launch``."""
    return ((x.float() @ weight.float()).to(x.dtype).flatten(0, 1),)


def eager(x: torch.Tensor, weight: torch.Tensor, rank: int, programs: int) -> torch.Tensor:
    """What a model says, were the all-gather a view: a linear layer."""
    return torch.nn.functional.linear(x.flatten(0, 1), weight.t())


def cost(dtype: str, peers: int, rows: int, depth: int, columns: int, rank: int = 0, programs: int = 132) -> Cost:
    """Flops and bytes of one rank's launch: ``rows`` of each of ``peers``. Each operand is moved once.

    Of the bytes of ``x``, all but the rank's own come over links.
    """
    tokens = peers * rows
    values = tokens * depth + depth * columns + tokens * columns
    return Cost(2 * tokens * depth * columns, values * DTYPE_BYTES[dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    peers: int,
    rows: int,
    depth: int,
    columns: int,
    rank: int = 0,
    programs: int = 132,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name; the weight is a torch Linear's, transposed."""
    random = normal(device, seed)
    return {
        "x": random(peers, rows, depth).to(dtype),
        "weight": (random(columns, depth) / math.sqrt(max(depth, 1))).to(dtype).t(),
        "rank": rank,
        "programs": programs,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Nothing: a graph of one rank holds no other rank's rows, and no operator of ATen names their addresses.

    A pass that places buffers in memory that ranks share calls `launch_on_rank` in the place of an all-gather and the
    linear layer behind it; in one process, the operator is a linear layer, for which there is nothing to win.
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
            "Llama-3 70B MLP up and gate, 8 ranks, 8192 tokens",
            {"peers": 8, "rows": 1024, "depth": 8192, "columns": 7168, "rank": 3},
        ),
        Workload(
            "Llama-3 70B query, key and value, 8 ranks, 2048 tokens",
            {"peers": 8, "rows": 256, "depth": 8192, "columns": 1280, "rank": 3},
        ),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("addresses",),
)
