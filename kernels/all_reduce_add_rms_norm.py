"""All-reduce, residual addition and RMS normalisation in one pass, over buffers of all ranks that are given by address.

    reduced = sum over ranks of partials
    hidden = reduced + residual
    out = hidden * rsqrt(mean(hidden ** 2) + epsilon) * weight

This is the fused communication kernel of TokenWeave (arXiv 2505.11329, MLSys 2026): each rank reads its share of rows
from every rank's partial sums, normalises them once for all ranks, and writes the result to every rank. The number of
programs is an argument, because a few move data as fast as the links are: the rest of the machine stays free for a
matrix product beside them (TokenWeave gives 2 to 16 of 132 multiprocessors; T3, arXiv 2401.16677, weighs the same).

Sums are in float32 and in the order of the ranks, and ``reduced`` and ``hidden`` are rounded to the tensors' dtype, as
separate operators round them. One rank computes each row, so all ranks get the same bits.

`launch_on_rank` is the kernel as a rank of many calls it. Before it, every rank must have written its partial sums and
have stopped reading what is written now; after it, no rank may read before all have finished. Both is the caller's to
ensure by barriers over all ranks on the same stream, such as ``barrier`` of PyTorch's symmetric memory, which also
hands out the addresses (``buffer_ptrs``). The kernel itself waits for nobody and cannot hang.

The operator, and `launch`, stand for all ranks at once: one process, partial sums stacked in one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..compiler.graph import DTYPE_BYTES, Graph
from ._checks import FLOATS, check_apart, check_device, check_tensor, fail
from ._configs import Config, Configs
from ._kernel import Kernel, Workload, normal
from ._match import Cost, Match
from ._peers import ALIGNMENT, alignment_of, at_address, store_at_addresses, write_addresses
from ._rows import loaded

__all__ = ["KERNEL", "launch_on_rank", "rows_of_rank"]

NAME = "all_reduce_add_rms_norm"
CONFIGS = Configs.beside(__file__)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def _summed(
    partials_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    peers: tl.constexpr,
    alignment: tl.constexpr,
) -> tl.tensor:
    """``hidden``, in the dtype of ``residual``."""
    total = loaded(at_address(partials_pointer, 0, residual_pointer, alignment), place, inside)
    for peer in tl.static_range(1, peers):
        total += loaded(at_address(partials_pointer, peer, residual_pointer, alignment), place, inside)
    reduced = total.to(residual_pointer.dtype.element_ty).to(tl.float32)
    return (reduced + loaded(residual_pointer, place, inside)).to(residual_pointer.dtype.element_ty)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def all_reduce_add_rms_norm_kernel(
    partials_pointer: tl.tensor,
    residual_pointer: tl.tensor,
    weight_pointer: tl.tensor,
    hidden_pointer: tl.tensor,
    out_pointer: tl.tensor,
    first_row: tl.tensor,
    end_row: tl.tensor,
    own_hidden: tl.tensor,
    epsilon: tl.tensor,
    peers: tl.constexpr,
    hidden_copies: tl.constexpr,
    out_copies: tl.constexpr,
    alignment: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Rows from ``first_row`` to before ``end_row``, each program as many as it finds, by the size of the grid apart.

    Partials, hidden and out are tables of addresses; ``own_hidden`` says which copy of hidden this rank may read.
    """
    lane = tl.arange(0, block)
    width = tl.full([], columns, dtype=tl.int64)
    narrow = residual_pointer.dtype.element_ty
    for row in range(first_row + tl.program_id(0), end_row, tl.num_programs(0)):
        if columns <= block:
            inside, place = lane < columns, row * width + lane
            stored = _summed(partials_pointer, residual_pointer, place, inside, peers, alignment)
            store_at_addresses(stored, hidden_pointer, residual_pointer, place, inside, hidden_copies, alignment)
            hidden = stored.to(tl.float32)
            scale = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / columns + epsilon)
            normalized = (hidden * scale * loaded(weight_pointer, lane, inside)).to(narrow)
            store_at_addresses(normalized, out_pointer, residual_pointer, place, inside, out_copies, alignment)
        else:
            squares = tl.zeros([block], dtype=tl.float32)
            for first in range(0, columns, block):
                inside, place = first + lane < columns, row * width + first + lane
                stored = _summed(partials_pointer, residual_pointer, place, inside, peers, alignment)
                store_at_addresses(stored, hidden_pointer, residual_pointer, place, inside, hidden_copies, alignment)
                hidden = stored.to(tl.float32)
                squares += hidden * hidden
            scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + epsilon)
            tl.debug_barrier()  # the second walk may read, in one thread, what another stored in the first
            own = at_address(hidden_pointer, own_hidden, residual_pointer, alignment)
            for first in range(0, columns, block):
                inside, place = first + lane < columns, row * width + first + lane
                hidden = loaded(own, place, inside)
                normalized = (hidden * scale * loaded(weight_pointer, first + lane, inside)).to(narrow)
                store_at_addresses(normalized, out_pointer, residual_pointer, place, inside, out_copies, alignment)


def rows_of_rank(rank: int, peers: int, rows: int) -> tuple[int, int]:
    """First row, and the row behind the last, that ``rank`` of ``peers`` normalises: shares as equal as can be."""
    return rank * rows // peers, (rank + 1) * rows // peers


def launch_on_rank(
    partials: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    rank: int,
    programs: int,
    *,
    hidden: torch.Tensor,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write this rank's rows of ``hidden`` and ``out`` into the buffers of all ranks, on the current stream.

    The buffers are as large as ``residual``, of its dtype and row-major, and are given by tables of their addresses,
    int64 on the same device, in the order of the ranks. Addresses are multiples of 16. A kernel cannot check what an
    address points to: neither these nor the barriers that the module's description asks for are seen to here.

    Args:
        partials: addresses of each rank's partial sums, ``[peers]``.
        residual: ``[rows, columns]``, float32, float16 or bfloat16, row-major, on a CUDA device; of it, only this
            rank's rows are read.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: added to the mean of squares.
        rank: which rows to normalise: those that `rows_of_rank` says.
        programs: how many run at most, each row after row.
        hidden: addresses of the buffers to write sums to: ``[peers]``, or ``[1]`` to keep them on this rank, where
            alone they are needed if the next residual addition is split by rows in the same way.
        out: addresses of the buffers to write normalised rows to, ``[peers]``.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or there is no such rank or no program.
    """
    peers = _check(partials, residual, weight, programs, (None, None))
    check_tensor(NAME, "partials", partials, (peers,), torch.int64, residual.device)
    check_tensor(NAME, "hidden", hidden, (peers if len(hidden) > 1 else 1,), torch.int64, residual.device)
    check_tensor(NAME, "out", out, (peers,), torch.int64, residual.device)
    if not 0 <= rank < peers:
        raise fail(NAME, f"needs a rank from 0 to {peers - 1}; got {rank}")
    check_device(NAME, all_reduce_add_rms_norm_kernel, residual)
    rows, columns = residual.shape
    first, end = rows_of_rank(rank, peers, rows)
    if first == end or columns == 0:
        return
    config = config or CONFIGS.choose(residual.device, residual.dtype, columns=columns)
    with torch.accelerator.device_index(residual.device.index):
        all_reduce_add_rms_norm_kernel[(min(programs, end - first),)](
            partials,
            residual,
            weight,
            hidden,
            out,
            first,
            end,
            rank if len(hidden) > 1 else 0,
            epsilon,
            peers=peers,
            hidden_copies=len(hidden),
            out_copies=peers,
            alignment=ALIGNMENT,
            columns=columns,
            **config.options,
        )


def launch(
    partials: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    programs: int,
    *,
    hidden: torch.Tensor,
    out: torch.Tensor,
    addresses: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write what all ranks together would, for partial sums stacked in one tensor, on the current stream.

    Args:
        partials: ``[peers, ..., columns]``, float32, float16 or bfloat16, row-major, on a CUDA device.
        residual: ``[..., columns]``, of the same dtype.
        weight: ``[columns]``, of any of the three dtypes.
        epsilon: added to the mean of squares.
        programs: how many run at most, each row after row.
        hidden: as ``residual``; written, as are the next two. None shares memory with any other argument.
        out: as ``residual``.
        addresses: scratch, int64 ``[peers + 2]``, for the tables that `launch_on_rank` is given.
        config: how to launch; chosen by ``columns`` if not given.

    Raises:
        ExecutionError: a tensor has another shape, dtype, layout or device, or an output overlaps something.
    """
    peers = _check(partials, residual, weight, programs, (*[None] * max(residual.dim(), 1),))
    check_tensor(NAME, "partials", partials, (peers, *residual.shape), residual.dtype, residual.device)
    for name, tensor in {"hidden": hidden, "out": out}.items():
        check_tensor(NAME, name, tensor, residual.shape, residual.dtype, residual.device)
    check_tensor(NAME, "addresses", addresses, (peers + 2,), torch.int64, residual.device)
    written = {"hidden": hidden, "out": out, "addresses": addresses}
    check_apart(NAME, written, {"partials": partials, "residual": residual, "weight": weight})
    check_device(NAME, all_reduce_add_rms_norm_kernel, residual)
    if residual.numel() == 0:
        return
    columns = residual.shape[-1]
    rows = residual.numel() // columns
    config = config or CONFIGS.choose(residual.device, residual.dtype, columns=columns)
    with torch.accelerator.device_index(residual.device.index):
        write_addresses(addresses, partials, hidden, out)
        all_reduce_add_rms_norm_kernel[(min(programs, rows),)](
            addresses,
            residual,
            weight,
            addresses[peers:],
            addresses[peers + 1 :],
            0,
            rows,
            0,
            epsilon,
            peers=peers,
            hidden_copies=1,
            out_copies=1,
            alignment=alignment_of(*partials, hidden, out),
            columns=columns,
            **config.options,
        )


def _check(
    partials: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    programs: int,
    shape: tuple[int | None, ...],
) -> int:
    """The number of ranks; ``shape`` is that of ``residual``."""
    check_tensor(NAME, "residual", residual, shape, FLOATS, residual.device)
    check_tensor(NAME, "weight", weight, residual.shape[-1:], FLOATS, residual.device)
    if partials.dim() == 0 or len(partials) == 0:
        raise fail(NAME, f"needs partials of at least one rank; got {list(partials.shape)}")
    if programs < 1:
        raise fail(NAME, f"needs at least one program; got {programs}")
    return len(partials)


def allocate(
    partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, programs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ``(hidden, out, addresses)``, not filled. Raises ExecutionError as ``launch`` does."""
    peers = _check(partials, residual, weight, programs, (*[None] * max(residual.dim(), 1),))
    check_tensor(NAME, "partials", partials, (peers, *residual.shape), residual.dtype, residual.device)
    return torch.empty_like(residual), torch.empty_like(residual), residual.new_empty(peers + 2, dtype=torch.int64)


def reference(
    partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, programs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(hidden, out)`` by plain PyTorch on any device, with the kernel's roundings; shapes as ``launch``."""
    total = partials[0].to(torch.float32)
    for partial in partials[1:]:
        total = total + partial.to(torch.float32)
    hidden = total.to(residual.dtype) + residual
    wide = hidden.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return hidden, (wide * scale * weight.to(torch.float32)).to(residual.dtype)


def eager(partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, programs: int) -> Any:
    """What a model says, were the all-reduce a sum: then an addition and a normalisation."""
    hidden = partials.sum(0) + residual
    return hidden, torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, epsilon)


def cost(dtype: str, peers: int, rows: int, columns: int, weight_dtype: str | None = None, programs: int = 8) -> Cost:
    """Flops and bytes of one launch for all ranks together over ``rows`` x ``columns`` elements.

    Bytes are compulsory: ``peers + 1`` matrices and the weight read, two matrices written, each once. With
    `launch_on_rank`, a rank computes ``1 / peers`` of the rows and writes each of them ``peers`` times.
    """
    matrix = rows * columns * DTYPE_BYTES[dtype]
    # Sum of the ranks, add, square, sum (one less), two products; the row's mean, epsilon and rsqrt.
    flops = rows * ((peers + 4) * columns + 2)
    return Cost(flops, (peers + 3) * matrix + columns * DTYPE_BYTES[weight_dtype or dtype])


def arguments(
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    *,
    peers: int,
    rows: int,
    columns: int,
    weight_dtype: str | None = None,
    programs: int = 8,
) -> dict[str, Any]:
    """Random inputs of ``launch`` for such sizes, by name."""
    random = normal(device, seed)
    weight = (1 + random(columns) / 8).to(getattr(torch, weight_dtype) if weight_dtype else dtype)
    return {
        "partials": random(peers, rows, columns).to(dtype),
        "residual": random(rows, columns).to(dtype),
        "weight": weight,
        "epsilon": 1e-5,
        "programs": programs,
    }


def matches(graph: Graph) -> tuple[Match, ...]:
    """Nothing: a graph of one rank holds no other rank's partial sums, and no operator of ATen names their addresses.

    A pass that places buffers in memory that ranks share calls `launch_on_rank` in the place of
    ``_c10d_functional.all_reduce``, ``wait_tensor``, ``aten.add`` and ``aten.rms_norm``.
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
        Workload("Llama-3 70B, 8 ranks, 128 tokens", {"peers": 8, "rows": 128, "columns": 8192, "programs": 128}),
        Workload("Llama-3 70B, 8 ranks, 2048 tokens", {"peers": 8, "rows": 2048, "columns": 8192, "programs": 132}),
        Workload("Llama-3 70B, 8 ranks, 16 programs", {"peers": 8, "rows": 2048, "columns": 8192, "programs": 16}),
    ),
    dtypes=FLOATS,
    configs=CONFIGS,
    scratch=("addresses",),
)
