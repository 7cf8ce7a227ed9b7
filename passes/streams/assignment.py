"""Rules that give each step a queue; queues run their steps in the plan's order, so that memory stays as planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...hw_models.model import Concurrency
from .tasks import Task, upward_ranks

__all__ = ["RULES", "Rule", "alone", "critical_heirs", "earliest_start", "round_robin"]

#: Queue of each step, by number: tasks, the steps before each, steps that must take queue 0, number of queues.
Rule = Callable[[Sequence[Task], Sequence[Sequence[int]], frozenset[int], int, Concurrency], list[int]]


def alone(tasks: Sequence[Task]) -> list[int]:
    """Everything on queue 0."""
    return [0] * len(tasks)


class _Queues:
    """When each queue is free and each step done, if nothing that runs at the same time slows it down."""

    def __init__(self, tasks: Sequence[Task], count: int, concurrency: Concurrency) -> None:
        self.tasks, self.concurrency = tasks, concurrency
        self.free = [0.0] * count
        self.last = [-1] * count
        self.queue = [0] * len(tasks)
        self.done = [0.0] * len(tasks)

    def start(self, queue: int, before: Sequence[int]) -> float:
        """When a step behind ``before`` could start on ``queue``."""
        event_s = self.concurrency.event_s
        ready = (self.done[o] + (event_s if self._away(o, queue) else 0.0) for o in before)
        return max(self.free[queue], max(ready, default=0.0))

    def _away(self, step: int, queue: int) -> bool:
        return not self.tasks[step].computes or self.queue[step] != queue

    def put(self, step: int, queue: int, before: Sequence[int]) -> None:
        """Run a step there."""
        task = self.tasks[step]
        if task.computes:
            self.queue[step] = queue
            self.done[step] = self.free[queue] = self.start(queue, before) + task.alone_s
            self.last[queue] = step
        else:
            self.done[step] = max((self.done[other] for other in before), default=0.0) + task.alone_s


def critical_heirs(
    tasks: Sequence[Task], before: Sequence[Sequence[int]], fixed: frozenset[int], count: int, concurrency: Concurrency
) -> list[int]:
    """A step inherits the queue of a step before it if, of those behind that one, it has the longest chain behind it.

    Others start a chain of their own on the queue on which they start first, the one that has idled least among equals.
    """
    ranks = upward_ranks(tasks, before)
    heir: dict[int, int] = {}
    for step, others in enumerate(before):
        for other in others:
            if tasks[step].computes and (other not in heir or ranks[step] > ranks[heir[other]]):
                heir[other] = step
    queues = _Queues(tasks, count, concurrency)
    for step, others in enumerate(before):
        parents = [o for o in others if heir.get(o) == step and tasks[o].computes and queues.last[queues.queue[o]] == o]
        if step in fixed:
            queue = 0
        elif parents:
            queue = queues.queue[max(parents, key=lambda other: queues.done[other])]
        else:
            queue = _first(queues, others, count)
        queues.put(step, queue, others)
    return queues.queue


def earliest_start(
    tasks: Sequence[Task], before: Sequence[Sequence[int]], fixed: frozenset[int], count: int, concurrency: Concurrency
) -> list[int]:
    """A step takes the queue on which it starts first, the one that has idled least among equals."""
    queues = _Queues(tasks, count, concurrency)
    for step, others in enumerate(before):
        queues.put(step, 0 if step in fixed else _first(queues, others, count), others)
    return queues.queue


def _first(queues: _Queues, before: Sequence[int], count: int) -> int:
    return min(range(count), key=lambda queue: (queues.start(queue, before), -queues.free[queue], queue))


def round_robin(
    tasks: Sequence[Task], before: Sequence[Sequence[int]], fixed: frozenset[int], count: int, concurrency: Concurrency
) -> list[int]:
    """The longest chain by number of steps on queue 0, all others on the other queues in turn.

    What NVIDIA apex's ``torchsched`` does (apex/contrib/torchsched), which knows no costs: a baseline to compare with.
    """
    depth, parent = [1] * len(tasks), [-1] * len(tasks)
    for step, others in enumerate(before):
        for other in others:
            if depth[other] + 1 > depth[step]:
                depth[step], parent[step] = depth[other] + 1, other
    step = max(range(len(tasks)), key=lambda s: depth[s], default=-1)
    critical = set[int]()
    while step >= 0:
        critical.add(step)
        step = parent[step]
    queue, turn = [0] * len(tasks), 0
    for step, task in enumerate(tasks):
        if task.computes and step not in critical | fixed and count > 1:
            queue[step] = 1 + turn % (count - 1)
            turn += 1
    return queue


#: Rules that a pass chooses among.
RULES: tuple[Rule, ...] = (critical_heirs, earliest_start, round_robin)
