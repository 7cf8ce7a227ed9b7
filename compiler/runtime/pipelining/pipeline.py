"""A model in stages, trained by a schedule that torch's runtime executes: what the user of a pipeline holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ....errors import ExecutionError, OptionError
from ...pipelining.problem import PipelineProblem
from ...pipelining.schedule import PipelineSchedule, TimedSchedule
from ...pipelining.simulate import timed
from .boundaries import Chain, chain_of
from .calibrate import calibrated, weights_and_gradients
from .emit import renumbered, whole_backwards
from .execute import Loss, Runner, check_loss
from .modules import Seams, check_ties
from .profile import Measured, Stopwatch, measured_problem
from .together import Group, decided, together

__all__ = ["Pipeline", "Planned", "Planner", "first_microbatch", "groups_of"]


class Planned(Protocol):
    """A schedule with its times, and whatever else its maker tells of it."""

    @property
    def timed(self) -> TimedSchedule: ...  # noqa: D102


#: Chooses a schedule for a problem; it is called on one rank, which tells the others.
Planner = Callable[[PipelineProblem], Planned | PipelineSchedule]


class Pipeline:
    """The stages of this rank, and the schedule that all ranks execute. Every rank of the group makes one.

    ``stages`` are all stages in their order; those of other ranks may be None, and are not touched. Stage n is on rank
    ``ranks[n]`` of the group; its parameters are on ``device`` already, wrapped by DDP or ``fully_shard`` if need be.
    Each takes what the one before returns: a tensor or a tuple of tensors. ``example_inputs`` and ``example_target``
    are a batch as `step` takes it. ``schedule`` is executed as it is; where instead ``planner`` is given, each stage is
    measured first, for a few microbatches, and rank 0 has it choose a schedule for the problem that results.

    ``loss`` gives the mean loss of a microbatch, of the last stage's output and the target. It, and who calls `eval`,
    gets what ``result`` makes of that stage's outputs, a tensor or a tuple of tensors.

    Raises:
        OptionError: numbers do not fit each other.
        ModelError: stages on different ranks share weights.
        ExecutionError: torch cannot execute the schedule with these stages; on every rank.
        VerificationError: what torch makes of the schedule is wrong, or exceeds the memory limit; on every rank.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module | None],
        example_inputs: Tensor | Sequence[Tensor],
        loss: Loss,
        *,
        ranks: Sequence[int],
        microbatches: int,
        schedule: PipelineSchedule | None = None,
        planner: Planner | None = None,
        example_target: Tensor | None = None,
        memory_limit: int | Sequence[int] | None = None,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        resident: Callable[[nn.Module], int] = weights_and_gradients,
        result: Callable[[Any], Any] = lambda outputs: outputs,
    ) -> None:
        if (schedule is None) == (planner is None):
            raise OptionError("a pipeline needs a schedule, or a planner that chooses one, and not both")
        if schedule is not None and memory_limit is not None:
            raise OptionError("a schedule is given, and a memory limit", hint="the schedule's problem has its limits")
        if schedule is not None and schedule.problem.microbatches != microbatches:
            raise OptionError(f"the schedule has {schedule.problem.microbatches} microbatches, not {microbatches}")
        self.group, self._everyone = groups_of(mesh)
        self.ranks, self.microbatches, self._result = tuple(ranks), microbatches, result
        self.loss: Loss = lambda outputs, target: loss(result(outputs), target)
        self.here = dist.get_rank(self.group)
        self.modules = together(lambda: self._own(stages), self.group)
        self.device = torch.device(device) if device is not None else _device_of(self.modules)
        self._planner = planner
        self._seams = [Seams(module) for module in self.modules.values()]
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        first = together(lambda: [self._first(tensor) for tensor in inputs], self.group)
        #: What passes between stages, and which of them cannot split their backward.
        self.chain: Chain = chain_of(self.modules, first, self.ranks, self.device, self.group)
        target = together(lambda: None if example_target is None else self._first(example_target), self.group)
        together(lambda: self._try_loss(first, target), self.group)
        #: What the planner said of the schedule, if it says more than that.
        self.solution: Any = None
        if schedule is None:
            schedule = self._planned(self._calibrated(first, target, memory_limit, resident))
        self._runner = self._run_by(schedule)
        self._watch: Stopwatch | None = None

    @property
    def schedule(self) -> PipelineSchedule:
        """What is executed."""
        return self._runner.schedule

    @property
    def problem(self) -> PipelineProblem:
        """The problem that it is a schedule of; with a planner, in measured nanoseconds and bytes."""
        return self.schedule.problem

    @property
    def timed(self) -> TimedSchedule:
        """The schedule with predicted times."""
        return timed(self.schedule)

    @property
    def lowered(self) -> dict[int, tuple[str, ...]]:
        """Each rank's actions with sends, receives and FSDP's gathers, as torch executes them."""
        return self._runner.lowered

    @property
    def losses(self) -> list[Tensor]:
        """Of the last step's microbatches, in order, on the last stage's rank; empty elsewhere."""
        return self._runner.losses

    @property
    def seconds(self) -> Measured:
        """What this rank's actions took in steps with ``measure``, since the schedule was chosen."""
        return self._watch.seconds if self._watch else {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of this rank's stages, each once, for an optimizer."""
        return iter(dict.fromkeys(p for module in self.modules.values() for p in module.parameters()))

    def step(self, *inputs: Tensor | None, target: Tensor | None = None, measure: bool = False) -> Tensor | None:
        """One training step on a batch: adds the mean loss's gradients to the weights' ``grad``.

        Every rank may pass the same arguments; ``inputs`` matter on the rank of stage 0, ``target`` on that of the
        last stage, and None will do elsewhere. Returns the mean loss there, and None elsewhere. With ``measure`` each
        action is timed, for `replan`.

        Raises:
            OptionError: a batch of another size, or an input or the target is missing.
        """
        given = [tensor for tensor in inputs if tensor is not None]
        if not measure:
            return self._runner.step(given, target)
        self._watch = self._watch or Stopwatch(self._runner)
        with self._watch.running():
            return self._runner.step(given, target)

    def eval(self, *inputs: Tensor | None) -> Any:
        """The last stage's outputs for a batch, on its rank, and None elsewhere; nothing is differentiated.

        Meanwhile the modules are in evaluation (``Module.eval``), and behind it in the mode that they were in.
        """
        outputs = self._runner.evaluate([tensor for tensor in inputs if tensor is not None])
        return None if outputs is None else self._result(outputs)

    def measured(self) -> PipelineProblem:
        """The problem with the times of the steps that were measured, on every rank the same. Every rank calls it.

        Raises:
            ExecutionError: no step was measured.
        """
        return measured_problem(self.problem, self.seconds, self.group, whole=self.chain.whole)

    def replan(self, planner: Planner | None = None) -> PipelineSchedule:
        """Choose a schedule again, for the times of the measured steps; the next step executes it.

        ``planner`` is the one that the pipeline was made with, if it is left out. Every rank calls it.

        Raises:
            OptionError: there is no planner.
            ExecutionError: no step was measured, or torch cannot execute what was chosen; the old schedule stays.
        """
        chooses = planner or self._planner
        if chooses is None:
            raise OptionError("nothing chooses a schedule", hint="pass a planner: a function from problem to schedule")
        self._planner = chooses
        self._runner = self._run_by(self._planned(self.measured()))
        self._watch = None
        return self.schedule

    def report(self, folder: str | Path) -> dict[str, Path]:
        """Draw the schedule into ``folder``, on rank 0 alone; the files by name, and none elsewhere."""
        from ...report.pipelining import write_pipeline_report

        if dist.get_rank(self._everyone) != 0:
            return {}
        shown = self.timed if self.solution is None else replace(self.solution, timed=self.timed)
        return write_pipeline_report(shown, folder)

    def close(self) -> None:
        """Take the hooks off the modules; the pipeline is of no use behind it."""
        for seams in self._seams:
            seams.close()

    def _own(self, stages: Sequence[nn.Module | None]) -> dict[int, nn.Module]:
        if len(stages) != len(self.ranks):
            raise OptionError(f"{len(stages)} stages are given, and ranks of {len(self.ranks)}")
        size = dist.get_world_size(self.group)
        if not set(self.ranks) <= set(range(size)):
            raise OptionError(f"stages are on ranks {list(self.ranks)}; the group has ranks 0 to {size - 1}")
        check_ties(stages, self.ranks)
        own = {stage: module for stage, module in enumerate(stages) if self.ranks[stage] == self.here}
        missing = [stage for stage, module in own.items() if module is None]
        if missing:
            raise OptionError(f"rank {self.here} has no module for its stage {missing[0]}")
        return {stage: module for stage, module in own.items() if module is not None}

    def _first(self, batch: Tensor) -> Tensor:
        return first_microbatch(batch, self.microbatches).to(self.device)

    def _try_loss(self, inputs: Sequence[Tensor], target: Tensor | None) -> None:
        """Raise here, where all ranks hear of it, what the loss would raise amid a step."""
        last = len(self.ranks) - 1
        if last in self.modules and target is not None:
            given = inputs if last == 0 else [facts.zeros(self.device) for facts in self.chain.boundaries[last]]
            check_loss(self.modules[last], given, self.loss, target, self.device)

    def _calibrated(
        self,
        inputs: Sequence[Tensor],
        target: Tensor | None,
        memory_limit: int | Sequence[int] | None,
        resident: Callable[[nn.Module], int],
    ) -> PipelineProblem:
        number = dist.get_world_size(self.group)
        limits = (memory_limit,) * number if isinstance(memory_limit, int) else memory_limit
        return calibrated(
            self.modules,
            self.chain,
            inputs,
            target,
            self.loss,
            ranks=self.ranks,
            microbatches=self.microbatches,
            memory_limit=limits,
            device=self.device,
            group=self.group,
            resident=resident,
        )

    def _planned(self, problem: PipelineProblem) -> PipelineSchedule:
        """What the planner chooses on the first rank of all, for what its pipeline measured, known to all."""
        chosen = decided(lambda: self._chosen(problem), self._everyone)
        self.solution = None if isinstance(chosen, PipelineSchedule) else chosen
        schedule = chosen if isinstance(chosen, PipelineSchedule) else chosen.timed.schedule
        return renumbered(whole_backwards(schedule, self.chain.whole))

    def _chosen(self, problem: PipelineProblem) -> Planned | PipelineSchedule:
        assert self._planner is not None
        chosen = self._planner(problem)
        found = chosen if isinstance(chosen, PipelineSchedule) else getattr(chosen, "timed", None)
        schedule = found.schedule if isinstance(found, TimedSchedule) else found
        if not isinstance(schedule, PipelineSchedule) or schedule.problem != problem:
            what = "a schedule of another problem" if isinstance(schedule, PipelineSchedule) else f"{chosen!r:.80}"
            raise OptionError(f"the planner returned {what}", hint="it returns a schedule of the problem it is given")
        return chosen

    def _run_by(self, schedule: PipelineSchedule) -> Runner:
        return Runner(self.modules, renumbered(schedule), self.chain, self.loss, device=self.device, group=self.group)


def groups_of(mesh: DeviceMesh | None) -> tuple[Group, Group]:
    """The group of the pipeline, and that of all who must decide alike: of a mesh with replicas, all of its ranks."""
    if not dist.is_initialized():
        raise ExecutionError("there is no process group", hint="start with torchrun, and call init_process_group")
    if mesh is None:
        return None, None
    if mesh.ndim == 1:
        return mesh.get_group(), mesh.get_group()
    if "pp" not in (mesh.mesh_dim_names or ()):
        raise OptionError(
            f"the mesh has dimensions {mesh.mesh_dim_names}", hint="name the pipeline's 'pp', or pass its one dimension"
        )
    if mesh.size() != dist.get_world_size():
        raise OptionError(
            f"the mesh has {mesh.size()} of {dist.get_world_size()} ranks",
            hint="make it of all ranks, or pass the pipeline's dimension alone",
        )
    return mesh.get_group("pp"), None


def first_microbatch(batch: Tensor, microbatches: int) -> Tensor:
    """The first of ``microbatches`` parts of ``batch``, along its first dimension. Raises OptionError."""
    if microbatches < 1:
        raise OptionError(f"a step of {microbatches} microbatches; it needs 1 at least")
    if not batch.ndim or not batch.shape[0] or batch.shape[0] % microbatches:
        raise OptionError(
            f"a batch of shape {list(batch.shape)} is not {microbatches} microbatches of one size",
            hint="the first dimension is cut into microbatches: make it a multiple of their number, and expand "
            "what all of a batch share, such as positions and masks",
        )
    return batch[: batch.shape[0] // microbatches]


def _device_of(modules: dict[int, nn.Module]) -> torch.device:
    return next((p.device for module in modules.values() for p in module.parameters()), torch.device("cpu"))
