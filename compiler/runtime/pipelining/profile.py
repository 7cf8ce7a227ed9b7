"""What each action takes on each rank, measured while torch's runtime executes a schedule.

The runtime's own profiler ranges (``PP:3F0``) begin before a rank waits for what it receives, so that they hold the
very bubbles that a schedule is to be judged by. Here the calls that compute are timed inside them. On a GPU, events are
recorded in the stream, and read when the step is done; nothing is synchronised meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ....errors import ExecutionError
from ...pipelining.problem import PipelineProblem
from ...pipelining.schedule import Action, ActionKind
from .boundaries import Boundary
from .execute import Runner
from .together import Group, gathered

__all__ = ["Measured", "Stopwatch", "measured_problem", "measured_sends"]

F, I, W, B = ActionKind.FORWARD, ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT, ActionKind.BACKWARD  # noqa: E741

#: Seconds that each action took, every time that it was done.
Measured = Mapping[Action, Sequence[float]]


class Stopwatch:
    """Times the actions of a runner's stages while `running`; ``seconds`` has, by action, those of each step."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.seconds: dict[Action, list[float]] = {}
        self._open: list[tuple[Action, Any, Any]] = []
        self._loss_of: Action | None = None
        self._on_gpu = runner.device.type == "cuda"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done inside; results are there behind it."""
        runner = self.runner
        loss = runner.loss
        for stage in runner.stages:
            self._wrap(stage, "forward_one_chunk", lambda _: F)
            self._wrap(stage, "backward_one_chunk", lambda arguments: B if arguments.get("full_backward", True) else I)
            self._wrap(stage, "backward_weight_one_chunk", lambda _: W)
        runner.loss = self._timed_loss(loss)
        try:
            yield
        finally:
            runner.loss = loss
            for stage in runner.stages:
                for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                    delattr(stage, name)
            self._read()

    def _wrap(self, stage: Any, name: str, kind: Callable[[Mapping[str, Any]], ActionKind]) -> None:
        """Time a method of ``stage``, of this object alone; its first argument is the microbatch."""
        method = getattr(stage, name)

        def timed(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            action = Action(stage.stage_index, kind(kwargs), microbatch)
            if action.kind is F:
                self._loss_of = action
            begin = self._now()
            result = method(microbatch, *args, **kwargs)
            self._open.append((action, begin, self._now()))
            return result

        setattr(stage, name, timed)

    def _timed_loss(self, loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The loss is part of the last stage's forward, though torch calls it behind."""

        def timed(output: Any, target: Any) -> Any:
            begin = self._now()
            result = loss(output, target)
            if self._loss_of is not None:
                self._open.append((self._loss_of, begin, self._now()))
            return result

        return timed

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        new: Any = torch.cuda.Event
        event = new(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.runner.device)
        step: dict[Action, float] = {}
        for action, begin, end in self._open:
            seconds = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            step[action] = step.get(action, 0.0) + seconds
        for action, seconds in step.items():
            self.seconds.setdefault(action, []).append(seconds)
        self._open.clear()


def measured_problem(
    problem: PipelineProblem, mine: Measured, group: Group = None, *, whole: Collection[int] = ()
) -> PipelineProblem:
    """``problem`` with the times of its stages replaced by medians of what all ranks measured, in nanoseconds.

    Medians are over microbatches and steps. The stages ``whole`` cannot split their backward: all of it is I. What
    else nobody measured, because no schedule did it, is taken from what was: I and W from the old problem's shares of
    B, and B from the sum of I and W.

    Raises:
        ExecutionError: a stage has no measured forward or no measured backward.
    """
    times: dict[tuple[int, ActionKind], list[float]] = {}
    for of_rank in gathered({action: tuple(seconds) for action, seconds in mine.items()}, group):
        for action, seconds in of_rank.items():
            times.setdefault((action.stage, action.kind), []).extend(seconds)
    found = {key: round(median(seconds) * 1e9) for key, seconds in times.items() if seconds}
    stages = []
    for number, stage in enumerate(problem.stages):
        forward, first, second, both = (found.get((number, kind)) for kind in (F, I, W, B))
        if forward is None or (both is None and (first is None or second is None)):
            raise ExecutionError(f"stage {number} was not measured", hint="measure while a whole step is executed")
        if first is None or second is None:
            assert both is not None
            split = stage.input_gradient_ns + stage.weight_gradient_ns
            share = 1.0 if number in whole else stage.input_gradient_ns / split if split else 0.5
            first = round(both * share)
            second = both - first
        stages.append(
            msgspec.structs.replace(
                stage, forward_ns=forward, input_gradient_ns=first, weight_gradient_ns=second, backward_ns=both
            )
        )
    return msgspec.structs.replace(problem, stages=tuple(stages))


def measured_sends(
    boundaries: Sequence[Boundary], ranks: Sequence[int], device: torch.device, group: Group = None, repeats: int = 5
) -> tuple[tuple[int, int], ...]:
    """For each stage but the last, the nanoseconds that its outputs take to the next one's rank, and, for each stage
    but the first, that its inputs' gradients take to the rank before: medians of half a round trip, 0 on one rank.

    The pair at ``stage`` is of its outputs ahead, and of the gradient of its inputs back. Every rank calls it.
    """
    here = dist.get_rank(group)
    halves: dict[int, int] = {}
    for stage in range(len(ranks) - 1):
        one, other = ranks[stage], ranks[stage + 1]
        if one != other and here in (one, other):
            tensors = [facts.zeros(device).detach() for facts in boundaries[stage + 1]]
            halves[stage] = _half_a_round_trip(tensors, other if here == one else one, here == one, group, repeats)
        dist.barrier(group)
    slowest: dict[int, int] = {}
    for of_rank in gathered(halves, group):
        for stage, nanoseconds in of_rank.items():
            slowest[stage] = max(nanoseconds, slowest.get(stage, 0))
    return tuple((slowest.get(stage, 0), slowest.get(stage - 1, 0)) for stage in range(len(ranks)))


def _half_a_round_trip(tensors: Sequence[torch.Tensor], peer: int, first: bool, group: Group, repeats: int) -> int:
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for sends in (first, not first):
            for tensor in tensors:
                if sends:
                    dist.send(tensor, group=group, group_dst=peer)
                else:
                    dist.recv(tensor, group=group, group_src=peer)
        if tensors and tensors[0].is_cuda:
            torch.cuda.synchronize(tensors[0].device)
        seconds.append((time.perf_counter() - begin) / 2)
    return round(median(seconds[1:]) * 1e9)
