"""What the graph says about buffers and operators, counted anew from its tensors and operators.

The passes use the derived properties of ``Graph`` (touches, predecessors, output buffers). The verifier does not, so
that a mistake in one of them cannot hide itself.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from ..graph import DTYPE_BYTES, Role
from ..plan import Plan

__all__ = ["Facts", "count_facts"]

_EXIST_BEFORE = (Role.INPUT, Role.WEIGHT, Role.CONSTANT, Role.OPTIMIZER_STATE)


@dataclass(frozen=True)
class Facts:
    """``reads``, ``writes`` and ``creates`` hold the buffers of each operator, by the operator's position in the graph.

    ``creates`` are the writes that begin a buffer's contents; all other writes update it in place. ``outputs`` are the
    buffers whose last version must end in backing memory. ``streamed`` are the plan's, unknown names left out.
    ``writers`` counts the operators that write each buffer.
    """

    nbytes: dict[str, int]
    role: dict[str, Role]
    op_index: dict[str, int]
    reads: tuple[tuple[str, ...], ...]
    writes: tuple[tuple[str, ...], ...]
    creates: tuple[frozenset[str], ...]
    outputs: frozenset[str]
    streamed: frozenset[str]
    writers: dict[str, int]

    def is_source(self, buffer: str) -> bool:
        """Whether ``buffer`` lies in backing memory before the first operator."""
        return self.role[buffer] in _EXIST_BEFORE


def count_facts(plan: Plan) -> Facts:
    """Count the facts of ``plan.graph``."""
    buffer_of = {tensor.name: tensor.buffer for tensor in plan.graph.tensors}
    nbytes: dict[str, int] = {}
    role: dict[str, Role] = {}
    for tensor in plan.graph.tensors:
        if tensor.name == tensor.buffer:
            nbytes[tensor.name] = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
            role[tensor.name] = tensor.role
    ops = plan.graph.ops
    reads = tuple(tuple(sorted({buffer_of[name] for name in op.inputs})) for op in ops)
    writes = tuple(tuple(sorted({buffer_of[name] for name in op.outputs})) for op in ops)
    creates = tuple(frozenset(name for name in op.outputs if buffer_of[name] == name) for op in ops)
    writers = Counter(buffer for buffers in writes for buffer in buffers)
    returned = {buffer_of[name] for name in plan.graph.outputs}
    outputs = frozenset(b for b in writers if b in returned or role[b] in _EXIST_BEFORE)
    op_index = {op.name: index for index, op in enumerate(ops)}
    streamed = frozenset(plan.streamed) & nbytes.keys()
    return Facts(nbytes, role, op_index, reads, writes, creates, outputs, streamed, writers)
