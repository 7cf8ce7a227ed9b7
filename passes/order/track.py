"""An order problem and an order of it as arrays, for the compiled walk over it (``walk``).

Blocks are sequences of operators that run back to back, see ``clusters``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .problem import OrderProblem

__all__ = ["STRIDE", "Arrays", "Integers", "Track"]

STRIDE = 16  # steps between two remembered states

Integers = NDArray[np.int64]


class Arrays(NamedTuple):
    """An order problem and its blocks as arrays; lists of lists as one array with the begin of each list."""

    capacity: int
    touch_begin: Integers  # by operator
    touch: Integers
    writes: NDArray[np.bool_]  # by touch
    use_begin: Integers  # by buffer
    use: Integers
    nbytes: Integers
    footprint: Integers
    final_writer: Integers
    key: NDArray[np.uint64]  # by buffer, twice: random bits that say "resident", and "resident and backed"
    block_begin: Integers  # by block
    block: Integers
    block_of: Integers  # by operator
    before_begin: Integers  # by block: blocks it depends on, and those that depend on it
    before: Integers
    after_begin: Integers
    after: Integers

    @classmethod
    def of(cls, problem: OrderProblem, blocks: Sequence[Sequence[int]]) -> Arrays:
        """Arrays of ``problem`` with its operators in ``blocks``."""
        block_of = {op: k for k, block in enumerate(blocks) for op in block}
        before = [
            sorted({block_of[p] for op in b for p in problem.predecessors[op]} - {k}) for k, b in enumerate(blocks)
        ]
        after = [sorted({block_of[s] for op in b for s in problem.successors[op]} - {k}) for k, b in enumerate(blocks)]
        writes = [b in problem.writes[op] for op, touched in enumerate(problem.touches) for b in touched]
        keys = np.random.default_rng(0).integers(1, 1 << 63, 2 * len(problem.nbytes), dtype=np.uint64)
        return cls(
            problem.capacity,
            *_flat(problem.touches),
            np.array(writes, np.bool_),
            *_flat(problem.users),
            np.array(problem.nbytes, np.int64),
            np.array(problem.footprint, np.int64),
            np.array(problem.final_writer, np.int64),
            keys,
            *_flat(blocks),
            np.array([block_of[op] for op in range(len(problem.touches))], np.int64),
            *_flat(before),
            *_flat(after),
        )


def _flat(lists: Sequence[Sequence[int]]) -> tuple[Integers, Integers]:
    begin = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(one) for one in lists], out=begin[1:])
    return begin, np.fromiter(chain.from_iterable(lists), np.int64, int(begin[-1]))


class Track(NamedTuple):
    """An order with what its last recorded walk met, and scratch space; all arrays are overwritten in place."""

    sequence: Integers  # blocks in their order, and the index of each block in it
    rank: Integers
    start: Integers  # by index: step of the block's first operator; one more for the end
    order: Integers  # operators, and the step of each
    step: Integers
    moved: Integers  # by step: bytes that evictions before it move
    again: Integers  # by step: when the last buffer evicted before it is used again, -1 if none is
    state: NDArray[np.uint64]  # by step: hash of what is resident before it
    kept: Integers  # [step // STRIDE, slot]: resident buffers, times two, plus one if backed
    residents: Integers  # by step // STRIDE
    total: Integers  # bytes moved in all
    now: Integers  # how many buffers the last walk left in ``resident``
    resident: Integers  # buffers, where each is among them (-1 if not), whether it is backed
    slot: Integers
    backed: NDArray[np.bool_]
    victims: Integers
    due: Integers

    @classmethod
    def of(cls, arrays: Arrays, slots: int) -> Track:
        """Space for an order of all blocks of ``arrays`` with up to ``slots`` resident buffers."""
        blocks, operators, buffers = len(arrays.block_begin) - 1, len(arrays.block), len(arrays.nbytes)
        snapshots = operators // STRIDE + 1

        def zeros(*shape: int) -> Integers:
            return np.zeros(shape, np.int64)

        return cls(
            sequence=zeros(blocks),
            rank=zeros(blocks),
            start=zeros(blocks + 1),
            order=zeros(operators),
            step=zeros(operators),
            moved=zeros(operators),
            again=zeros(operators),
            state=np.zeros(operators, np.uint64),
            kept=zeros(snapshots, slots),
            residents=zeros(snapshots),
            total=zeros(1),
            now=zeros(1),
            resident=zeros(slots),
            slot=np.full(buffers, -1, np.int64),
            backed=np.zeros(buffers, np.bool_),
            victims=zeros(slots),
            due=zeros(slots),
        )
