"""What a rank can do before the first microbatch is back, and while it waits for the last: only what memory holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...compiler.pipelining.problem import Stage
from ...compiler.pipelining.schedule import ActionKind
from ._heads import Times
from ._lines import Lines
from ._waits import room_of

__all__ = ["phases"]


@dataclass(frozen=True)
class _Share:
    """A stage of the rank: its lines; what a microbatch holds until I, until W at least, and while W alone is left."""

    forward: int
    gradient: int
    weight: int
    first: int
    second: int
    pending: int


def phases(lines: Lines, starts: Times, behind: Times, rank: int) -> int:
    """The least end of what ``rank`` does if the room that it has lets it idle first and last; 0 where it does not.

    Until the first I of the rank it does nothing but F, no more than its room holds at a time. At the start of the last
    F of the rank's last stage all its other F are done, and of I and W remains no more than belongs to what is held
    then; the longest chain behind that F is still to come.
    """
    problem = lines.problem
    room = room_of(problem, rank)
    if room is None or len(problem.routes) != 1 or problem.vocabulary is not None:
        return 0
    shares = _shares(lines, rank)
    if not shares:
        return 0
    own = [index for share in shares for index in (share.forward, share.gradient, share.weight)]
    last, first = shares[-1].forward, min(int(starts[share.gradient][0]) for share in shares)
    done = _done(lines, starts, own, min(int(starts[last][-1]), first))
    everything = done
    most = _most_forward(lines, shares, room)
    if most is not None:
        later = first - most + sum(_work(lines, index) for index in own)
        everything = max(everything, later)
        if most < sum(_work(lines, share.forward) for share in shares):  # so that some F, the last too, is later
            done = max(done, later)
    least = everything + min(int(behind[index][-1]) for index in own)
    remaining = _most_remaining(lines, shares, room - problem.stages[lines.lines[last].task.stage].offloaded_bytes)
    return least if remaining is None else max(least, done - remaining + int(behind[last][-1]))


def _work(lines: Lines, index: int) -> int:
    return lines.lines[index].duration * lines.lines[index].count


def _shares(lines: Lines, rank: int) -> list[_Share]:
    """Of the stages of ``rank`` in the route's order."""
    index = {(line.task.kind, line.task.stage): place for place, line in enumerate(lines.lines)}
    found = []
    for number in lines.problem.routes[0].stages:
        stage: Stage = lines.problem.stages[number]
        if stage.rank == rank:
            forward, gradient, weight = (index[kind, number] for kind in _KINDS)
            kept = stage.until_weight_gradient_bytes - stage.offloaded_bytes
            pending = stage.until_weight_gradient_bytes + stage.between_gradients_bytes
            found.append(_Share(forward, gradient, weight, stage.until_input_gradient_bytes, kept, pending))
    return found


_KINDS = (ActionKind.FORWARD, ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)


def _done(lines: Lines, starts: Times, own: list[int], latest: int) -> int:
    """The least end of all work of the rank, without what comes behind it, by those that start from one time on."""
    head = np.concatenate([starts[index] for index in own])
    work = np.concatenate([np.full(lines.lines[index].count, lines.lines[index].duration, np.int64) for index in own])
    order = np.argsort(head, kind="stable")
    head, work = head[order], work[order]
    ends = head + np.cumsum(work[::-1])[::-1]
    return int(ends[head <= latest].max())


def _most_forward(lines: Lines, shares: list[_Share], room: int) -> int | None:
    """The most work of F before the first I of the rank; ``None`` if memory does not limit it."""
    left = room - sum(share.first + share.second for share in shares)  # one microbatch has passed all its stages
    most = sum(lines.lines[share.forward].duration for share in shares)
    more = _filled([(share.first + share.second, lines.lines[share.forward].duration) for share in shares], left)
    return None if more is None else most + more


def _most_remaining(lines: Lines, shares: list[_Share], room: int) -> int | None:
    """The most work of I and W that may be left at the start of the last F; ``None`` if memory does not limit it."""
    if len(shares) == 1:
        return _of_one(lines, shares[0], room)
    left = room - sum(share.first + share.second for share in shares)  # of each stage one is open at least
    most, choices = 0, []
    for share in shares:
        gradient, weight = lines.lines[share.gradient].duration, lines.lines[share.weight].duration
        most += gradient + weight
        choices += [(share.first + share.second, gradient + weight), (share.pending, weight)]
    more = _filled(choices, left)
    return None if more is None else most + more


def _filled(choices: list[tuple[int, int]], room: int) -> int | None:
    """The most work of choices (bytes, work) that ``room`` holds, in parts too; ``None`` if work takes no bytes."""
    if any(work and not size for size, work in choices):
        return None
    return max((max(0, room) * work // size for size, work in choices if size), default=0)


def _of_one(lines: Lines, share: _Share, room: int) -> int | None:
    """Of one stage: the best number of I, each with its W, and of W alone."""
    gradient, weight = lines.lines[share.gradient].duration, lines.lines[share.weight].duration
    count = lines.lines[share.forward].count
    if not share.first + share.second:
        return None
    best = 0
    for held in range(1, count + 1):
        if held > 1 and held * (share.first + share.second) > room:
            break
        left = max(0, room - held * (share.first + share.second))
        later = left // share.pending if share.pending else count
        best = max(best, held * gradient + min(count, held + later) * weight)
    return best
