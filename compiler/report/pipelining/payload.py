"""Schedules as the page's script reads them: columns of numbers by rank, in the order in which things start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ...pipelining.schedule import ActionKind
from ..assemble import harmless
from ..palette import CAPACITY_COLOUR
from ..text import PROVERS
from .colours import COLOURS, HELD, MESSAGE, REDUCE, chunks_of, shaded
from .facts import PipelineFacts
from .moves import Moves
from .text import DIFFERENCES
from .trace import WORDS

__all__ = ["pipeline_payload"]

_KINDS = tuple(ActionKind)


def pipeline_payload(shown: Sequence[tuple[Moves, PipelineFacts]]) -> bytes:
    """JSON, safe inside a ``<script>`` element, of the schedules and all that the page tells of them."""
    chunks = max(len(stages) for moves, _ in shown for stages in moves.timed.schedule.problem.stages_of)
    document = {
        "kinds": [kind.value for kind in _KINDS],
        "words": {kind.value: WORDS[kind] for kind in _KINDS},
        "provers": PROVERS,
        "differences": DIFFERENCES,
        "palette": {
            "shades": [[shaded(COLOURS[kind], chunk, chunks) for chunk in range(chunks)] for kind in _KINDS],
            "reduce": REDUCE,
            "message": MESSAGE,
            "held": HELD,
            "limit": CAPACITY_COLOUR,
        },
        "schedules": [_schedule(moves, facts) for moves, facts in shown],
    }
    return harmless(msgspec.json.encode(document))


def _schedule(moves: Moves, facts: PipelineFacts) -> dict[str, Any]:
    timed = moves.timed
    problem = timed.schedule.problem
    return {
        "facts": facts.to_dict(),
        "stages": {"rank": [stage.rank for stage in problem.stages], "chunk": chunks_of(problem)},
        "routes": [
            {
                "first": sum(before.microbatches for before in problem.routes[:index]),
                "microbatches": route.microbatches,
                "tasks": [[_KINDS.index(t.kind), t.stage, t.rank, t.after] for t in moves.tasks[index]],
            }
            for index, route in enumerate(problem.routes)
        ],
        "rows": [_row(moves, rank) for rank in range(problem.ranks)],
        "reduced": timed.reduced or [[] for _ in range(problem.ranks)],
        "curves": [[[time for time, _ in curve], [held for _, held in curve]] for curve in moves.curves],
    }


def _row(moves: Moves, rank: int) -> dict[str, dict[str, list[int]]]:
    """What a rank computes and what it copies."""
    timed = moves.timed
    actions = list(zip(timed.schedule.orders[rank], timed.starts[rank], timed.finishes[rank], strict=True))
    columns = {}
    for name, copies in (("computes", False), ("copies", True)):
        chosen = sorted((a for a in actions if a[0].kind.copies == copies), key=lambda a: a[1:])
        columns[name] = {
            "kind": [_KINDS.index(action.kind) for action, *_ in chosen],
            "stage": [action.stage for action, *_ in chosen],
            "microbatch": [action.microbatch for action, *_ in chosen],
            "start": [start for _, start, _ in chosen],
            "finish": [finish for *_, finish in chosen],
        }
    return columns
