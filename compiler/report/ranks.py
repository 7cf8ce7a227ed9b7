"""Plans of several ranks side by side, as one plan of one machine that has every rank's engines and links.

What draws a plan then draws them all: lanes of each rank in the timeline, threads in the trace, rows in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from ...errors import OptionError
from ...hw_models.model import EngineKind, HardwareModel
from ..graph import Graph, Op, Tensor
from ..overlap import Overlapped
from ..plan import CollectiveWait, Instruction, Load, Plan, Store

__all__ = ["side_by_side", "write_ranks"]


def side_by_side(plans: Mapping[int, Plan]) -> Plan:
    """One plan with the instructions of ``plans``, by global rank, in the order in which they start.

    Tensors, operators, engines and links are named after their rank. Residences are left out: each rank has a
    scratchpad of its own, and the memory map is that of one plan.

    Raises:
        OptionError: there is no plan, or one has no times.
    """
    if not plans:
        raise OptionError("no rank has a plan to show")
    ordered = sorted(plans.items())
    steps: list[tuple[float, int, int, Instruction]] = []
    for rank, plan in ordered:
        if any(i.start_s is None for i in plan.instructions):
            raise OptionError(f"the plan of rank {rank} has no times to show", hint="simulate it first")
        moves = [i for i in plan.instructions if not isinstance(i, Load | Store)]
        steps += [(i.start_s or 0.0, rank, number, _named(i, rank)) for number, i in enumerate(moves)]
    # Within a rank its own order stays: a start never comes before that of what it depends on.
    latest: dict[int, float] = {}
    keyed = []
    for start, rank, number, instruction in steps:
        latest[rank] = max(start, latest.get(rank, 0.0))
        keyed.append((latest[rank], rank, number, instruction))
    keyed.sort(key=lambda item: item[:3])
    graphs = [_renamed(plan.graph, rank) for rank, plan in ordered]
    name = f"{ordered[0][1].graph.name} on {len(ordered)} ranks"
    graph = Graph(
        name,
        tuple(tensor for graph in graphs for tensor in graph.tensors),
        tuple(op for graph in graphs for op in graph.ops),
        tuple(output for graph in graphs for output in graph.outputs),
    )
    streamed = tuple(f"rank {rank} {name}" for rank, plan in ordered for name in plan.streamed)
    machine = _joined({rank: plan.machine for rank, plan in ordered})
    return Plan(graph, machine, tuple(i for *_, i in keyed), streamed=streamed)


def write_ranks(done: Overlapped, folder: Path) -> dict[str, Path]:
    """Write the report of all ranks of a module into ``folder``: they run one plan. Returns the files by name.

    Raises:
        OptionError: the folder cannot be made or written to.
    """
    from .html import write_report

    ranks = {rank for op in done.plan.graph.ops if op.collective is not None for rank in op.collective.ranks}
    return write_report(side_by_side(dict.fromkeys(sorted(ranks) or (0,), done.plan)), folder, done.lines)


def _named(instruction: Instruction, rank: int) -> Instruction:
    engine = f"rank {rank} {instruction.engine}" if instruction.engine else ""
    if isinstance(instruction, Load | Store):
        return msgspec.structs.replace(instruction, buffer=f"rank {rank} {instruction.buffer}", engine=engine)
    if isinstance(instruction, CollectiveWait):
        engine = ""
    return msgspec.structs.replace(instruction, op=f"rank {rank} {instruction.op}", engine=engine)


def _renamed(graph: Graph, rank: int) -> Graph:
    def named(name: str) -> str:
        return f"rank {rank} {name}"

    def tensor(old: Tensor) -> Tensor:
        return msgspec.structs.replace(old, name=named(old.name), buffer=named(old.buffer))

    def op(old: Op) -> Op:
        inputs, outputs = (tuple(map(named, names)) for names in (old.inputs, old.outputs))
        return msgspec.structs.replace(old, name=named(old.name), inputs=inputs, outputs=outputs)

    return Graph(
        graph.name, tuple(map(tensor, graph.tensors)), tuple(map(op, graph.ops)), tuple(map(named, graph.outputs))
    )


def _joined(machines: Mapping[int, HardwareModel]) -> HardwareModel:
    """All machines as one: the first one's memories, as large as those of all, and everyone's engines and links.

    Nothing is moved to and from backing memory here: the first rank's copy engines are left, as a machine has to have
    some.
    """
    first = next(iter(machines.values()))
    memories = tuple(
        msgspec.structs.replace(memory, capacity_bytes=memory.capacity_bytes * len(machines), banks_bytes=())
        for memory in first.memories
    )
    named = [
        msgspec.structs.replace(engine, name=f"rank {rank} {engine.name}")
        for rank, machine in machines.items()
        for engine in machine.engines
    ]
    copying = [engine for engine in named[: len(first.engines)] if engine.kind is EngineKind.COPY]
    engines = (*(engine for engine in named if engine.kind is not EngineKind.COPY), *copying)
    links = tuple(
        msgspec.structs.replace(link, name=f"rank {rank} {link.name}")
        for rank, machine in machines.items()
        for link in machine.links
    )
    return msgspec.structs.replace(first, memories=memories, engines=engines, links=links, fabric=None)
