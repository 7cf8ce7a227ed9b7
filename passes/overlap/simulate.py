"""When each task starts and finishes, given the order of issue and the modes: an event-driven fluid evaluation.

* Each lane runs its tasks one at a time, in the order of issue.
* The host issues launches ``issue_s`` apart, from time 0, and waits for nobody: a task starts when its first launch has
  been issued at the earliest.
* A task waits for the tasks ``before`` it and for those named by ``waits``; ``event_s`` more if on another lane.
* With ``streams``, a collective also waits for whatever was issued before it on the lanes that compute, as NCCL's
  stream waits for the stream that it is started from. So where a start stands in the order matters. One that takes the
  result of another collective is started behind that one's wait, and so is what is issued to those lanes from then on.
* What runs shares the resources. Fixed modes take their needs first (in proportion, where they need more than there
  is); each other task goes on at the rate that the scarcest of its resources leaves it.
* Bytes live from the start of the task that allocates them until all that free them are done; a task that starts at
  the moment when another is done finds that one's bytes free. What no task frees stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import InternalError, OptionError
from ._machine import ABSORBED_WRONGLY, BEFORE_OPERAND, STUCK, play
from .arrays import Arrays, Integers, arrays_of
from .problem import Problem, Schedule

__all__ = ["Indices", "Simulator", "Waits", "given_modes", "synchronous_waits", "timed"]

Indices = Sequence[int] | Integers
Waits = Sequence[tuple[int, int]] | Integers


class Simulator:
    """Evaluates schedules of one problem; ``streams`` as the module says."""

    def __init__(self, problem: Problem, *, streams: bool = True) -> None:
        self.problem, self.streams = problem, streams
        self.arrays: Arrays = arrays_of(problem)

    def measure(self, order: Indices, modes: Indices, waits: Waits = ()) -> tuple[float, int]:
        """Makespan in seconds and peak bytes; an infinite makespan for an order that puts a task before its operand."""
        played = play(self.arrays, *self._as_arrays(order, modes, waits), self.streams)
        return float(played[1]), int(played[2])

    def timed(self, order: Indices, modes: Indices, waits: Waits = ()) -> Schedule:
        """The schedule, with times and peak bytes.

        Raises:
            OptionError: ``order`` is no permutation of the tasks, puts one before an operand, or there is no such mode.
        """
        self._check(order, modes, waits)
        code, _, peak, start, finish, task = play(self.arrays, *self._as_arrays(order, modes, waits), self.streams)
        name = self.problem.tasks[task].name if self.problem.tasks else ""
        if code == BEFORE_OPERAND:
            raise OptionError(f"the order puts {name!r} before a task that it waits for", hint="keep operands first")
        if code == ABSORBED_WRONGLY:
            raise OptionError(f"task {name!r} is absorbed twice, or is a collective", hint="choose other modes")
        if code == STUCK:
            raise InternalError("the simulation of a schedule does not go on", hint="please report this")
        return Schedule(
            self.problem,
            tuple(int(i) for i in order),
            tuple(int(m) for m in modes),
            tuple(start.tolist()),
            tuple(finish.tolist()),
            peak_bytes=int(peak),
            waits=tuple((int(first), int(then)) for first, then in waits),
        )

    def _as_arrays(self, order: Indices, modes: Indices, waits: Waits) -> tuple[Integers, Integers, Integers]:
        pairs = np.asarray(waits, np.int64).reshape(-1, 2)
        return np.asarray(order, np.int64), np.asarray(modes, np.int64), pairs

    def _check(self, order: Indices, modes: Indices, waits: Waits) -> None:
        tasks = self.problem.tasks
        if sorted(order) != list(range(len(tasks))):
            raise OptionError(f"the order names {len(order)} tasks; expected each of the {len(tasks)} once")
        if len(modes) != len(tasks):
            raise OptionError(f"{len(modes)} modes were given for {len(tasks)} tasks")
        for task, mode in zip(tasks, modes, strict=True):
            if not 0 <= mode < len(task.modes):
                raise OptionError(f"task {task.name!r} has no mode {mode}; it has {len(task.modes)}")
        if any(not 0 <= index < len(tasks) for pair in waits for index in pair):
            raise OptionError(f"waits name tasks outside 0 to {len(tasks) - 1}: {list(waits)}")


def timed(
    problem: Problem, order: Sequence[int], modes: Sequence[int], *, waits: Waits = (), streams: bool = True
) -> Schedule:
    """The schedule that issues ``order`` in ``modes``, with times in seconds and its peak in bytes.

    Raises:
        OptionError: ``order`` is no permutation of the tasks, puts one before an operand, or there is no such mode.
        InternalError: the problem contradicts itself.
    """
    return Simulator(problem, streams=streams).timed(order, modes, waits)


def given_modes(problem: Problem) -> tuple[int, ...]:
    """The modes in which the program does its tasks if nothing is decided."""
    return tuple(task.given_mode for task in problem.tasks)


def synchronous_waits(problem: Problem, order: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Waits that make each collective block all that is issued behind it, as a program that waits at once does."""
    waits: list[tuple[int, int]] = []
    last: int | None = None
    fresh: set[str] = set()
    for index in order:
        task = problem.tasks[index]
        if last is not None and task.lane not in fresh:
            waits.append((last, index))
            fresh.add(task.lane)
        if task.collective is not None:
            last, fresh = index, set()
    return tuple(waits)
