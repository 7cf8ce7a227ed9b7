"""What is to be placed: storages as bytes over steps, and how many bytes may be allocated at each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...compiler.graph import OpKind
from ...compiler.plan import Plan
from ...hw_models.model import aligned_bytes

__all__ = ["Bytes", "Storages"]

Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Storages:
    """Residence ``i`` of a plan holds ``sizes[i]`` bytes during steps ``begins[i]`` to ``ends[i] - 1``.

    Sizes are rounded up to ``alignment``. ``apart[i]`` says that it is allocated apart in any case. Its memory may be
    allocated from step ``earliest[i]`` on and kept until step ``latest[i]``: its own lifetime, or longer where it may
    host others.
    """

    begins: Bytes
    ends: Bytes
    sizes: Bytes
    apart: NDArray[np.bool_]
    earliest: Bytes
    latest: Bytes
    alignment: int
    steps: int

    @classmethod
    def of(cls, plan: Plan, apart: frozenset[str], hosts: frozenset[str]) -> Storages:
        """The storages of ``plan``'s residences; ``hosts`` may hold others while they do not need their memory.

        What is there before the first operator cannot be allocated earlier, so it hosts behind its last use; what the
        last one takes hosts before its first.
        """
        residences = plan.residences or ()
        alignment = plan.machine.scratchpad_memory.alignment_bytes
        steps = len(plan.instructions)
        brought = {
            buffer
            for op, written in zip(plan.graph.ops, plan.graph.writes, strict=True)
            if op.kind is OpKind.BOUNDARY and not op.inputs
            for buffer in written
        }
        nbytes = plan.graph.buffers
        return cls(
            begins=np.array([r.begin for r in residences], np.int64),
            ends=np.array([r.end for r in residences], np.int64),
            sizes=np.array([aligned_bytes(nbytes[r.buffer].nbytes, alignment) for r in residences], np.int64),
            apart=np.array([r.buffer in apart for r in residences], np.bool_),
            earliest=np.array([0 if r.buffer in hosts - brought else r.begin for r in residences], np.int64),
            latest=np.array([steps if r.buffer in hosts & brought else r.end for r in residences], np.int64),
            alignment=alignment,
            steps=steps,
        )

    def profile(self, chosen: NDArray[np.bool_]) -> Bytes:
        """Bytes of those ``chosen`` at each step."""
        change = np.zeros(self.steps + 1, np.int64)
        np.add.at(change, self.begins[chosen], self.sizes[chosen])
        np.subtract.at(change, self.ends[chosen], self.sizes[chosen])
        return np.cumsum(change[:-1])
