"""Later heads, as a rank does one thing at a time: all that comes before a task on its rank has to be done by then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ._lines import Line

__all__ = ["Pressing", "pressing_of"]

Integers = npt.NDArray[np.int64]

_MOST_CELLS = 3_000_000  # of all lines' tables together: about a tenth of a second for each time that heads are pressed


def pressing_of(lines: Sequence[Line]) -> Pressing | None:
    """``None`` where there are so many microbatches and ranks that it would take long."""
    machines: dict[tuple[int, bool], int] = {}
    for line in lines:
        machines[line.machine] = machines.get(line.machine, 0) + line.count
    cells = sum(line.count * machines[line.machine] for line in lines)
    return Pressing(lines) if cells <= _MOST_CELLS else None


class Pressing:
    """What comes before the n-th of each line on its own machine: of other lines all up to some number before n."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.before: list[list[tuple[int, int]]] = []  # by line: (line of its machine, offset)
        for index, line in enumerate(lines):
            own = [
                (other, offset)
                for other, offset in _offsets(lines, index).items()
                if lines[other].machine == line.machine and lines[other].duration
            ]
            self.before.append(own)

    def pressed(self, starts: list[Integers], index: int) -> Integers:
        """The earliest starts of a line, by what has to be done on its machine before each.

        What starts at some time or later takes its whole work from then on, whatever is done in which order.
        """
        before = self.before[index]
        if not before:
            return starts[index]
        head = np.concatenate([starts[other] for other, _ in before])
        work = np.concatenate([np.full(self.lines[other].count, self.lines[other].duration) for other, _ in before])
        number = np.concatenate([np.arange(self.lines[other].count) + offset for other, offset in before])
        order = np.argsort(-head, kind="stable")
        head, work, number = head[order], work[order], number[order]
        there = number[None, :] <= np.arange(self.lines[index].count)[:, None]
        ends = np.where(there, head[None, :] + np.cumsum(work[None, :] * there, axis=1), starts[index][:, None])
        found: Integers = np.maximum(starts[index], ends.max(axis=1))
        return found


def _offsets(lines: Sequence[Line], target: int) -> dict[int, int]:
    """By line, the least offset with which it comes before ``target``; its own is 1, as its n-1-th does."""
    least = {target: 0}
    waiting = [target]
    while waiting:
        index = waiting.pop()
        for edge in lines[index].edges:
            offset = least[index] + edge.offset
            if edge.before not in least or offset < least[edge.before]:
                least[edge.before] = offset
                waiting.append(edge.before)
    least[target] = 1
    return least
