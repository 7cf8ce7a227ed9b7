"""A timed plan as a Chrome trace: open it in ui.perfetto.dev or chrome://tracing.

The format is the "JSON object format" of Google's *Trace Event Format*: one thread an engine, a complete event
(``ph: X``) an instruction, a counter (``C``) of the bytes held in the scratchpad, and a flow arrow (``s``, ``f``) from
each load to the first operator that uses what it brought. ``ts`` and ``dur`` are microseconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import msgspec

from ...errors import PlanError
from ..plan import Plan, Residence
from .view import Bar, bars, is_timed, live_over_time

__all__ = ["chrome_trace", "microseconds"]

_PROCESS = 1
_LATEST_S = 9e9  # readers count nanoseconds in 64 bits; later times are a faulty plan's
_Event = dict[str, object]


def chrome_trace(plan: Plan) -> bytes:
    """The trace as JSON.

    Raises:
        PlanError: the plan has no times yet.
    """
    if not is_timed(plan):
        raise PlanError(
            "a trace needs a start and a finish for every instruction, which this plan does not have",
            hint="simulate the plan first",
        )
    tracer = _Tracer(plan, bars(plan))
    document = {
        "displayTimeUnit": "ns",
        "otherData": {"model": plan.graph.name, "machine": plan.machine.name},
        "traceEvents": [*tracer.names(), *tracer.slices(), *tracer.counter(), *tracer.arrows()],
    }
    return msgspec.json.encode(document)


@dataclass(frozen=True)
class _Tracer:
    plan: Plan
    bars: tuple[Bar, ...]

    @cached_property
    def thread(self) -> dict[str, int]:
        """Thread number of each engine, the machine's own first."""
        described = [engine.name for engine in self.plan.machine.engines]
        others = sorted({bar.engine for bar in self.bars} - set(described))
        return {name: position + 1 for position, name in enumerate((*described, *others))}

    @cached_property
    def touches(self) -> dict[str, tuple[str, ...]]:
        """Buffers each operator reads or writes, by the operator's name."""
        graph = self.plan.graph
        return {op.name: touched for op, touched in zip(graph.ops, graph.touches, strict=True)}

    @cached_property
    def residences(self) -> dict[str, list[Residence]]:
        """Residences by buffer, in order of their first step."""
        result: dict[str, list[Residence]] = {}
        for residence in sorted(self.plan.residences or (), key=lambda r: r.begin):
            result.setdefault(residence.buffer, []).append(residence)
        return result

    def names(self) -> list[_Event]:
        """Metadata: what the process and its threads are called and how they are sorted."""
        events = [_metadata(0, "process_name", name=f"{self.plan.graph.name} on {self.plan.machine.name}")]
        for name, tid in self.thread.items():
            events.append(_metadata(tid, "thread_name", name=name))
            events.append(_metadata(tid, "thread_sort_index", sort_index=tid))
        return events

    def slices(self) -> list[_Event]:
        """A complete event for every instruction."""
        ops = {op.name: op for op in self.plan.graph.ops}
        events: list[_Event] = []
        for bar in self.bars:
            arguments: _Event = {
                "step": bar.step,
                "traffic_bytes": bar.nbytes,
                "additional_bytes": bar.additional_bytes,
            }
            op = ops.get(bar.subject) if bar.executes else None
            if op is not None:
                arguments |= {"inputs": op.inputs, "outputs": op.outputs, "flops": op.flops, "call": op.body}
            arguments["offset_bytes"] = self._offsets(bar)
            name = bar.subject if bar.kind == "run" else f"{bar.kind} {bar.subject}"
            begin, end = _nanoseconds(bar.start_s), _nanoseconds(bar.finish_s)
            times = {"ts": microseconds(begin), "dur": microseconds(end - begin)}
            event = {"ph": "X", "name": name, "cat": bar.kind, **times}
            events.append({**event, "pid": _PROCESS, "tid": self.thread[bar.engine], "args": arguments})
        return events

    def counter(self) -> list[_Event]:
        """The bytes held in the scratchpad, at every change."""
        shared: _Event = {"ph": "C", "pid": _PROCESS, "name": f"bytes held in {self.plan.machine.scratchpad}"}
        return [
            {**shared, "ts": microseconds(_nanoseconds(t)), "args": {"bytes": held}}
            for t, held in live_over_time(self.plan)
        ]

    def arrows(self) -> list[_Event]:
        """From each load to the first operator that uses the buffer."""
        events: list[_Event] = []
        waiting: dict[str, Bar] = {}
        for bar in self.bars:
            if bar.kind == "load":
                waiting[bar.subject] = bar
                continue
            for buffer in self.touches.get(bar.subject, ()) if bar.executes else ():
                load = waiting.pop(buffer, None)
                if load is not None:
                    events += self._arrow(load, bar)
        return events

    def _arrow(self, load: Bar, run: Bar) -> tuple[_Event, _Event]:
        shared = {"pid": _PROCESS, "name": "operand", "cat": "operand", "id": load.step}
        # A flow binds to the slice around its time; the middle of the load lies inside it even after rounding.
        middle = microseconds(_nanoseconds(((load.start_s or 0.0) + (load.finish_s or 0.0)) / 2))
        begin = microseconds(_nanoseconds(run.start_s))
        return (
            {"ph": "s", "tid": self.thread[load.engine], "ts": middle, **shared},
            {"ph": "f", "bp": "e", "tid": self.thread[run.engine], "ts": begin, **shared},
        )

    def _offsets(self, bar: Bar) -> dict[str, int]:
        """Where the instruction's resident buffers lie while it runs."""
        buffers = self.touches.get(bar.subject, ()) if bar.executes else (bar.subject,)
        found: dict[str, int] = {}
        for buffer in buffers:
            spans = self.residences.get(buffer, [])
            position = bisect_right(spans, bar.step, key=lambda r: r.begin) - 1
            if position >= 0 and bar.step < spans[position].end:
                offset = spans[position].offset
                if offset is not None:
                    found[buffer] = offset
        return found


def _metadata(tid: int, kind: str, **arguments: object) -> _Event:
    return {"ph": "M", "pid": _PROCESS, "tid": tid, "name": kind, "args": arguments}


def _nanoseconds(seconds: float | None) -> int:
    return round(min(seconds or 0.0, _LATEST_S) * 1e9)


def microseconds(nanoseconds: int) -> float:
    """The least number of microseconds that a reader who multiplies by 1000 and truncates takes for ``nanoseconds``.

    Perfetto does so, and drops a slice that begins a nanosecond before the one in front of it ends.
    """
    value = nanoseconds / 1000
    while int(value * 1000) < nanoseconds:
        value = math.nextafter(value, math.inf)
    return value
