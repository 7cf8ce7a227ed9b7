"""Buffers that a kernel is given by address, in int64 tables: as a rank reaches the memory of its peers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["ALIGNMENT", "alignment_of", "at_address", "store_at_addresses", "write_addresses"]

#: What addresses in tables are multiples of, so that 16 bytes move at once.
ALIGNMENT = 16


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def at_address(addresses_pointer: tl.tensor, which: tl.tensor, like: tl.tensor, alignment: tl.constexpr) -> tl.tensor:
    """A pointer, of the type of ``like``, to where the address at ``addresses_pointer + which`` says."""
    return tl.multiple_of(tl.load(addresses_pointer + which).to(like.dtype), alignment)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def store_at_addresses(
    values: tl.tensor,
    addresses_pointer: tl.tensor,
    like: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    copies: tl.constexpr,
    alignment: tl.constexpr,
) -> None:
    """Store ``values`` at ``place`` of each of the first ``copies`` buffers of a table."""
    for copy in tl.static_range(copies):
        tl.store(at_address(addresses_pointer, copy, like, alignment) + place, values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator] # triton ships no types
def write_addresses_kernel(
    addresses_pointer: tl.tensor,
    stacked_pointer: tl.tensor,
    first_pointer: tl.tensor,
    second_pointer: tl.tensor,
    stride: tl.tensor,
) -> None:
    """Write where buffers lie, ``stride`` elements apart and as many as the grid says, and behind them two others."""
    which, count = tl.program_id(0), tl.num_programs(0)
    tl.store(addresses_pointer + which, (stacked_pointer + which.to(tl.int64) * stride).to(tl.int64))
    if which == 0:
        tl.store(addresses_pointer + count, first_pointer.to(tl.int64))
        tl.store(addresses_pointer + count + 1, second_pointer.to(tl.int64))


def write_addresses(addresses: torch.Tensor, stacked: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Fill the table ``addresses`` with where each of ``stacked`` lies, then ``first`` and ``second``.

    The device does it, on the current stream: nothing is copied from the host, so that a CUDA graph can hold it.
    """
    write_addresses_kernel[(len(stacked),)](
        addresses, stacked, first, second, stacked[0].numel(), num_warps=1, enable_fp_fusion=True
    )


def alignment_of(*buffers: torch.Tensor) -> int:
    """What to promise of the addresses of all ``buffers``: 16, or the size of an element."""
    is_aligned = all(buffer.data_ptr() % ALIGNMENT == 0 for buffer in buffers)
    return ALIGNMENT if is_aligned else buffers[0].element_size()
