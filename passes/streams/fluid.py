"""When each step starts and finishes, given its queue: operators that run at the same time share the engine.

While the shares of all running bodies sum to more than 1, each is slowed down by that sum: the engine serves them like
a fluid (generalised processor sharing; Parekh and Gallager, IEEE/ACM Transactions on Networking 1(3), 1993).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...hw_models.model import Concurrency
from .tasks import Task

__all__ = ["run"]


def run(
    tasks: Sequence[Task], queues: Sequence[str], before: Sequence[Sequence[int]], concurrency: Concurrency
) -> list[tuple[float, float]]:
    """Start and finish of each step in seconds.

    Each of ``queues`` runs its steps in order; a step starts when those ``before`` it are done, ``event_s`` later if
    they are on another queue, and not before it has been issued, ``issue_s`` after the operator issued before it.
    """
    return _Machine(tasks, queues, before, concurrency).run()


class _Machine:
    def __init__(
        self, tasks: Sequence[Task], queues: Sequence[str], before: Sequence[Sequence[int]], concurrency: Concurrency
    ) -> None:
        self.tasks, self.queues, self.before, self.concurrency = tasks, queues, before, concurrency
        self.start = [0.0] * len(tasks)
        self.finish = [math.inf] * len(tasks)
        self.issued = self._issue()
        self.waiting: dict[str, list[int]] = {}
        for step in range(len(tasks) - 1, -1, -1):
            if tasks[step].receives:
                self.finish[step] = 0.0
            elif not tasks[step].returns:
                self.waiting.setdefault(queues[step], []).append(step)
        self.launching: dict[str, int] = {}  # by queue
        self.running: dict[str, tuple[int, float]] = {}  # by queue: the step and what is left of its body
        self.now = 0.0

    def _issue(self) -> list[float]:
        times, count = [], 0
        for task in self.tasks:
            times.append(count * self.concurrency.issue_s)
            count += task.computes
        return times

    def run(self) -> list[tuple[float, float]]:
        while self.waiting or self.launching or self.running:
            self._start()
            slowdown = max(1.0, math.fsum(self.tasks[step].share for step, _ in self.running.values()))
            slower = {queue: slowdown if self.tasks[step].share else 1.0 for queue, (step, _) in self.running.items()}
            moments = [self._launched(step) for step in self.launching.values()]
            moments += [self.now + left * slower[queue] for queue, (_, left) in self.running.items()]
            self._advance(min(moments), slower)
        end = max((finish for finish in self.finish if finish < math.inf), default=0.0)
        for step, task in enumerate(self.tasks):
            if task.returns:
                self.start[step] = self.finish[step] = end
        return list(zip(self.start, self.finish, strict=True))

    def _advance(self, then: float, slower: Mapping[str, float]) -> None:
        """Let what runs go on until ``then``, when something is launched or done."""
        for queue, (step, left) in list(self.running.items()):
            if self.now + left * slower[queue] <= then:
                self.finish[step] = then
                del self.running[queue]
            else:
                self.running[queue] = (step, left - (then - self.now) / slower[queue])
        self.now = then
        for queue, step in list(self.launching.items()):
            if self._launched(step) <= then:
                del self.launching[queue]
                self.running[queue] = (step, self.tasks[step].body_s)

    def _launched(self, step: int) -> float:
        return self.start[step] + self.tasks[step].launch_s

    def _start(self) -> None:
        """Let every queue that has nothing to do take its next step, if the steps before that are done."""
        for queue in list(self.waiting):
            if queue in self.launching or queue in self.running:
                continue
            step = self.waiting[queue][-1]
            ready = max(self.now, self.issued[step])
            for other in self.before[step]:
                away = self.queues[other] != queue and not self.tasks[other].receives
                ready = max(ready, self.finish[other] + (self.concurrency.event_s if away else 0.0))
            if ready < math.inf:
                self.start[step] = ready
                self.launching[queue] = step
                self.waiting[queue].pop()
                if not self.waiting[queue]:
                    del self.waiting[queue]
