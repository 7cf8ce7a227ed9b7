"""Plans that are nothing but residences, and what placements of them are worth by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Role, Tensor
from opweave.compiler.plan import Plan, Residence
from tests.graphs.build import machine

__all__ = ["Box", "arena", "boxes", "faults", "least_arena", "plan_of"]

Box = tuple[int, int, int]  # begin, end, bytes


def boxes(*, max_size: int = 6, max_bytes: int = 40) -> st.SearchStrategy[list[Box]]:
    """Up to ``max_size`` lifetimes within eight steps."""
    box = st.tuples(st.integers(0, 7), st.integers(1, 4), st.integers(1, max_bytes))
    return st.lists(box.map(lambda b: (b[0], b[0] + b[1], b[2])), min_size=1, max_size=max_size)


def plan_of(items: Sequence[Box], capacity: int, alignment: int = 1) -> Plan:
    """A plan with one buffer and one residence for each box, and no instructions."""
    tensors = tuple(Tensor(f"b{i}", (size,), "int8", Role.INPUT) for i, (_, _, size) in enumerate(items))
    residences = tuple(Residence(f"b{i}", "sram", begin, end) for i, (begin, end, _) in enumerate(items))
    return Plan(Graph("boxes", tensors, (), ()), machine(capacity, alignment), (), residences)


def arena(plan: Plan) -> int:
    """End of the highest region, bytes."""
    return max((r.offset or 0) + plan.graph.buffers[r.buffer].nbytes for r in plan.residences or ())


def faults(plan: Plan) -> list[str]:
    """Pairs of residences that collide, offsets that are missing or misaligned; by comparing all with all."""
    memory = plan.machine.scratchpad_memory
    placed = [(r.begin, r.end, r.offset, plan.graph.buffers[r.buffer].nbytes, r.buffer) for r in plan.residences or ()]
    found = [f"{name} at {offset}" for *_, offset, _, name in placed if offset is None]
    regions = [(b, e, o, size, name) for b, e, o, size, name in placed if o is not None]
    found += [f"{name} at {o}" for _, _, o, _, name in regions if o < 0 or o % memory.alignment_bytes]
    for i, (begin, end, offset, size, name) in enumerate(regions):
        for begin_2, end_2, offset_2, size_2, name_2 in regions[:i]:
            if begin < end_2 and begin_2 < end and offset < offset_2 + size_2 and offset_2 < offset + size:
                found.append(f"{name} meets {name_2}")
    return found


def least_arena(items: Sequence[Box], alignment: int = 1) -> int:
    """The least arena, by stacking the boxes in every order: in some order every one drops to its best place."""
    best = sum(-(-size // alignment) * alignment for _, _, size in items)
    for order in permutations(range(len(items))):
        tops: dict[int, int] = {}
        highest = 0
        for i in order:
            begin, end, size = items[i]
            below = (tops[j] for j in tops if items[j][0] < end and begin < items[j][1])
            offset = max(below, default=0)
            tops[i] = offset + -(-size // alignment) * alignment
            highest = max(highest, offset + size)
        best = min(best, highest)
    return best
