"""One rank's part of a pipeline, executed by torch's runtime: training steps, and forward passes alone.

Metadata of stages is given, so that torch does not probe them; stages are handed over in ascending order; the order of
actions is checked as torch has lowered it. The loss is divided by the number of microbatches before it is
differentiated, in place of torch's division of finished gradients, which would divide gradients of earlier steps again,
and those of a weight that two stages of a rank share twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from ....errors import ExecutionError, OptionError, OpweaveError
from ...pipelining.schedule import PipelineSchedule
from .boundaries import Boundary, Chain, TensorFacts
from .checks import check_lowered
from .emit import check_emittable, csv_of
from .lowering import load, runtime_class
from .modules import check_kinds, evaluating, forward, left_as_it_was, splitter
from .together import Group, agreed, together

__all__ = ["Loss", "Runner", "check_loss"]

#: Of the last stage's output (or tuple of outputs) and the target of one microbatch: its mean loss, a scalar.
Loss = Callable[[Any, Any], Tensor]

#: The version of torch from which stages in training may be given tensors that cannot have a gradient.
_PASSES_INTEGERS = (2, 13)

_FORWARD_KINDS = ("F", "SEND_F", "WAIT_SEND_F", "RECV_F", "UNSHARD", "RESHARD")


class Runner:
    """``schedule`` on this rank: ``modules`` are its stages, ``chain`` what `chain_of` found.

    ``losses`` are those of the last step's microbatches, in order, on the last stage's rank; empty elsewhere.

    Raises:
        ExecutionError: on every rank, if torch cannot execute the schedule, or a stage not what it asks of it.
        VerificationError: what torch made of the schedule is not what it says, or exceeds the memory limit.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        schedule: PipelineSchedule,
        chain: Chain,
        loss: Loss,
        *,
        device: torch.device,
        group: Group = None,
    ) -> None:
        self.schedule, self.chain = schedule, chain
        self.modules = dict(sorted(modules.items()))
        self.device, self.group = device, group
        self.losses: list[Tensor] = []
        self.loss = loss
        self.microbatches = schedule.problem.microbatches
        self.ranks = tuple(stage.rank for stage in schedule.problem.stages)
        self.here = dist.get_rank(group)
        together(self._check, group)
        agreed({"the schedule": csv_of(schedule)}, group)
        self.stages = self._stages()
        self.runtime = runtime_class()(self.stages, self.microbatches, loss_fn=self._scaled_loss, scale_grads=False)
        #: Each rank's list as torch executes it, in its words.
        self.lowered = together(self._load, group)
        self._forward_runtime: Any = None

    def step(self, inputs: Sequence[Tensor], target: Tensor | None) -> Tensor | None:
        """One training step: gradients of the mean loss are added to the weights' ``grad``.

        ``inputs`` are the whole batch's on the rank of stage 0, ``target`` on that of the last stage; the others'
        are not looked at. Returns the mean loss on the rank of the last stage, and None elsewhere.

        Raises:
            OptionError: they are missing, or not as the pipeline was made for.
        """
        first, last = 0 in self.modules, len(self.ranks) - 1 in self.modules
        self._check_inputs(inputs)
        if last and not isinstance(target, Tensor):
            raise OptionError("a training step needs a target on the rank of the last stage, a tensor of the batch")
        if (
            last
            and isinstance(target, Tensor)
            and (not target.ndim or not len(target) or len(target) % self.microbatches)
        ):
            raise OptionError(
                f"a target of shape {list(target.shape)} is not {self.microbatches} microbatches of one size",
                hint="the first dimension is cut into microbatches, as that of the inputs",
            )
        self.losses = []
        self.runtime.step(*(inputs if first else ()), target=target if last else None, return_outputs=False)
        return torch.stack(self.losses).mean() if last else None

    def evaluate(self, inputs: Sequence[Tensor]) -> Any:
        """The last stage's outputs for the whole batch, on its rank; nothing is differentiated. Raises OptionError.

        Modules are in evaluation meanwhile.
        """
        self._check_inputs(inputs)
        if self._forward_runtime is None:
            self._forward_runtime = self._without_backward()
        with torch.no_grad(), evaluating(self.modules.values()):
            return self._forward_runtime.step(*(inputs if 0 in self.modules else ()))

    def _check(self) -> None:
        if self.schedule.problem.ranks != dist.get_world_size(self.group):
            raise ExecutionError(
                f"the schedule is for {self.schedule.problem.ranks} ranks; the group has "
                f"{dist.get_world_size(self.group)}"
            )
        own = self.schedule.problem.stages_of[self.here]
        if tuple(self.modules) != own:
            raise ExecutionError(
                f"rank {self.here} has modules of stages {list(self.modules)}; the schedule gives it {list(own)}"
            )
        check_emittable(self.schedule)
        check_kinds(self.chain.whole, self.schedule)
        self._check_passed()

    def _check_passed(self) -> None:
        """What passes between stages is what this version of torch can pass."""
        version = torch.__version__
        for stage, boundary in enumerate(self.chain.boundaries[1:-1], 1):
            other = [facts for facts in boundary if not getattr(torch, facts.dtype).is_floating_point]
            if other and tuple(map(int, version.split(".")[:2])) < _PASSES_INTEGERS:
                raise ExecutionError(
                    f"stage {stage} is given {other[0]}; torch {version} passes no such tensors on in training",
                    hint="use a newer torch, or have stages compute from the model's inputs alone what they need",
                )

    def _load(self) -> dict[int, tuple[str, ...]]:
        lowered = load(self.runtime, self.schedule)
        check_lowered(lowered, self.schedule, as_plans=self.here == 0)
        return lowered

    def _stages(self) -> list[PipelineStage]:
        return [self._stage(stage, module) for stage, module in self.modules.items()]

    def _stage(self, stage: int, module: nn.Module) -> PipelineStage:
        made = _Stage(
            module,
            stage,
            len(self.ranks),
            self.device,
            input_args=self._samples(self.chain.boundaries[stage]),
            output_args=self._samples(self.chain.boundaries[stage + 1]),
            group=self.group,
            dw_builder=splitter(module),
        )
        if stage < len(self.ranks) - 1:
            made.expected = self.chain.boundaries[stage + 1]
        return made

    def _samples(self, boundary: Boundary) -> tuple[Tensor, ...]:
        return tuple(facts.zeros(torch.device("meta")) for facts in boundary)

    def _without_backward(self) -> Any:
        """A runtime of its own for forward passes: torch's, in its eval mode, fails where a rank has two neighbours."""
        runtime = runtime_class()(self._stages(), self.microbatches)
        load(runtime, self.schedule)
        lists = runtime.pipeline_order_with_comms
        for rank, actions in lists.items():
            lists[rank] = [action for action in actions if action.computation_type.value in _FORWARD_KINDS]
        return runtime

    def _scaled_loss(self, output: Any, target: Any) -> Tensor:
        loss = _scalar(self.loss(output, target))
        # A copy: a loss may share its storage with what it is the sum of.
        self.losses.append(loss.detach().clone())
        return loss / self.microbatches

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        if 0 not in self.modules:
            return
        wanted = self.chain.boundaries[0]
        if len(inputs) != len(wanted):
            raise OptionError(f"the pipeline takes {len(wanted)} inputs, not {len(inputs)}")
        for number, (given, facts) in enumerate(zip(inputs, wanted, strict=True)):
            found = TensorFacts.of(given)
            whole = (facts.shape[0] * self.microbatches, *facts.shape[1:])
            if found.shape != whole or found.dtype != facts.dtype:
                raise OptionError(
                    f"input {number} is {found}; the pipeline was made for {self.microbatches} microbatches of {facts}",
                    hint="pipelines are made for one batch size: drop the last, smaller batch, or pad it",
                )


def check_loss(module: nn.Module, inputs: Sequence[Tensor], loss: Loss, target: Tensor, device: torch.device) -> None:
    """Try ``loss`` on what the last stage, ``module``, makes of ``inputs``; what that changes is put back.

    Raises:
        OptionError: it fails, is no scalar, or has no gradient.
    """
    with left_as_it_was(module, device), torch.enable_grad():
        outputs = forward(module, inputs)
        try:
            found = loss(outputs[0] if len(outputs) == 1 else outputs, target)
        except OpweaveError:
            raise
        except Exception as error:
            raise OptionError(
                f"the loss fails on a microbatch: {type(error).__name__}: {error}",
                hint="it is called with what the last stage returns, and the target",
            ) from error
        if not _scalar(found).requires_grad:
            raise OptionError("the loss does not depend on any weight", hint="compute it of the output, not detached")


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise OptionError(f"the loss is {found}, not a scalar", hint="return the microbatch's mean loss")
    return loss


class _Stage(PipelineStage):
    """A PipelineStage that hands on what was said it would, and whose last W DDP hears of: torch tells it of the last B
    alone.
    """

    expected: Boundary = ()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Opens connections to neighbours on other ranks: torch 2.11 greets its own rank too, which gloo cannot."""
        greetings = super()._get_init_p2p_neighbors_ops()  # type: ignore[no-untyped-call, unused-ignore]
        return [greeting for greeting in greetings if greeting.group_peer != self.group_rank]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        found = outputs if isinstance(outputs, list | tuple) else (outputs,)
        for output, facts in zip((out for out in found if isinstance(out, Tensor)), self.expected, strict=False):
            if tuple(output.shape) != facts.shape or str(output.dtype) != f"torch.{facts.dtype}":
                raise ExecutionError(
                    f"stage {self.stage_index} returns {TensorFacts.of(output)} for microbatch {fwd_chunk_id}; the "
                    f"pipeline was made for {facts}",
                    hint="make and step it in the same autocast mode; shapes must not depend on values",
                )
        return outputs

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        wrapped: Any = self.submod
        if isinstance(wrapped, DistributedDataParallel) and last_backward and self.dw_builder is not None:
            wrapped.reducer.prepare_for_backward([])
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
