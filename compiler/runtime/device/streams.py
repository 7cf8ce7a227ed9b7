"""Host code for streams: which step goes to which stream, and the events between them.

The first compute engine is the stream the caller is on; every other engine of the plan is a stream of the program's
own. All of these begin behind what the caller has queued, and the caller's stream goes on behind all of them.
"""

from __future__ import annotations

from typing import Any

import torch

from ....hw_models.model import EngineKind
from ...graph import OpKind
from ...plan import Run
from .layout import DevicePlan
from .order import recorded
from .program import Program

__all__ = ["Streams"]


class Streams:
    """Statements around the steps of a plan; none where one engine runs them all, or the device has no streams."""

    def __init__(self, program: Program, device_plan: DevicePlan) -> None:
        plan = device_plan.plan
        self.plan, self.waits = plan, device_plan.waits
        self.first = plan.machine.engines_of(EngineKind.COMPUTE)[0].name
        device = next((s.device for s in program.storages.values() if s.device.type == "cuda"), None)
        engines = dict.fromkeys(i.engine for i in plan.instructions if i.engine not in ("", self.first))
        self.sides = {engine: f"side_{number}" for number, engine in enumerate(engines)} if device is not None else {}
        self.recorded = recorded(self.waits) if self.sides else frozenset()
        self.kinds = {op.name: op.kind for op in plan.graph.ops}
        self.current = "caller"
        self.names: dict[str, Any] = {}
        stream: Any = torch.cuda.Stream
        event: Any = torch.cuda.Event
        if self.sides:
            self.names = {"set_stream": torch.cuda.set_stream, "current_stream": torch.cuda.current_stream}
            for side in self.sides.values():
                self.names[side] = stream(device)
                self.names[f"{side}_done"] = event()
            self.names["entry"] = event()
            self.names.update({f"done_{step}": event() for step in self.recorded})

    def fork(self) -> list[str]:
        """At entry: every stream of ours behind the caller's."""
        if not self.sides:
            return []
        return [
            "caller = current_stream()",
            "entry.record(caller)",
            *(f"{side}.wait_event(entry)" for side in self.sides.values()),
        ]

    def main(self) -> list[str]:
        """Switch to the caller's stream."""
        return self._to("caller")

    def before(self, step: int) -> list[str]:
        """Switch to a step's stream and wait for what it needs."""
        if not self.sides or self._is_boundary(step):
            return []
        stream = self.sides.get(self.plan.instructions[step].engine, "caller")
        waits = self.waits[step] if self.waits else ()
        return [*self._to(stream), *(f"{stream}.wait_event(done_{other})" for other in waits)]

    def after(self, step: int) -> list[str]:
        """Record that a step is done, where another one waits for it."""
        if step not in self.recorded:
            return []
        return [f"done_{step}.record({self.sides.get(self.plan.instructions[step].engine, 'caller')})"]

    def join(self) -> list[str]:
        """At the end: the caller's stream behind every one of ours."""
        if not self.sides:
            return []
        lines = self._to("caller")
        for side in self.sides.values():
            lines += [f"{side}_done.record({side})", f"caller.wait_event({side}_done)"]
        return lines

    def _to(self, stream: str) -> list[str]:
        if not self.sides or stream == self.current:
            return []
        self.current = stream
        return [f"set_stream({stream})"]

    def _is_boundary(self, step: int) -> bool:
        instruction = self.plan.instructions[step]
        return isinstance(instruction, Run) and self.kinds.get(instruction.op) is OpKind.BOUNDARY
