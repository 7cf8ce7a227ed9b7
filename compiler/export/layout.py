"""A placed plan as addresses: where each operand lies at each step, and every transfer with both of its ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ...errors import PlanError, VerificationError
from ..graph import Role
from ..plan import Load, Plan, Residence, Store
from ..verify import Verification, verify

__all__ = ["Call", "Layout", "Operand", "Transfer", "layout", "require_placed", "require_right"]

_READ_ONLY = (Role.WEIGHT, Role.CONSTANT)
Place = Literal["scratchpad", "backing", "nowhere"]


@dataclass(frozen=True)
class Operand:
    """A tensor as an operator finds it: bytes ``offset`` to ``offset + nbytes - 1`` of ``place``.

    ``within`` is the first of them counted from the start of ``buffer``. A tensor without elements lies nowhere.
    """

    tensor: str
    buffer: str
    place: Place
    offset: int
    within: int
    nbytes: int


@dataclass(frozen=True)
class Call:
    """An operator run at ``step``; ``kind`` is the instruction's name in JSON, such as ``run``."""

    step: int
    kind: str
    op: int
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


@dataclass(frozen=True)
class Transfer:
    """A load or store of a whole buffer at ``step``, before the call ``before`` (their number if it is behind all)."""

    step: int
    kind: str
    buffer: str
    backing_offset: int
    scratchpad_offset: int
    nbytes: int
    before: int


@dataclass(frozen=True)
class Layout:
    """``backing`` gives the offset of each buffer that is moved, streamed, read or returned, in one area.

    That area begins with ``read_only_bytes`` of weights and constants; sources that change, outputs and spilled
    buffers follow, each in bytes of its own, at multiples of the backing memory's alignment.
    """

    plan: Plan
    residences: tuple[Residence, ...]
    calls: tuple[Call, ...]
    transfers: tuple[Transfer, ...]
    backing: Mapping[str, int]
    arena_bytes: int
    backing_bytes: int
    read_only_bytes: int


def require_right(plan: Plan) -> Verification:
    """Check that ``plan`` verifies as far as it is decided. Raises VerificationError."""
    verification = verify(plan)
    if not verification.ok:
        listed = "; ".join(str(finding) for finding in verification.faults[:3])
        raise VerificationError(f"the plan has {len(verification.faults)} faults and is not exported: {listed}")
    return verification


def require_placed(plan: Plan) -> None:
    """Check that ``plan`` has addresses and verifies. Raises PlanError or VerificationError."""
    level = require_right(plan).level
    if level not in ("address", "timed"):
        raise PlanError(f"the plan has decided its {level}, but no addresses", hint="export what `compile` wrote")


def layout(plan: Plan) -> Layout:
    """Addresses of everything ``plan`` does. Raises as ``require_placed``."""
    require_placed(plan)
    residences = tuple(sorted(plan.residences or (), key=lambda r: (r.begin, r.offset or 0, r.buffer)))
    backing, read_only_bytes, backing_bytes = _backing(plan)
    calls: list[Call] = []
    transfers: list[Transfer] = []
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    for step, (instruction, offset) in enumerate(zip(plan.instructions, _offsets(plan, residences), strict=True)):
        kind = str(instruction.__struct_config__.tag)
        if isinstance(instruction, Load | Store):
            buffer, nbytes = instruction.buffer, plan.graph.buffers[instruction.buffer].nbytes
            transfers.append(Transfer(step, kind, buffer, backing[buffer], offset[buffer], nbytes, len(calls)))
        else:
            op = plan.graph.ops[index[instruction.op]]
            inputs = tuple(_operand(plan, name, offset, backing) for name in op.inputs)
            outputs = tuple(_operand(plan, name, offset, backing) for name in op.outputs)
            calls.append(Call(step, kind, index[op.name], inputs, outputs))
    nbytes_of = plan.graph.buffers
    return Layout(
        plan,
        residences,
        tuple(calls),
        tuple(transfers),
        backing,
        max(((r.offset or 0) + nbytes_of[r.buffer].nbytes for r in residences), default=0),
        backing_bytes,
        read_only_bytes,
    )


def _offsets(plan: Plan, residences: tuple[Residence, ...]) -> Iterator[Mapping[str, int]]:
    """Scratchpad offset of each resident buffer, step by step; the mapping changes under the reader's hands."""
    begins: dict[int, list[Residence]] = {}
    for residence in residences:
        begins.setdefault(residence.begin, []).append(residence)
    resident: dict[str, int] = {}  # a residence that ended is left in: a verified plan does not look at it again
    for step in range(len(plan.instructions)):
        for residence in begins.get(step, ()):
            resident[residence.buffer] = residence.offset or 0
        yield resident


def _operand(plan: Plan, name: str, offset: Mapping[str, int], backing: Mapping[str, int]) -> Operand:
    tensor = plan.graph.tensor[name]
    nbytes = tensor.end_bytes - tensor.offset_bytes
    if nbytes == 0:
        return Operand(name, tensor.buffer, "nowhere", 0, 0, 0)
    streamed = tensor.buffer in plan.streamed
    start = backing[tensor.buffer] if streamed else offset[tensor.buffer]
    place: Place = "backing" if streamed else "scratchpad"
    return Operand(name, tensor.buffer, place, start + tensor.offset_bytes, tensor.offset_bytes, nbytes)


def _backing(plan: Plan) -> tuple[dict[str, int], int, int]:
    """Offsets in the backing area, the bytes of its read-only part, and all its bytes."""
    graph = plan.graph
    moved = {i.buffer for i in plan.instructions if isinstance(i, Load | Store)}
    kept = (
        moved | set(plan.streamed) | set(graph.output_buffers) | {graph.tensor[name].buffer for name in graph.outputs}
    )
    written = {buffer for buffers in graph.writes for buffer in buffers}
    parts: tuple[list[str], ...] = ([], [], [], [])
    for name, base in graph.buffers.items():
        if name in kept and base.nbytes:
            constant = base.role in _READ_ONLY and name not in written
            parts[0 if constant else 1 if base.role.is_source else 2 if name in graph.output_buffers else 3].append(
                name
            )
    alignment = plan.machine.backing_memory.alignment_bytes
    offsets: dict[str, int] = {}
    end = read_only = 0
    for number, part in enumerate(parts):
        for name in part:
            offsets[name] = -(-end // alignment) * alignment
            end = offsets[name] + graph.buffers[name].nbytes
        read_only = end if number == 0 else read_only
    return offsets, read_only, end
