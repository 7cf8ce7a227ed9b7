"""An overlap problem as arrays, for what is compiled by numba; made once for each problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from .problem import Mode, Problem

__all__ = ["Arrays", "Booleans", "Floats", "Integers", "arrays_of"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


class Arrays(NamedTuple):
    """``*_begin`` hold, by task or by mode, where its entries begin in the list of the same name (compressed rows).

    Modes are numbered through: those of task ``i`` are ``mode_begin[i]`` to ``mode_begin[i + 1]``. ``needs`` is by mode
    and resource, ``costs`` holds ``issue_s`` and ``event_s``, ``computes`` says of each lane whether something other
    than a collective runs on it.
    """

    lane: Integers
    collective: Booleans
    launches: Integers
    allocates: Integers
    before_begin: Integers
    before: Integers
    frees_begin: Integers
    frees: Integers
    mode_begin: Integers
    seconds: Floats
    fixed: Booleans
    needs: Floats
    absorbs_begin: Integers
    absorbs: Integers
    computes: Booleans
    costs: Floats


def _rows(lists: Iterable[Sequence[int]]) -> tuple[Integers, Integers]:
    entries = [tuple(entry) for entry in lists]
    begin = np.zeros(len(entries) + 1, np.int64)
    np.cumsum([len(entry) for entry in entries], out=begin[1:])
    return begin, np.array([value for entry in entries for value in entry], np.int64)


def arrays_of(problem: Problem) -> Arrays:
    """The problem's arrays. Raises InternalError for a problem that contradicts itself, naming the task."""
    _check(problem)
    tasks = problem.tasks
    lanes = {name: number for number, name in enumerate(dict.fromkeys(task.lane for task in tasks))}
    modes = [mode for task in tasks for mode in task.modes]
    resources = {name: number for number, name in enumerate(sorted({name for mode in modes for name in mode.needs}))}
    needs = np.zeros((len(modes), len(resources)))
    for row, mode in enumerate(modes):
        for name, share in mode.needs.items():
            needs[row, resources[name]] = share
    computes = np.zeros(len(lanes), np.bool_)
    for task in tasks:
        computes[lanes[task.lane]] |= task.collective is None
    return Arrays(
        np.array([lanes[task.lane] for task in tasks], np.int64),
        np.array([task.collective is not None for task in tasks], np.bool_),
        np.array([task.launches for task in tasks], np.int64),
        np.array([task.allocates_bytes for task in tasks], np.int64),
        *_rows(task.before for task in tasks),
        *_rows(task.frees for task in tasks),
        _rows(tuple(range(len(task.modes))) for task in tasks)[0],
        np.array([mode.seconds for mode in modes], np.float64),
        np.array([mode.fixed for mode in modes], np.bool_),
        needs,
        *_rows(mode.absorbs for mode in modes),
        computes,
        np.array([problem.issue_s, problem.event_s], np.float64),
    )


def _check(problem: Problem) -> None:
    count = len(problem.tasks)
    for index, task in enumerate(problem.tasks):
        wrong = ""
        if not task.modes or not 0 <= task.given_mode < len(task.modes):
            wrong = f"has {len(task.modes)} modes, of which number {task.given_mode} is given"
        elif any(not 0 <= other < index for other in task.before):
            wrong = f"is task {index} and waits for {list(task.before)}; only earlier ones can be waited for"
        elif any(not 0 <= other < count for other in task.frees):
            wrong = f"frees {list(task.frees)} of {count} tasks"
        elif task.launches < 0 or task.allocates_bytes < 0:
            wrong = f"has {task.launches} launches and allocates {task.allocates_bytes} bytes; both are at least 0"
        elif task.modes[task.given_mode].absorbs:
            wrong = f"is given in mode {task.modes[task.given_mode].name!r}, which absorbs other tasks"
        else:
            wrong = next(filter(None, (_wrong(mode, index, count) for mode in task.modes)), "")
        if wrong:
            raise InternalError(f"task {task.name!r} of an overlap problem {wrong}", hint="please report this")
    if not (0 <= problem.issue_s < np.inf and 0 <= problem.event_s < np.inf):
        raise InternalError(
            f"an overlap problem has issue_s = {problem.issue_s} and event_s = {problem.event_s}; expected 0 or more",
            hint="please report this",
        )


def _wrong(mode: Mode, index: int, count: int) -> str:
    if not 0 <= mode.seconds < np.inf:
        return f"takes {mode.seconds} seconds in mode {mode.name!r}; expected 0 or more, and finite"
    if any(not 0 < share <= 1 for share in mode.needs.values()):
        return f"needs {dict(mode.needs)} in mode {mode.name!r}; expected fractions above 0, up to 1"
    if any(not index < other < count for other in mode.absorbs):
        return f"is task {index} and absorbs {list(mode.absorbs)} in mode {mode.name!r}; expected later ones"
    return ""
