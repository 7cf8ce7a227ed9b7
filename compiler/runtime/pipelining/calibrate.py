"""What stages cost before there is a schedule: a few microbatches, one after the other, through torch's own runtime.

Whatever the runtime makes of a stage is measured with it: that the first stage's I does nothing and its W everything,
that a compiled backward is whole, that a stage splits its own. Nothing else runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...pipelining.problem import PipelineProblem, Route, Stage
from ...pipelining.schedule import Action, ActionKind, PipelineSchedule
from .boundaries import Chain, buffer_bytes
from .execute import Loss, Runner
from .memory import held_by
from .modules import left_as_it_was
from .profile import Stopwatch, measured_problem, measured_sends
from .together import Group, gathered, together

__all__ = ["calibrated", "one_after_the_other", "weights_and_gradients"]

MICROBATCHES = 4  # half of them split, half whole
STEPS = 3  # the first of which compiles, allocates and opens connections, and is not counted


def weights_and_gradients(module: nn.Module) -> int:
    """Bytes of the parameters of ``module``, once more for the gradients of those that have one, and of its buffers."""
    parameters = sum(p.nbytes * (1 + p.requires_grad) for p in module.parameters())
    return parameters + sum(buffer.nbytes for buffer in module.buffers())


def one_after_the_other(problem: PipelineProblem, whole: Collection[int]) -> PipelineSchedule:
    """Each microbatch alone, there and back; odd ones with whole backwards, even ones too on the stages ``whole``."""
    orders: list[list[Action]] = [[] for _ in range(problem.ranks)]
    count = len(problem.stages)
    for microbatch in range(problem.microbatches):
        for stage in range(count):
            orders[problem.stages[stage].rank].append(Action(stage, ActionKind.FORWARD, microbatch))
        for stage in reversed(range(count)):
            halves = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
            kinds = (ActionKind.BACKWARD,) if microbatch % 2 or stage in whole else halves
            orders[problem.stages[stage].rank] += [Action(stage, kind, microbatch) for kind in kinds]
    return PipelineSchedule(problem, tuple(map(tuple, orders)), "one after the other")


def calibrated(
    modules: Mapping[int, nn.Module],
    chain: Chain,
    inputs: Sequence[Tensor],
    target: Tensor | None,
    loss: Loss,
    *,
    ranks: Sequence[int],
    microbatches: int,
    memory_limit: Sequence[int] | None,
    device: torch.device,
    group: Group = None,
    resident: Callable[[nn.Module], int] = weights_and_gradients,
) -> PipelineProblem:
    """The problem of ``microbatches`` through ``modules``, with times and bytes as measured; on all ranks the same.

    ``inputs`` and ``target`` are one microbatch's. Stages whose backward cannot be split have all of it in I. What the
    runtime holds of messages, and what ``resident`` says of a module, is resident. What running the modules changes is
    put back.

    Raises:
        ExecutionError: a stage fails, on every rank.
    """
    number = dist.get_world_size(group)
    boundaries = chain.boundaries
    blank = tuple(Stage(rank, 1, 1, 1) for rank in ranks)
    few = PipelineProblem(number, blank, (Route(tuple(range(len(ranks))), MICROBATCHES),), name="calibration")
    runner = Runner(modules, one_after_the_other(few, chain.whole), chain, loss, device=device, group=group)
    watch = Stopwatch(runner)
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(left_as_it_was(module, device))
        batch = [torch.cat([tensor] * MICROBATCHES) for tensor in inputs]
        targets = None if target is None else torch.cat([target] * MICROBATCHES)
        for step in range(STEPS):
            if not step:
                runner.step(batch, targets)
                continue
            dist.barrier(group)
            with watch.running():
                runner.step(batch, targets)
    timed = measured_problem(few, watch.seconds, group, whole=chain.whole)
    sends = measured_sends(boundaries, ranks, device, group)
    held = together(lambda: _held(modules, chain, inputs, target, loss, device, resident), group)
    bytes_of = {stage: facts for own in gathered(held, group) for stage, facts in own.items()}
    stages = [
        msgspec.structs.replace(stage, **bytes_of[index], forward_send_ns=ahead, backward_send_ns=back)
        for index, (stage, (ahead, back)) in enumerate(zip(timed.stages, sends, strict=True))
    ]
    messages = buffer_bytes(boundaries, ranks, microbatches, number)
    for rank in range(number):  # with any stage of the rank: it is the rank that holds them
        own = ranks.index(rank)
        stages[own] = msgspec.structs.replace(stages[own], resident_bytes=stages[own].resident_bytes + messages[rank])
    limit = None if memory_limit is None else tuple(memory_limit)
    return PipelineProblem(number, tuple(stages), (Route(tuple(range(len(ranks))), microbatches),), limit)


def _held(
    modules: Mapping[int, nn.Module],
    chain: Chain,
    inputs: Sequence[Tensor],
    target: Tensor | None,
    loss: Loss,
    device: torch.device,
    resident: Callable[[nn.Module], int],
) -> dict[int, dict[str, Any]]:
    """The fields of `Stage` that are bytes, by stage."""
    boundaries = chain.boundaries
    found: dict[int, dict[str, Any]] = {}
    for stage, module in modules.items():
        is_last = stage == len(boundaries) - 2
        given = inputs if stage == 0 else [facts.zeros(device) for facts in boundaries[stage]]
        held = held_by(module, given, loss if is_last else None, target, first=stage == 0, whole=stage in chain.whole)
        ahead = 0 if is_last else sum(facts.nbytes for facts in boundaries[stage + 1])
        back = sum(facts.nbytes for facts in boundaries[stage] if facts.requires_grad)
        found[stage] = {
            "until_input_gradient_bytes": held.until_input_gradient_bytes,
            "until_weight_gradient_bytes": held.until_weight_gradient_bytes,
            "between_gradients_bytes": held.between_gradients_bytes,
            "resident_bytes": resident(module),
            "forward_bytes": ahead,
            "backward_bytes": back,
        }
    return found
