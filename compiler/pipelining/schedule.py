"""A pipeline schedule: for each rank the actions that it does, in order; and one with its times.

An action is written as torch.distributed.pipelining writes it: stage, kind, microbatch, as ``3F0``.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import cached_property

import msgspec

from ...errors import OptionError
from .problem import PipelineProblem

__all__ = ["Action", "ActionKind", "PipelineSchedule", "TimedSchedule"]


class ActionKind(StrEnum):
    """What a rank does for one microbatch; all but the last two compute.

    For S and T (of ``Vocabulary``) the action's stage is the rank that has the shard. ``OFFLOAD`` and ``RELOAD`` are
    handed to the rank's copy engine at their place in the order, and nothing behind them waits but what needs them.
    """

    FORWARD = "F"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    BACKWARD = "B"
    OUTPUT = "S"
    OUTPUT_GRADIENT = "T"
    OFFLOAD = "OFFLOAD"
    RELOAD = "RELOAD"

    @property
    def copies(self) -> bool:
        """Whether it occupies the rank's copy engine, not its compute."""
        return self in (ActionKind.OFFLOAD, ActionKind.RELOAD)


_WRITTEN = re.compile(r"([0-9]{1,9})(OFFLOAD|RELOAD|F|I|W|B|S|T)([0-9]{1,9})")


class Action(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, order=True):
    """``kind`` of ``stage`` for ``microbatch``."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def of(cls, text: str) -> Action:
        """The action that ``text``, such as ``3F0``, means. Raises OptionError."""
        match = _WRITTEN.fullmatch(text.strip())
        if match is None:
            raise OptionError(f"{text!r} is no action", hint="write stage, kind and microbatch, such as 3F0")
        return cls(int(match[1]), ActionKind(match[2]), int(match[3]))


class PipelineSchedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The order of every rank's actions; ``method`` says where it is from, as ``"1f1b"`` or ``"cp"``."""

    problem: PipelineProblem
    orders: tuple[tuple[Action, ...], ...]
    method: str = ""


class TimedSchedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """A schedule in which everything starts as early as it can; times as ``schedule.orders``, in the problem's unit.

    ``reduced`` holds, by rank, start and finish of the gradients' all-reduce of each stage that has one, by stage.
    ``peak_bytes`` are the most that each rank holds, resident bytes included.
    """

    schedule: PipelineSchedule
    starts: tuple[tuple[int, ...], ...]
    finishes: tuple[tuple[int, ...], ...]
    peak_bytes: tuple[int, ...]
    reduced: tuple[tuple[tuple[int, int, int], ...], ...] = ()

    @cached_property
    def makespan_ns(self) -> int:
        """From the start of the step until all is done, gradients reduced."""
        ends = [finish for finishes in self.finishes for finish in finishes]
        return max([*ends, *(finish for rank in self.reduced for *_, finish in rank)], default=0)

    @cached_property
    def spans_ns(self) -> tuple[int, ...]:
        """By rank, from the start of its first action until its last, or its last all-reduce, is done."""
        spans = []
        for rank, (starts, finishes) in enumerate(zip(self.starts, self.finishes, strict=True)):
            last = [finish for *_, finish in self.reduced[rank]] if self.reduced else []
            spans.append(max([*finishes, *last]) - min(starts) if starts else 0)
        return tuple(spans)

    @property
    def span_ns(self) -> int:
        """The longest of ``spans_ns``: what a step takes in steady state if nothing synchronises ranks between steps.

        That needs an optimizer step that no rank waits for (Zero Bubble's post-validation): gradient clipping by a
        global norm, or any collective over all ranks between two steps, makes the makespan count.
        """
        return max(self.spans_ns, default=0)

    @property
    def bubble(self) -> float:
        """The fraction of the makespan in which the rank with most work idles."""
        return 1 - max(self.schedule.problem.work_ns) / self.makespan_ns if self.makespan_ns else 0.0

    @property
    def span_bubble(self) -> float:
        """The same of the span."""
        return 1 - max(self.schedule.problem.work_ns) / self.span_ns if self.span_ns else 0.0
