"""What happens in a schedule beside its actions: messages between ranks, waits for them, and the bytes held.

Counted here from ``tasks_of`` once more, so that a picture never shows what the simulator did not time: the highest
point of a curve is the simulator's peak, and tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ...pipelining.schedule import Action, ActionKind, TimedSchedule
from ...pipelining.tasks import Task, tasks_of

__all__ = ["Curve", "Message", "Moves"]

_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
_SHARDS = (ActionKind.OUTPUT, ActionKind.OUTPUT_GRADIENT)

#: Times at which the bytes held change, each with the bytes from then on; times may repeat, where bytes come and go.
Curve = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """An activation, or its gradient, on its way from the end of ``sent`` to the rank of ``needed``."""

    sent: Action
    needed: Action
    sender: int
    receiver: int
    leaves_ns: int
    arrives_ns: int
    nbytes: int


@dataclass(frozen=True)
class Moves:
    """What ``timed`` moves, holds and waits for."""

    timed: TimedSchedule

    @cached_property
    def tasks(self) -> tuple[tuple[Task, ...], ...]:
        """Tasks of a microbatch, by route."""
        problem = self.timed.schedule.problem
        return tuple(tasks_of(problem, route) for route in range(len(problem.routes)))

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """From rank to rank along the routes, in the order in which they leave.

        What shards of a vocabulary exchange is left out: those are collectives, of which the problem has no sizes.
        """
        stages = self.timed.schedule.problem.stages
        found = []
        for action, rank, _, _ in self._placed():
            for task, before, lag in self._after(action):
                if not {task.kind, before.kind}.isdisjoint(_SHARDS) or stages[before.stage].rank == rank:
                    continue
                sender, forward = stages[before.stage], before.kind is ActionKind.FORWARD
                leaves = self._finish[before]
                nbytes = sender.forward_bytes if forward else sender.backward_bytes
                whole = self._doing[before]
                found.append(Message(whole, action, sender.rank, rank, leaves, leaves + lag, nbytes))
        return tuple(sorted(found, key=lambda m: (m.leaves_ns, m.sender, m.receiver, m.sent)))

    @cached_property
    def waits_ns(self) -> tuple[int, ...]:
        """By rank, how much of its idle time would be gone if transfers took no time and nothing else moved."""
        waits = []
        for order, starts, finishes in self._rows():
            free = wait = 0
            for action, start, finish in zip(order, starts, finishes, strict=True):
                if action.kind.copies:
                    continue
                at_once = max((self._finish[before] for _, before, _ in self._after(action)), default=0)
                lagged = max((self._finish[before] + lag for _, before, lag in self._after(action)), default=0)
                wait += max(0, min(start, lagged) - max(free, at_once))
                free = finish
            waits.append(wait)
        return tuple(waits)

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """By rank, the bytes held over time, resident ones included; the first point is at 0."""
        curves = []
        for rank, (order, starts, finishes) in enumerate(self._rows()):
            held = self.timed.schedule.problem.resident_bytes[rank]
            changes: list[tuple[int, int, int]] = []
            for place, (action, start, finish) in enumerate(zip(order, starts, finishes, strict=True)):
                allocates, frees = self._bytes(action)
                changes += [(start, place, allocates)] if allocates else []
                changes += [(finish, place, -frees)] if frees else []
            points = [(0, held)]
            for time, _, change in sorted(changes, key=lambda change: change[:2]):
                held += change
                points.append((time, held))
            curves.append(tuple(points))
        return tuple(curves)

    def start_of(self, action: Action) -> int:
        """When ``action`` starts."""
        return self._start[action]

    @cached_property
    def _start(self) -> dict[Action, int]:
        return {action: start for action, _, start, _ in self._placed()}

    def _rows(self) -> Iterator[tuple[tuple[Action, ...], tuple[int, ...], tuple[int, ...]]]:
        return zip(self.timed.schedule.orders, self.timed.starts, self.timed.finishes, strict=True)

    def _placed(self) -> Iterator[tuple[Action, int, int, int]]:
        for rank, (order, starts, finishes) in enumerate(self._rows()):
            for action, start, finish in zip(order, starts, finishes, strict=True):
                yield action, rank, start, finish

    @cached_property
    def _doing(self) -> dict[Action, Action]:
        """The action in which each task, a half of a backward for one, is done."""
        return {half: action for action, *_ in self._placed() for half in _halves(action)}

    @cached_property
    def _finish(self) -> dict[Action, int]:
        return {half: finish for action, _, _, finish in self._placed() for half in _halves(action)}

    @cached_property
    def _task(self) -> tuple[dict[tuple[ActionKind, int], Task], ...]:
        return tuple({(task.kind, task.stage): task for task in tasks} for tasks in self.tasks)

    def _of(self, action: Action) -> Task:
        return self._task[self.timed.schedule.problem.route_of[action.microbatch]][action.kind, action.stage]

    def _after(self, action: Action) -> Iterator[tuple[Task, Action, int]]:
        """What ``action`` follows, outside of itself, with the task that does and the time that passes between."""
        tasks = self.tasks[self.timed.schedule.problem.route_of[action.microbatch]]
        halves = _halves(action)
        for half in halves:
            for index, lag in self._of(half).after:
                before = Action(tasks[index].stage, tasks[index].kind, action.microbatch)
                if before not in halves:
                    yield self._of(half), before, lag

    def _bytes(self, action: Action) -> tuple[int, int]:
        """What ``action`` allocates at its start and frees at its end."""
        if action.kind is ActionKind.BACKWARD:
            stage = self.timed.schedule.problem.stages[action.stage]
            return 0, stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes
        return self._of(action).allocates_bytes, self._of(action).frees_bytes


def _halves(action: Action) -> tuple[Action, ...]:
    if action.kind is not ActionKind.BACKWARD:
        return (action,)
    return tuple(Action(action.stage, kind, action.microbatch) for kind in _HALVES)
