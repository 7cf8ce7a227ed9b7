"""Planning graphs as programs have them, and what a process allocates for a plan, counted step by step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, OpKind, Tensor
from opweave.compiler.plan import Residence
from opweave.compiler.runtime.device.layout import DevicePlan

__all__ = ["ALIGNMENT", "DeviceGraph", "counted", "device_graphs", "least_peak_of_all", "owner_of", "peak_of"]

ALIGNMENT = 512  # of the machine that tests plan for
_SIZES = (0, 1, 100, 512, 600, 1024, 1536, 2048, 4096)


@dataclass(frozen=True)
class DeviceGraph:
    """A graph, and which of its buffers the caller hands over, gets, and calls allocate."""

    graph: Graph
    given: frozenset[str]
    outputs: frozenset[str]
    called: frozenset[str]

    @property
    def apart(self) -> frozenset[str]:
        """Buffers that cannot lie in the arena."""
        return self.given | self.outputs | self.called


@st.composite
def device_graphs(draw: st.DrawFn, *, max_ops: int = 7) -> DeviceGraph:
    """Between receiving and returning, operators that read some buffers and make one, or update one in place."""
    tensors: list[Tensor] = []
    ops: list[Op] = []
    version: dict[str, str] = {}

    def make(name: str) -> str:
        tensors.append(Tensor(name, (draw(st.sampled_from(_SIZES)),), "uint8"))
        version[name] = name
        return name

    given = [make(f"given{i}") for i in range(draw(st.integers(0, 2)))]
    if given:
        ops.append(Op("receive", (), tuple(given), OpKind.BOUNDARY))
    for index in range(draw(st.integers(1, max_ops))):
        read: list[str] = draw(st.lists(st.sampled_from(sorted(version)), max_size=3, unique=True)) if version else []
        inputs = tuple(version[name] for name in read)
        if read and draw(st.integers(0, 3)) == 0:
            base = next(tensor for tensor in tensors if tensor.name == read[0])
            version[read[0]] += "'"
            tensors.append(Tensor(version[read[0]], base.shape, "uint8", buffer=base.name))
            ops.append(Op(f"update{index}", inputs, (version[read[0]],)))
        else:
            ops.append(Op(f"make{index}", inputs, (make(f"made{index}"),)))
    made = [name for name in sorted(version) if name not in given]
    outputs = draw(st.lists(st.sampled_from(made), max_size=3, unique=True)) if made else []
    called = draw(st.lists(st.sampled_from(made), max_size=1)) if made else []
    if outputs:
        ops.append(Op("return", tuple(version[name] for name in outputs), (), OpKind.BOUNDARY))
    graph = Graph("random", tuple(tensors), tuple(ops), ())
    return DeviceGraph(graph, frozenset(given), frozenset(outputs), frozenset(called) - frozenset(outputs))


def aligned(nbytes: int) -> int:
    """Bytes that an allocator takes for ``nbytes``."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def peak_of(graph: Graph, order: tuple[int, ...]) -> int:
    """Largest sum of live bytes, each buffer aligned and live from the first operator that touches it to the last."""
    touched = [{graph.tensor[name].buffer for name in (*op.inputs, *op.outputs)} for op in graph.ops]
    peak = 0
    for position in range(len(order)):
        before = {b for op in order[: position + 1] for b in touched[op]}
        behind = {b for op in order[position:] for b in touched[op]}
        peak = max(peak, sum(aligned(graph.buffers[b].nbytes) for b in before & behind))
    return peak


def least_peak_of_all(graph: Graph) -> int:
    """The least ``peak_of`` all orders that dependencies allow, with the operators at the boundary at both ends."""
    first = [i for i, op in enumerate(graph.ops) if op.name == "receive"]
    last = [i for i, op in enumerate(graph.ops) if op.name == "return"]
    between = [i for i in range(len(graph.ops)) if i not in (*first, *last)]
    peaks = []
    for middle in permutations(between):
        place = {op: position for position, op in enumerate(middle)}
        if all(place[p] < place[op] for op in between for p in graph.predecessors[op] if p in place):
            peaks.append(peak_of(graph, (*first, *middle, *last)))
    return min(peaks)


def owner_of(device_plan: DevicePlan, residence: Residence) -> str:
    """The buffer in whose memory a residence lies, empty for the arena."""
    assert residence.offset is not None
    end = residence.offset + device_plan.plan.graph.buffers[residence.buffer].nbytes
    if end <= device_plan.arena_bytes:
        return ""
    (owner,) = (
        name
        for name, first in device_plan.apart.items()
        if first <= residence.offset and end <= first + aligned(device_plan.plan.graph.buffers[name].nbytes)
    )
    return owner


def counted(device_plan: DevicePlan) -> list[int]:
    """Bytes allocated at each step: the arena, and the memory of each storage apart from its first to its last user."""
    plan = device_plan.plan
    total = [device_plan.arena_bytes] * len(plan.instructions)
    for name in device_plan.apart:
        inside = [r for r in plan.residences or () if owner_of(device_plan, r) == name]
        for step in range(min(r.begin for r in inside), max(r.end for r in inside)):
            total[step] += aligned(plan.graph.buffers[name].nbytes)
    return total
