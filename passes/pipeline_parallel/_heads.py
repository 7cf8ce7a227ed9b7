"""The earliest that the n-th of each line can start, and the least that comes behind it, by propagation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ._lines import Edge, Line, Lines
from ._pressed import Pressing

__all__ = ["NEVER", "Times", "heads", "mirrored"]

#: The earliest start of what nothing is known to come before; small enough that sums of times do not reach 0.
NEVER = -(1 << 60)

Times = list[npt.NDArray[np.int64]]

_MOST_PRESSINGS = 12
_MOST_ROUNDS = 600  # each is valid as it is; memory's edges lead back, by at least one microbatch a round


def heads(lines: Sequence[Line], first: Sequence[int], pressing: Pressing | None = None) -> Times:
    """By line, the earliest starts of its 0th, 1st, ...: ``first`` of each line, and what follows from the edges.

    With ``pressing``, of the same lines, also what follows from that a machine does one thing at a time.
    """
    starts = [
        start + line.duration * np.arange(line.count, dtype=np.int64) for line, start in zip(lines, first, strict=True)
    ]
    _propagate(lines, starts)
    for _ in range(_MOST_PRESSINGS if pressing is not None else 0):
        assert pressing is not None
        changed = False
        for index in range(len(lines)):
            found = pressing.pressed(starts, index)
            changed |= not np.array_equal(found, starts[index])
            starts[index] = found
        if not changed:
            break
        _propagate(lines, starts)
    return starts


def _propagate(lines: Sequence[Line], starts: Times) -> None:
    for _ in range(_MOST_ROUNDS):
        changed = False
        for index, line in enumerate(lines):
            changed |= _raised(lines, starts, index, line)
        if not changed:
            return


def _raised(lines: Sequence[Line], starts: Times, index: int, line: Line) -> bool:
    own = starts[index]
    found = own.copy()
    for edge in line.edges:
        before = lines[edge.before]
        known = starts[edge.before][: max(0, line.count - edge.offset)]
        later = found[edge.offset :]
        np.maximum(later, known + (before.duration + edge.lag), out=later)
    if line.duration:
        ramp = line.duration * np.arange(line.count, dtype=np.int64)
        found = np.maximum.accumulate(found - ramp) + ramp
    else:
        found = np.maximum.accumulate(found)
    if np.array_equal(found, own):
        return False
    starts[index] = found
    return True


def mirrored(lines: Lines) -> tuple[Line, ...]:
    """The same lines in reversed time and order: their heads are the originals' tails, both from the far end."""
    number = len(lines.lines)
    edges: list[list[Edge]] = [[] for _ in range(number)]
    for index, line in enumerate(lines.lines):
        for edge in line.edges:
            edges[edge.before].append(Edge(number - 1 - index, edge.lag, edge.offset, edge.memory))
    return tuple(
        Line(line.task, line.duration, line.count, tuple(edges[index]))
        for index, line in reversed(list(enumerate(lines.lines)))
    )
