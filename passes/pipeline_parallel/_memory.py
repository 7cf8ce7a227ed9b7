"""What is held on a rank, from the start of which line's n-th until the end of which."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipelining.schedule import ActionKind
from ._lines import Lines

__all__ = ["Held", "held_by"]


@dataclass(frozen=True)
class Held:
    """``bytes`` from the start of the n-th of line ``since`` until the end of the n-th of line ``until``.

    ``between`` says that they are held between I and W, and so not at all by a whole backward. ``key`` is the route and
    stage; the stage is -1 for shards of the vocabulary.
    """

    since: int
    until: int
    bytes: int
    key: tuple[int, int]
    between: bool = False


def held_by(lines: Lines, rank: int) -> tuple[Held, ...]:
    """All that comes and goes on ``rank``; what takes no bytes is left out."""
    index = {(line.task.route, line.task.kind, line.task.stage): place for place, line in enumerate(lines.lines)}
    found: list[Held] = []
    for (route, kind, number), place in index.items():
        if lines.lines[place].task.rank != rank:
            continue
        if kind is ActionKind.OUTPUT:
            assert lines.problem.vocabulary is not None
            until = index[route, ActionKind.OUTPUT_GRADIENT, number]
            found.append(Held(place, until, lines.problem.vocabulary.shard_bytes, (route, -1)))
        if kind is not ActionKind.FORWARD:
            continue
        stage, key = lines.problem.stages[number], (route, number)
        gradient, weight = (index[route, half, number] for half in _HALVES)
        found.append(Held(place, gradient, stage.until_input_gradient_bytes, key))
        found.append(Held(place, weight, stage.until_weight_gradient_bytes - stage.offloaded_bytes, key))
        found.append(Held(gradient, weight, stage.between_gradients_bytes, key, between=True))
        if stage.offloaded_bytes:
            gone, back = (index[route, copy, number] for copy in (ActionKind.OFFLOAD, ActionKind.RELOAD))
            found.append(Held(place, gone, stage.offloaded_bytes, key))
            found.append(Held(back, weight, stage.offloaded_bytes, key))
    return tuple(item for item in found if item.bytes)


_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
