"""Schedules as a Chrome trace, for ui.perfetto.dev: a process a schedule, a thread a rank, as ``..trace`` writes plans.

Beside each rank's thread lie those of its copy engine and its network, where they have work, and a counter of the
bytes that it holds; flow arrows follow the messages between ranks. ``ts`` and ``dur`` are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ...pipelining.schedule import ActionKind
from ..trace import microseconds
from .facts import title_of
from .moves import Message, Moves

__all__ = ["WORDS", "pipeline_trace"]

_Event = dict[str, object]

#: Kinds of actions in words.
WORDS = {
    ActionKind.FORWARD: "forward",
    ActionKind.INPUT_GRADIENT: "gradient of the input",
    ActionKind.WEIGHT_GRADIENT: "gradients of the weights",
    ActionKind.BACKWARD: "whole backward",
    ActionKind.OUTPUT: "output layer, a shard",
    ActionKind.OUTPUT_GRADIENT: "gradients of the output layer, a shard",
    ActionKind.OFFLOAD: "to host memory",
    ActionKind.RELOAD: "from host memory",
}


def pipeline_trace(shown: Sequence[Moves]) -> bytes:
    """The trace of one schedule, or of several, as JSON; a unit of the problem's time counts as a nanosecond."""
    events = [event for number, moves in enumerate(shown, 1) for event in _events(number, moves)]
    names = [title_of(moves.timed.schedule.method, moves.timed.schedule.problem.name) for moves in shown]
    return msgspec.json.encode({"displayTimeUnit": "ns", "otherData": {"schedules": names}, "traceEvents": events})


def _events(process: int, moves: Moves) -> Iterator[_Event]:
    schedule = moves.timed.schedule
    title = title_of(schedule.method, schedule.problem.name)
    yield {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": title}}
    yield {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}}
    for rank in range(schedule.problem.ranks):
        yield from _threads(process, moves, rank)
        yield from _slices(process, moves, rank)
        for time, held in moves.curves[rank]:
            counter = {"ph": "C", "pid": process, "name": f"bytes held on rank {rank}", "ts": microseconds(time)}
            yield {**counter, "args": {"bytes": held}}
    for number, message in enumerate(moves.messages):
        yield from _arrow(process, number, message, moves)


def _thread(rank: int, engine: int = 0) -> int:
    """Threads of a rank: what it computes, copies and reduces."""
    return 3 * rank + engine + 1


def _threads(process: int, moves: Moves, rank: int) -> Iterator[_Event]:
    order = moves.timed.schedule.orders[rank]
    used = (True, any(a.kind.copies for a in order), bool(moves.timed.reduced and moves.timed.reduced[rank]))
    for engine, (words, there) in enumerate(zip(("", " copies", " network"), used, strict=True)):
        if there:
            shared = {"ph": "M", "pid": process, "tid": _thread(rank, engine)}
            yield {**shared, "name": "thread_name", "args": {"name": f"rank {rank}{words}"}}
            yield {**shared, "name": "thread_sort_index", "args": {"sort_index": _thread(rank, engine)}}


def _slices(process: int, moves: Moves, rank: int) -> Iterator[_Event]:
    timed = moves.timed
    for action, start, finish in zip(
        timed.schedule.orders[rank], timed.starts[rank], timed.finishes[rank], strict=True
    ):
        times = {"ts": microseconds(start), "dur": microseconds(finish - start)}
        where = {"pid": process, "tid": _thread(rank, int(action.kind.copies))}
        facts = {"stage": action.stage, "microbatch": action.microbatch, "does": WORDS[action.kind]}
        yield {"ph": "X", "name": str(action), "cat": action.kind.value, **times, **where, "args": facts}
    for stage, start, finish in timed.reduced[rank] if timed.reduced else ():
        times = {"ts": microseconds(start), "dur": microseconds(finish - start)}
        where = {"pid": process, "tid": _thread(rank, 2)}
        yield {"ph": "X", "name": f"all-reduce of stage {stage}", "cat": "all-reduce", **times, **where, "args": {}}


def _arrow(process: int, number: int, message: Message, moves: Moves) -> tuple[_Event, _Event]:
    """From inside the sending slice, its last nanosecond, to the start of the slice that needs the message."""
    shared = {"pid": process, "name": "message", "cat": "message", "id": number}
    begin = moves.start_of(message.sent)
    last = microseconds(max(begin, message.leaves_ns - 1))
    starts = microseconds(moves.start_of(message.needed))
    return (
        {"ph": "s", "tid": _thread(message.sender), "ts": last, **shared},
        {"ph": "f", "bp": "e", "tid": _thread(message.receiver), "ts": starts, **shared},
    )
