"""What each step asks of the machine: seconds alone, and the part of the compute engine that it occupies meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...compiler.graph import DTYPE_BYTES, Op, OpKind
from ...compiler.plan import Load, Plan, Store
from ...hw_models.cost import op_seconds, transfer_seconds
from ...hw_models.model import Concurrency, Direction, EngineKind

__all__ = ["Task", "bound_s", "tasks_of", "upward_ranks"]


@dataclass(frozen=True)
class Task:
    """A step: ``launch_s`` in which it occupies only its queue, then ``body_s`` on the part ``share`` of the engine.

    ``engine`` is that of a copy, and empty for what computes. ``receives`` and ``returns`` mark the steps that take no
    time at the program's begin and end.
    """

    launch_s: float
    body_s: float
    share: float
    engine: str = ""
    receives: bool = False
    returns: bool = False

    @property
    def alone_s(self) -> float:
        """Seconds it takes while nothing else runs."""
        return self.launch_s + self.body_s

    @property
    def computes(self) -> bool:
        """Whether it needs a queue of the compute engine."""
        return not (self.engine or self.receives or self.returns)


def tasks_of(plan: Plan, concurrency: Concurrency) -> tuple[Task, ...]:
    """A task for each step of ``plan``.

    An operator over fewer than ``saturating_elements`` elements occupies that share of the engine and takes longer in
    proportion, so that seconds times share remain those of the roofline (``cost.op_seconds``).
    """
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    result: list[Task] = []
    for instruction in plan.instructions:
        if not isinstance(instruction, Load | Store):
            result.append(_computing(plan, index[instruction.op], concurrency))
            continue
        direction = Direction.LOAD if isinstance(instruction, Load) else Direction.STORE
        nbytes = plan.graph.buffers[instruction.buffer].nbytes
        engines = [engine for engine in plan.machine.engines if engine.copies(direction)]
        fastest = min(engines, key=lambda engine: transfer_seconds(nbytes, engine))
        result.append(Task(0.0, transfer_seconds(nbytes, fastest), 0.0, fastest.name))
    return tuple(result)


def _computing(plan: Plan, index: int, concurrency: Concurrency) -> Task:
    op, graph = plan.graph.ops[index], plan.graph
    if op.kind is OpKind.BOUNDARY:
        return Task(0.0, 0.0, 0.0, receives=not op.inputs, returns=bool(op.inputs))
    engine = plan.machine.engines_of(EngineKind.COMPUTE)[0]
    streamed = frozenset(plan.streamed)
    operands = [graph.tensor[name] for name in dict.fromkeys((*op.inputs, *op.outputs))]
    local = op.outside_bytes + sum(tensor.nbytes for tensor in operands if tensor.buffer not in streamed)
    remote = sum(graph.buffers[b].nbytes for b in graph.reads[index] if b in streamed)
    dtype = operands[0].dtype if operands else "default"
    seconds = op_seconds(op.flops, dtype, local, remote, plan.machine, engine)
    share = min(1.0, max(1, _elements(plan, op)) / concurrency.saturating_elements)
    return Task(engine.launch_s, (seconds - engine.launch_s) / share, share)


def _elements(plan: Plan, op: Op) -> int:
    """Elements of the largest tensor of an operator; what it touches outside the graph counts as one tensor."""
    operands = [plan.graph.tensor[name] for name in (*op.inputs, *op.outputs)]
    sized = [tensor for tensor in operands if tensor.nbytes]
    itemsize = DTYPE_BYTES[sized[0].dtype] if sized else 4
    return max(op.outside_bytes // itemsize, *(math.prod(tensor.shape) for tensor in sized), 0)


def upward_ranks(tasks: Sequence[Task], before: Sequence[Sequence[int]]) -> list[float]:
    """Seconds from the start of each step to the end of the longest chain of steps behind it (HEFT's upward rank)."""
    ranks = [task.alone_s for task in tasks]
    for step in range(len(tasks) - 1, -1, -1):
        for other in before[step]:
            ranks[other] = max(ranks[other], tasks[other].alone_s + ranks[step])
    return ranks


def bound_s(tasks: Sequence[Task], before: Sequence[Sequence[int]], concurrency: Concurrency) -> float:
    """Seconds that no assignment of the steps to queues takes less than.

    The longest chain of steps that wait for one another; all bodies at full use of the engine behind one launch; and
    the launches one after another, up to the end of the last.
    """
    computing = [task for task in tasks if task.computes]
    chain = max(upward_ranks(tasks, before), default=0.0)
    if not computing:
        return chain
    area = min(task.launch_s for task in computing) + math.fsum(task.body_s * task.share for task in computing)
    issue = (len(computing) - 1) * concurrency.issue_s + min(task.alone_s for task in computing)
    return max(chain, area, issue)
