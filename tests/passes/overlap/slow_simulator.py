"""A second simulator of overlap schedules, written from the rules and not from the first: exact, and very slow.

At every moment it asks of every task whether it may start, going through all tasks issued before it; rates and moments
are fractions, so that two things at one moment are at one moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from opweave.passes.overlap.problem import Problem

__all__ = ["replay"]

Span = tuple[Fraction, Fraction]


class _Replay:
    def __init__(
        self,
        problem: Problem,
        order: Sequence[int],
        modes: Sequence[int],
        waits: Sequence[tuple[int, int]],
        streams: bool,
    ) -> None:
        self.problem, self.tasks, self.order, self.waits = problem, problem.tasks, order, waits
        self.streams = streams
        self.mode = [task.modes[number] for task, number in zip(self.tasks, modes, strict=True)]
        self.owner = {other: index for index, mode in enumerate(self.mode) for other in mode.absorbs}
        self.computing = {task.lane for task in self.tasks if task.collective is None}
        self.start: dict[int, Fraction] = {}
        self.finish: dict[int, Fraction] = {}
        self.left = {index: Fraction(mode.seconds) for index, mode in enumerate(self.mode)}

    def lane(self, index: int) -> str:
        return self.tasks[self.owner.get(index, index)].lane

    def needed(self, index: int) -> set[int]:
        """What ``index`` waits for, wherever that runs."""
        needed = set(self.tasks[index].before) | {first for first, then in self.waits if then == index}
        for absorbed in self.mode[index].absorbs:
            needed |= {b for b in self.tasks[absorbed].before if b != index and self.owner.get(b) != index}
        if not self.streams or index in self.owner:
            return needed
        ahead = self.order[: list(self.order).index(index)]
        if self.tasks[index].collective is not None:
            return needed | {
                i for i in ahead if self.tasks[i].collective is None and i not in self.owner
            }  # the stream that it is started from
        for other in ahead:
            if self.tasks[other].collective is not None:
                operands = {self.owner.get(b, b) for b in self.tasks[other].before}
                needed |= {b for b in operands if self.tasks[b].collective is not None}
        return needed

    def earliest(self, index: int) -> Fraction | None:
        """When ``index`` may start, None while that is not known."""
        ahead = self.order[: list(self.order).index(index)]
        moment = Fraction(0)
        if index not in self.owner:
            launches = sum(self.tasks[i].launches for i in ahead if i not in self.owner)
            moment = launches * Fraction(self.problem.issue_s)
            for other in ahead:
                if other not in self.owner and self.lane(other) == self.lane(index):
                    if other not in self.finish:
                        return None
                    moment = max(moment, self.finish[other])
        for other in self.needed(index):
            if other not in self.finish:
                return None
            away = self.lane(other) != self.lane(index)
            moment = max(moment, self.finish[other] + (Fraction(self.problem.event_s) if away else 0))
        return moment

    def total(self, resource: str, tasks: Sequence[int]) -> Fraction:
        return sum((Fraction(self.mode[i].needs.get(resource, 0)) for i in tasks), Fraction(0))

    def rates(self, running: Sequence[int]) -> dict[int, Fraction]:
        names = {name for index in running for name in self.mode[index].needs}
        fixed = {r: self.total(r, [i for i in running if self.mode[i].fixed]) for r in names}
        rates: dict[int, Fraction] = {}
        for index in running:
            if self.mode[index].fixed:
                worst = max([Fraction(1), *(fixed[r] for r in self.mode[index].needs)])
                rates[index] = 1 / worst
        left = {r: 1 - sum((self.total(r, [i]) * v for i, v in rates.items()), Fraction(0)) for r in names}
        for index in running:
            if not self.mode[index].fixed:
                shares = [Fraction(1)]
                for r in self.mode[index].needs:
                    shares.append(left[r] / self.total(r, [i for i in running if not self.mode[i].fixed]))
                rates[index] = min(shares)
        return rates

    def run(self) -> list[Span]:
        now = Fraction(0)
        while len(self.finish) < len(self.tasks):
            unfinished = [i for i in self.start if i not in self.finish]
            moments = {i: self.earliest(i) for i in self.order if i not in self.start}
            due = [i for i, moment in moments.items() if moment is not None and moment <= now]
            if due:
                for index in due:
                    self.start[index] = now
                    if index in self.owner:
                        self.finish[index] = now
                continue
            ended = [i for i in unfinished if self.left[i] == 0]
            if ended:
                self.finish[ended[0]] = now
                continue
            rates = self.rates(unfinished)
            later = [moment for moment in moments.values() if moment is not None]
            later += [now + self.left[i] / rate for i, rate in rates.items() if rate > 0]
            then = min(later)
            for index, rate in rates.items():
                self.left[index] -= rate * (then - now)
            now = then
        return [(self.start[i], self.finish[i]) for i in range(len(self.tasks))]


def replay(
    problem: Problem,
    order: Sequence[int],
    modes: Sequence[int],
    waits: Sequence[tuple[int, int]] = (),
    streams: bool = True,
) -> list[Span]:
    """Start and finish of each task, by its index."""
    return _Replay(problem, order, modes, waits, streams).run()
