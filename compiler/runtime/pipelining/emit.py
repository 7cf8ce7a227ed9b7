"""A pipeline schedule as torch.distributed.pipelining reads it: for each rank the actions that compute, in order.

torch's text is ours: stage, kind, microbatch, as ``3F0``; one row a rank in its CSV. What torch's runtime has no action
for is refused here by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from ....errors import ExecutionError
from ...pipelining.problem import PipelineProblem
from ...pipelining.schedule import Action, ActionKind, PipelineSchedule

__all__ = ["check_emittable", "csv_of", "emitted", "renumbered", "whole_backwards", "write_csv"]


def emitted(schedule: PipelineSchedule) -> dict[int, tuple[str, ...]]:
    """Each rank's computing actions in torch's words.

    Raises:
        ExecutionError: torch's runtime cannot execute the schedule; what it has no action for is named.
    """
    check_emittable(schedule)
    return {rank: tuple(map(str, order)) for rank, order in enumerate(schedule.orders)}


def csv_of(schedule: PipelineSchedule) -> str:
    """The same as CSV in torch's format ``compute_only``: one row a rank. Raises ExecutionError."""
    return "".join(f"{','.join(actions)}\n" for actions in emitted(schedule).values())


def write_csv(schedule: PipelineSchedule, path: str | Path) -> Path:
    """Write `csv_of` to ``path``, as torchtitan's ``pipeline_parallel_schedule_csv``. Raises ExecutionError."""
    path = Path(path)
    path.write_text(csv_of(schedule))
    return path


def check_emittable(schedule: PipelineSchedule) -> None:
    """Raises ExecutionError if torch's runtime cannot execute ``schedule``, and says what it cannot."""
    problem = schedule.problem
    _check_routes(problem)
    if problem.vocabulary is not None:
        raise ExecutionError(
            "torch.distributed.pipelining has no actions for vocabulary shards (S and T)",
            hint="put the output layer into the last stage, or a stage of its own, and leave `vocabulary` out",
        )
    for rank, stages in enumerate(problem.stages_of):
        if not stages:
            raise ExecutionError(
                f"rank {rank} has no stage; torch.distributed.pipelining needs one at least on every rank",
                hint="use fewer ranks, or cut the model into more stages",
            )
    moved = [f"stage {number} offloads" for number, stage in enumerate(problem.stages) if stage.offloaded_bytes]
    moved += [f"rank {r} does {each}" for r, order in enumerate(schedule.orders) for each in order if each.kind.copies]
    if moved:
        raise ExecutionError(
            f"{moved[0]}: torch.distributed.pipelining has no actions that move activations to host memory",
            hint="solve the problem without offload, or wrap the stage in torch.autograd.graph.save_on_cpu",
        )


def _check_routes(problem: PipelineProblem) -> None:
    if len(problem.routes) > 1:
        ways = "; ".join(str(list(route.stages)) for route in problem.routes)
        raise ExecutionError(
            f"the microbatches take {len(problem.routes)} routes ({ways}); torch.distributed.pipelining sends all of "
            "them through stages 0, 1, 2, ..., so that it has neither bidirectional pipelines nor skipped stages",
            hint="solve the problem with one route through all stages",
        )
    stages, count = problem.routes[0].stages, len(problem.stages)
    if stages != tuple(range(count)):
        raise ExecutionError(
            f"microbatches go through stages {list(stages)} of {count}; torch.distributed.pipelining sends them "
            f"through stages 0 to {count - 1} in this order",
            hint="leave out stages that nothing goes through, and number them as they follow one another",
        )


def renumbered(schedule: PipelineSchedule) -> PipelineSchedule:
    """``schedule`` with its microbatches numbered as its last stage runs their F.

    torch finds a microbatch's loss by how many the last stage has computed before: in any other order it fails, or
    computes wrong gradients. Microbatches of one route are alike, so that names are all that changes.
    """
    if len(schedule.problem.routes) > 1:
        return schedule
    last = schedule.problem.routes[0].stages[-1]
    order = schedule.orders[schedule.problem.stages[last].rank]
    names = [a.microbatch for a in order if a.stage == last and a.kind is ActionKind.FORWARD]
    number = {name: position for position, name in enumerate(names)}
    if all(name == position for name, position in number.items()) or len(number) < schedule.problem.microbatches:
        return schedule
    return _replaced(
        schedule, {a: Action(a.stage, a.kind, number[a.microbatch]) for order in schedule.orders for a in order}
    )


def whole_backwards(schedule: PipelineSchedule, stages: Collection[int]) -> PipelineSchedule:
    """``schedule`` in which ``stages`` do B where they did I, and nothing where they did W.

    It takes as long and as many bytes if W of these stages takes no time and holds nothing: so costs of stages that
    cannot split their backward are written.
    """
    replaced: dict[Action, Action | None] = {}
    for order in schedule.orders:
        for action in order:
            if action.stage in stages and action.kind is ActionKind.INPUT_GRADIENT:
                replaced[action] = Action(action.stage, ActionKind.BACKWARD, action.microbatch)
            elif action.stage in stages and action.kind is ActionKind.WEIGHT_GRADIENT:
                replaced[action] = None
            else:
                replaced[action] = action
    return _replaced(schedule, replaced)


def _replaced(schedule: PipelineSchedule, new: Mapping[Action, Action | None]) -> PipelineSchedule:
    orders = tuple(
        tuple(action for action in (new[old] for old in order) if action is not None) for order in schedule.orders
    )
    return msgspec.structs.replace(schedule, orders=orders)
