"""When each action of a schedule starts and ends, and what each rank holds: in order on every rank, as early as can be.

Slow and plain on purpose: methods that search have their own faster way, and are judged by this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ...errors import OptionError
from .problem import PipelineProblem
from .schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from .tasks import Task, tasks_of

__all__ = ["timed"]

_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)


def timed(schedule: PipelineSchedule) -> TimedSchedule:
    """The schedule with its times, its peak bytes, and the gradients' all-reduces at its end.

    An action starts when the rank's computing actions before it in its order are done, and what it follows is; copies
    one after the other besides. For a copy waits what follows it; and, where there is a memory limit, what allocates
    waits for as many copies out before it in the order as it takes to keep the limit. Bytes that an action frees are
    free for what starts at that moment behind it in the order. When a stage's last W is done its gradients are reduced,
    one stage of a rank at a time, while the rank goes on.

    Raises:
        OptionError: an action is missing, repeated or on a rank that does not have its stage, or the orders wait for
            each other for ever. Whether the limit is kept is for the reader of ``peak_bytes``.
    """
    clock = _Clock(schedule)
    clock.check()
    clock.find_room()
    clock.run()
    starts = tuple(tuple(clock.start[action] for action in order) for order in schedule.orders)
    finishes = tuple(tuple(clock.finish[action] for action in order) for order in schedule.orders)
    return TimedSchedule(schedule, starts, finishes, clock.peaks(), clock.reduced())


class _Clock:
    def __init__(self, schedule: PipelineSchedule) -> None:
        self.problem: PipelineProblem = schedule.problem
        self.orders = schedule.orders
        routes = [tasks_of(self.problem, route) for route in range(len(self.problem.routes))]
        self.tasks = routes
        self.task = [{(task.kind, task.stage): task for task in tasks} for tasks in routes]
        self.start: dict[Action, int] = {}
        self.finish: dict[Action, int] = {}
        self.ready: dict[Action, int] = {}  # when what an action, or a half of a whole backward, makes is there
        self.room: dict[Action, Action] = {}  # the copy out without which there is no room for an action

    def check(self) -> None:
        """Each action once, on its stage's rank; a backward either whole or in halves."""
        if len(self.orders) != self.problem.ranks:
            raise OptionError(f"the schedule has orders for {len(self.orders)} ranks; there are {self.problem.ranks}")
        missing = {
            Action(task.stage, task.kind, microbatch): task.rank
            for microbatch, route in enumerate(self.problem.route_of)
            for task in self.tasks[route]
        }
        for rank, order in enumerate(self.orders):
            for action in order:
                for half in _halves(action):
                    if missing.pop(half, None) != rank:
                        raise OptionError(f"rank {rank} does {action}, which is done already or not among its work")
        if missing:
            action, rank = next(iter(missing.items()))
            raise OptionError(f"rank {rank} never does {action}, nor {len(missing) - 1} other actions")

    def find_room(self) -> None:
        """What each action waits for to keep the limit: copies end in order, so that times do not change it."""
        limits = self.problem.memory_limit
        if limits is None or not any(stage.offloaded_bytes for stage in self.problem.stages):
            return
        for rank, order in enumerate(self.orders):
            room = limits[rank] - self.problem.resident_bytes[rank]
            leaving: deque[tuple[Action, int]] = deque()  # copies out that nothing has waited for yet
            for action in order:
                allocates, frees = self._bytes(action)
                room -= allocates
                if allocates and not action.kind.copies and room < 0 <= room + sum(size for _, size in leaving):
                    while room < 0:
                        self.room[action], size = leaving.popleft()
                        room += size
                if action.kind is ActionKind.OFFLOAD:
                    leaving.append((action, frees))
                else:
                    room += frees

    def run(self) -> None:
        positions = [0] * self.problem.ranks
        free = [0] * self.problem.ranks
        copying = [0] * self.problem.ranks
        moved = True
        while moved:
            moved = False
            for rank, order in enumerate(self.orders):
                while positions[rank] < len(order):
                    action = order[positions[rank]]
                    earliest = self._operands_ready(action)
                    if earliest is None:
                        break
                    start = max(earliest, free[rank], copying[rank] if action.kind.copies else 0)
                    finish = start + self._duration(action)
                    if action.kind.copies:
                        copying[rank] = finish
                    else:
                        free[rank] = finish
                    self.start[action], self.finish[action] = start, finish
                    self.ready |= dict.fromkeys(_halves(action), finish)
                    positions[rank] += 1
                    moved = True
        for rank, order in enumerate(self.orders):
            if positions[rank] < len(order):
                raise OptionError(
                    f"rank {rank} waits for ever to do {order[positions[rank]]}",
                    hint="the ranks' orders contradict one another, or this one puts an action before its operand",
                )

    def _task(self, action: Action) -> Task:
        return self.task[self.problem.route_of[action.microbatch]][action.kind, action.stage]

    def _operands_ready(self, action: Action) -> int | None:
        """When all that ``action`` follows is there; ``None`` while something has not been done."""
        earliest = self.ready[self.room[action]] if action in self.room else 0
        tasks = self.tasks[self.problem.route_of[action.microbatch]]
        halves = _halves(action)
        for half in halves:
            for index, lag in self._task(half).after:
                before = Action(tasks[index].stage, tasks[index].kind, action.microbatch)
                if before in halves:
                    continue
                if before not in self.ready:
                    return None
                earliest = max(earliest, self.ready[before] + lag)
        return earliest

    def _duration(self, action: Action) -> int:
        if action.kind is ActionKind.BACKWARD:
            return self.problem.stages[action.stage].whole_backward_ns
        return self._task(action).duration_ns

    def peaks(self) -> tuple[int, ...]:
        """The most bytes that each rank holds."""
        peaks = []
        for rank, order in enumerate(self.orders):
            held = most = self.problem.resident_bytes[rank]
            changes = [(*change, place) for place, action in enumerate(order) for change in self._changes(action)]
            for _, change, _ in sorted(changes, key=lambda change: (change[0], change[2])):
                held += change
                most = max(most, held)
            peaks.append(most)
        return tuple(peaks)

    def _changes(self, action: Action) -> Iterator[tuple[int, int]]:
        """When ``action`` changes what its rank holds, and by how many bytes."""
        allocates, frees = self._bytes(action)
        if allocates:
            yield self.start[action], allocates
        if frees:
            yield self.finish[action], -frees

    def _bytes(self, action: Action) -> tuple[int, int]:
        """What ``action`` allocates at its start, and frees at its end."""
        if action.kind is ActionKind.BACKWARD:
            stage = self.problem.stages[action.stage]
            return 0, stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes
        task = self._task(action)
        return task.allocates_bytes, task.frees_bytes

    def reduced(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """By rank: stage, start and finish of each all-reduce, the stage that is ready first first."""
        done: dict[int, int] = {}
        for action, finish in self.finish.items():
            if action.kind in (ActionKind.WEIGHT_GRADIENT, ActionKind.BACKWARD):
                done[action.stage] = max(finish, done.get(action.stage, 0))
        ranks = []
        for stages in self.problem.stages_of:
            free, lines = 0, []
            for stage in sorted((s for s in stages if s in done), key=lambda s: (done[s], s)):
                if self.problem.stages[stage].reduce_ns:
                    start = max(free, done[stage])
                    free = start + self.problem.stages[stage].reduce_ns
                    lines.append((stage, start, free))
            ranks.append(tuple(lines))
        return tuple(ranks)


def _halves(action: Action) -> tuple[Action, ...]:
    """A whole backward as its two halves; any other action alone."""
    if action.kind is not ActionKind.BACKWARD:
        return (action,)
    return tuple(Action(action.stage, kind, action.microbatch) for kind in _HALVES)
