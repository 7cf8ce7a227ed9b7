"""Pipelines as their users call them: where solvers, stages of models and torch's runtime meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .compiler.pipeline import Budget
from .compiler.pipelining.placement import placed
from .compiler.pipelining.problem import PipelineProblem
from .compiler.pipelining.schedule import PipelineSchedule
from .compiler.pipelining.verdict import verified
from .errors import OptionError
from .hw_models.model import HardwareModel
from .hw_models.registry import load, parse_bytes
from .passes.pipeline_parallel.solution import Objective, PipelineSolution

if TYPE_CHECKING:
    from torch import Tensor, device, nn
    from torch.distributed.device_mesh import DeviceMesh

    from .compiler.frontend.stages.cuts import Cut
    from .compiler.frontend.stages.split import StageModules
    from .compiler.runtime.pipelining.pipeline import Pipeline

__all__ = ["pipeline", "schedule_pipeline"]

Split = Literal["graph", "eager"]
_SPLITS = ("graph", "eager")


def schedule_pipeline(
    problem: PipelineProblem,
    *,
    objective: Objective = "makespan",
    time_limit: float = 30.0,
    deterministic: bool = False,
) -> PipelineSolution:
    """The best schedule found for ``problem`` in ``time_limit`` seconds, with its bound; verified as plans of ranks.

    ``objective`` is the makespan, or the span, which counts only where nothing synchronises ranks between steps.

    Raises:
        Infeasible: a rank cannot hold what one microbatch needs there.
        OptionError: an objective or a time limit that there is not.
    """
    from .passes.pipeline_parallel.solve import solve

    _check_search(objective, time_limit)
    solution = solve(problem, Budget.of_seconds(time_limit, deterministic=deterministic), objective=objective)
    verified(solution.timed)
    return solution


def pipeline(
    model: nn.Module | Sequence[nn.Module | None],
    example_inputs: Tensor | Sequence[Tensor],
    loss: Callable[[Any, Any], Tensor],
    *,
    microbatches: int,
    example_target: Tensor | None = None,
    mesh: DeviceMesh | None = None,
    placement: str | Sequence[int] = "loop",
    chunks: int = 1,
    cuts: Sequence[str] | None = None,
    schedule: str | PipelineSchedule = "optimal",
    objective: Objective = "makespan",
    memory_limit: int | str | None = None,
    split: Split = "graph",
    compile: bool = False,
    machine: str | Path | HardwareModel = "h100-sxm",
    optimizer_bytes: int = 8,
    device: device | str | None = None,
    time_limit: float = 30.0,
    deterministic: bool = False,
) -> Pipeline:
    """A training pipeline over the ranks of the default process group, or of ``mesh``: every rank calls this.

    A model is cut into stages, each stage is measured on its rank, a schedule is chosen for what was measured and the
    memory limit, and torch.distributed.pipelining executes it: ``result.step(inputs, target=target)`` adds the mean
    loss's gradients to the weights. Rank 0 decides, for all.

    Args:
        model: a module, which every rank has with the same weights; or stages in their order, each taking what the one
            before returns, of which a rank needs its own only (``None`` for others').
        example_inputs: a batch, as ``step`` takes it; dim 0 is cut into microbatches.
        loss: of what the model, or the last stage of a list, returns and the target, of a microbatch: its mean.
        microbatches: of each step.
        example_target: a batch's target, to measure the last stage with its loss, on that stage's rank; not needed for
            a given schedule.
        mesh: one with a dimension named ``"pp"``, or of one dimension.
        placement: of stages on ranks: ``"loop"``, ``"v"``, ``"wave"``, or the rank of each stage.
        chunks: stages on each rank, for a placement by name.
        cuts: submodules before which to cut; if left out, cuts are chosen together with a schedule, by the costs that
            ``machine`` has for the model's layers.
        schedule: ``"optimal"``, a name of ``opweave pipeline --list``, or a schedule.
        objective: for ``"optimal"``: makespan, or span where nothing synchronises ranks between steps.
        memory_limit: of each rank, in bytes or as text such as ``"60GiB"``, for weights, gradients, the optimizer's
            state and activations.
        split: how backwards are split: ``"graph"`` cuts each stage's graph, so that what is held shrinks when the input
            gradient is done; ``"eager"`` leaves it to torch, which holds more instead, and cannot split what is
            compiled. Stages that are wrapped already, by DDP or ``fully_shard``, stay as they are.
        compile: run stages compiled by Inductor.
        machine: what cuts are chosen for.
        optimizer_bytes: that the optimizer holds for each element of a weight that is trained; 8 for Adam.
        device: where stages run; their parameters' own by default.
        time_limit: of the choice of cuts, and of that of a schedule, in seconds each.
        deterministic: choose the same way every time, for the same measurements.

    Raises:
        OptionError: arguments that do not fit each other.
        ModelError: the model cannot be captured or cut, or stages on different ranks share weights.
        Infeasible: nothing keeps the memory limit; on every rank an error that says so.
        ExecutionError: torch cannot execute the schedule with these stages; on every rank.
    """
    import torch.distributed as dist
    from torch import nn

    from .compiler.runtime.pipelining.pipeline import Pipeline, first_microbatch, groups_of
    from .compiler.runtime.pipelining.together import agreed, together
    from .passes.pipeline_parallel.named import named
    from .passes.pipeline_parallel.partition_costs import partition_model
    from .passes.pipeline_parallel.solve import solve

    group, everyone = groups_of(mesh)
    size, own = dist.get_world_size(group), dist.get_rank(group)
    inputs = tuple(example_inputs) if isinstance(example_inputs, Sequence) else (example_inputs,)
    stages: list[nn.Module | None]
    result: Callable[[Any], Any]

    def arguments() -> tuple[int | None, tuple[int, ...], list[Tensor]]:
        _check(split, schedule, objective, time_limit, microbatches)
        ranks = placed(placement, size, chunks) if isinstance(placement, str) else tuple(placement)
        if isinstance(schedule, str) and example_target is None and ranks and ranks[-1] == own:
            hint = "pass example_target, a batch's target as step takes it, or a schedule that is made already"
            raise OptionError("stages are measured, the last one with its loss, which needs a target", hint=hint)
        share = [first_microbatch(tensor, microbatches) for tensor in inputs]
        return parse_bytes(memory_limit) if isinstance(memory_limit, str) else memory_limit, ranks, share

    limit, ranks, share = together(arguments, everyone)
    agreed({"microbatches": microbatches, "placement": ranks, "memory_limit": limit, "cuts": cuts}, everyone)

    def budget() -> Budget:
        return Budget.of_seconds(time_limit, deterministic=deterministic)

    def planner(problem: PipelineProblem) -> PipelineSolution | PipelineSchedule:
        if isinstance(schedule, str) and schedule != "optimal":
            return named(schedule, problem)
        return solve(problem, budget(), objective=objective)

    if isinstance(model, nn.Module):

        def choose() -> tuple[Cut, ...]:
            found = partition_model(
                model,
                share,
                size,
                microbatches,
                machine if isinstance(machine, HardwareModel) else load(str(machine)),
                budget(),
                optimizer_bytes=optimizer_bytes,
                placement=ranks,
                memory_limit=limit,
                objective=objective,
            )
            return tuple(found.cuts[first - 1] for first in found.partition.cuts)

        agreed({"the model": _outline(model)}, everyone)
        cut = _cut(model, share, cuts, choose, ranks, everyone)
        stages, result = [*cut.modules], cut.program.unflatten
    elif cuts is not None:
        raise OptionError("cuts are given for a model that is in stages already", hint="leave one of them out")
    else:
        stages, result = list(model), lambda outputs: outputs
    for number, (module, rank) in enumerate(zip(stages, ranks, strict=False)):
        stages[number] = _stage(module, split, compile, device) if module is not None and rank == own else None
    return Pipeline(
        stages,
        inputs,
        loss,
        ranks=ranks,
        microbatches=microbatches,
        schedule=schedule if isinstance(schedule, PipelineSchedule) else None,
        planner=None if isinstance(schedule, PipelineSchedule) else planner,
        example_target=example_target,
        memory_limit=limit,
        mesh=mesh,
        device=device,
        resident=partial(_resident, optimizer_bytes=optimizer_bytes),
        result=result,
    )


def _check(split: str, schedule: object, objective: str, time_limit: float, microbatches: object) -> None:
    """Refuse what is known to be wrong before ranks wait for one another."""
    from .passes.pipeline_parallel.named import NAMES

    if split not in _SPLITS:
        raise OptionError(f"split is {split!r}; allowed are {', '.join(map(repr, _SPLITS))}")
    if isinstance(schedule, str) and schedule != "optimal" and schedule not in NAMES:
        hint = "'opweave pipeline --list' shows the schedules that have names; 'optimal' finds one"
        raise OptionError(f"there is no schedule {schedule!r}", hint=hint)
    _check_search(objective, time_limit)
    if not isinstance(microbatches, int) or microbatches < 1:
        raise OptionError(f"microbatches is {microbatches!r}; it must be a whole number above 0")


def _check_search(objective: str, time_limit: float) -> None:
    if objective not in ("makespan", "span"):
        raise OptionError(f"objective is {objective!r}; allowed are 'makespan' and 'span'")
    if not time_limit > 0:
        raise OptionError(f"time_limit is {time_limit} s; it must be above 0")


def _outline(model: nn.Module) -> str:
    """What models have in common that are cut alike: their code is not looked at, but names and shapes of weights."""
    weights = list(model.named_parameters())
    shapes = ";".join(f"{name} {tuple(weight.shape)} {weight.dtype}" for name, weight in weights)
    count = sum(weight.numel() for _, weight in weights)
    return f"{type(model).__name__} of {count} weights ({sha256(shapes.encode()).hexdigest()[:8]})"


def _cut(
    model: nn.Module,
    share: Sequence[Tensor],
    names: Sequence[str] | None,
    choose: Callable[[], tuple[Cut, ...]],
    ranks: Sequence[int],
    everyone: Any,
) -> StageModules:
    """The stages of ``model``, cut at the submodules ``names``, or where rank 0 chooses."""
    from .compiler.frontend.stages.split import split_model
    from .compiler.runtime.pipelining.together import decided, together

    cuts: Sequence[Cut | str] = decided(choose, everyone) if names is None else names
    return together(lambda: split_model(model, share, cuts, ranks=ranks), everyone)


def _stage(module: nn.Module, split: Split, compile: bool, device: device | str | None) -> nn.Module:
    """A stage of this rank as it will run."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    from .compiler.runtime.pipelining.halves import SplitStage

    if device is not None:
        module = module.to(device)
    if isinstance(module, FSDPModule | DistributedDataParallel | SplitStage):
        return module
    if split == "graph":
        return SplitStage(module, compile=compile)
    if compile:
        module.compile()
    return module


def _resident(module: nn.Module, optimizer_bytes: int) -> int:
    """What a stage holds all the time: weights, gradients, buffers, and what the optimizer keeps of weights."""
    from .compiler.runtime.pipelining.calibrate import weights_and_gradients

    elements = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return weights_and_gradients(module) + optimizer_bytes * elements
