"""The overlap problem of a graph on a machine: regions of operators as tasks, with what they cost and hold.

Given a graph whose collectives are operators, and which operator belongs to which part of a split: pointwise operators
and reductions are fused into regions between products, attention and collectives (`regions`), each region, library call
and collective is a task (`costs`), and a collective that the machine can do together with the normalisation behind it
has modes that absorb that task. Result: a ``Problem`` whose tasks name the operators, so that a schedule maps back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...compiler.graph import CollectiveKind, Graph, OpKind
from ...errors import MachineError, OptionError
from ...hw_models.model import HardwareModel
from .costs import Costs
from .lifetimes import lifetimes
from .problem import Mode, Problem, Task
from .regions import called, regions_of

__all__ = ["problem_of"]

#: What the functional collectives of a program run on, if nothing is decided: a library's kernels, or a plain ring.
_GIVEN = ("nccl", "ring")
#: Calls that make up an addition of the residual and its root-mean-square normalisation.
_NORM = frozenset({"add", "mul", "pow", "mean", "rsqrt", "sqrt", "reciprocal", "div", "_to_copy", "square", "copy"})
_WHOLE_NORMS = frozenset({"rms_norm", "_fused_rms_norm", "fused_rms_norm"})
FUSES = "rms_norm"


def problem_of(
    graph: Graph,
    machine: HardwareModel,
    *,
    parts: Mapping[str, int] | None = None,
    memory_limit_bytes: int | None = None,
    fuse_norms: bool = True,
) -> Problem:
    """The tasks of ``graph`` in an order that every dependency allows, close to the program's.

    A task is named after its last operator. ``parts`` gives the part of a split that an operator belongs to, by its
    name. With ``fuse_norms`` an all-reduce gets the machine's modes that add and normalise as well, where what follows
    it is exactly that. Bytes are those of buffers that outlive the task that makes them; a buffer that is returned is
    never freed.

    Raises:
        OptionError: ``parts`` names an operator that the graph does not have, or a part below -1.
        MachineError: the graph has a collective that the machine cannot do.
    """
    parts = dict(parts or {})
    unknown = sorted(parts.keys() - {op.name for op in graph.ops})
    if unknown:
        raise OptionError(f"parts name {unknown[0]!r}, which graph {graph.name!r} has no operator of")
    if any(part < -1 for part in parts.values()):
        raise OptionError("parts are numbered from 0 on; -1 is none")
    tasks = _Tasks(graph, machine, regions_of(graph, parts), parts).found()
    if fuse_norms:
        tasks = _with_absorbing_modes(tasks, graph, Costs(graph, machine))
    sharing = machine.concurrency
    issue_s, event_s = (sharing.issue_s, sharing.event_s) if sharing is not None else (0.0, 0.0)
    return Problem(tasks, issue_s=issue_s, event_s=event_s, memory_limit_bytes=memory_limit_bytes)


@dataclass(frozen=True)
class _Tasks:
    """Makes a task of each region."""

    graph: Graph
    machine: HardwareModel
    regions: tuple[tuple[int, ...], ...]
    parts: Mapping[str, int]

    def found(self) -> tuple[Task, ...]:
        costs = Costs(self.graph, self.machine)
        allocates, frees = lifetimes(self.graph, self.regions)
        return tuple(
            self._task(number, region, costs, allocates[number], frees[number])
            for number, region in enumerate(self.regions)
        )

    @cached_property
    def _region_of(self) -> dict[int, int]:
        return {index: number for number, region in enumerate(self.regions) for index in region}

    def _task(self, number: int, region: Sequence[int], costs: Costs, allocates: int, frees: tuple[int, ...]) -> Task:
        ops = [self.graph.ops[index] for index in region]
        before = {self._region_of[other] for index in region for other in self.graph.predecessors[index]} - {number}
        task = Task(
            name=ops[-1].name,
            lane="",
            modes=(),
            before=tuple(sorted(before)),
            ops=tuple(op.name for op in ops),
            allocates_bytes=allocates,
            frees=frees,
            part=self.parts.get(ops[-1].name, -1),
        )
        collective = ops[-1].collective
        if collective is None:
            lane, mode = costs.computing(region)
            return replace(task, lane=lane, modes=(mode,), launches=int(mode.seconds > 0))
        ways = costs.communicating(collective)
        given = next((i for name in _GIVEN for i, (_, mode) in enumerate(ways) if mode.name.startswith(name)), 0)
        lane = ways[given][0]
        kept = [mode for link, mode in ways if link == lane]
        return replace(task, lane=lane, modes=tuple(kept), collective=collective, given_mode=kept.index(ways[given][1]))


def _with_absorbing_modes(tasks: Sequence[Task], graph: Graph, costs: Costs) -> tuple[Task, ...]:
    """``tasks`` whose all-reduces may do the normalisation behind them as well, where the machine has a way."""
    targets = {op.name: called(op) for op in graph.ops if op.kind is OpKind.COMPUTE}
    after: list[list[int]] = [[] for _ in tasks]
    for index, task in enumerate(tasks):
        for other in task.before:
            after[other].append(index)
    found = list(tasks)
    taken: set[int] = set()
    for index, task in enumerate(tasks):
        if task.collective is None or task.collective.kind is not CollectiveKind.ALL_REDUCE:
            continue
        for other in after[index]:
            if other in taken or not _is_norm(tasks[other], targets) or tasks[other].part != task.part:
                continue
            if _depends(tasks, [b for b in tasks[other].before if b != index], index):
                continue
            modes = _fused_modes(task, other, costs)
            if modes:
                taken.add(other)
                found[index] = replace(task, modes=(*task.modes, *modes))
            break
    return tuple(found)


def _is_norm(task: Task, targets: Mapping[str, str]) -> bool:
    """Whether a region is an addition and one root-mean-square normalisation, and nothing more."""
    names = [targets.get(op, "") for op in task.ops]
    roots = sum(name in ("rsqrt", "sqrt") or name in _WHOLE_NORMS for name in names)
    means = sum(name == "mean" or name in _WHOLE_NORMS for name in names)
    return roots == means == 1 and all(name in _NORM or name in _WHOLE_NORMS for name in names)


def _depends(tasks: Sequence[Task], indices: Sequence[int], on: int) -> bool:
    """Whether one of the tasks ``indices`` comes behind task ``on``."""
    pending, seen = list(indices), set()
    while pending:
        index = pending.pop()
        if index == on:
            return True
        if index > on and index not in seen:
            seen.add(index)
            pending.extend(tasks[index].before)
    return False


def _fused_modes(task: Task, norm: int, costs: Costs) -> list[Mode]:
    assert task.collective is not None
    try:
        ways = costs.communicating(task.collective, fuses=FUSES)
    except MachineError:
        return []  # the machine has no kernel that does both
    return [replace(mode, absorbs=(norm,)) for link, mode in ways if link == task.lane]
