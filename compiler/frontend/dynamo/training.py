"""Training under a memory limit: attempts with ever less saved between the halves, until a step fits.

How many bytes a step needs is known once both halves are lowered and planned. The partition is chosen before, for a
limit on what is saved between them; the excess of one attempt is what the next one has to save less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from ....hw_models.model import HardwareModel
from ...partition import Partition, PartitionProblem
from ...runtime.device.offload import fetched, sent
from ...runtime.device.program import Origin, Program, Ref
from .joint import Halves, partition
from .report import GraphReport

__all__ = ["ATTEMPTS", "UNLIMITED", "Partitioner", "half", "saved_figures", "step_bytes"]

ATTEMPTS = 7
#: More than any device holds: a limit that does not limit.
UNLIMITED = 1 << 60

#: Answers a problem within a limit in bytes, given answers to begin with.
ChooseWithin = Callable[[PartitionProblem, int, Sequence[Any]], Partition]


@dataclass
class Partitioner(CustomPartitionerFn):
    """Divides the joint graph, saving at most ``saved_limit`` bytes on the device; ``halves`` is what it made last.

    Without ``choose`` torch decides what is saved. ``cut`` may change the joint graph before.
    """

    choose: ChooseWithin | None
    machine: HardwareModel
    saved_limit: int
    key: str
    cut: Callable[[torch.fx.GraphModule, Sequence[int], int], torch.fx.GraphModule] | None = None
    halves: Halves | None = field(default=None, repr=False)

    def __call__(
        self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
        """The forward and the backward graph, as Inductor asks for them."""
        choose = self.choose
        if self.cut is not None:
            gm = self.cut(gm, kwargs.get("static_lifetime_input_indices") or (), kwargs["num_fwd_outputs"])
        self.halves = partition(
            gm,
            joint_inputs,
            num_fwd_outputs=kwargs["num_fwd_outputs"],
            static_lifetime_input_indices=kwargs.get("static_lifetime_input_indices"),
            machine=self.machine,
            choose=None if choose is None else lambda problem, starts: choose(problem, self.saved_limit, starts),
            offload=True,
        )
        return self.halves.forward, self.halves.backward

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickled, as Inductor's settings are for the cache's key, it is its name."""
        return str, (self.uuid(),)

    def uuid(self) -> str:
        """What the cache knows it by."""
        return f"opweave {self.key} {self.saved_limit}"


def step_bytes(reports: Sequence[GraphReport]) -> int:
    """Most bytes of the device in use in a step made of ``reports``: each half gives its arena back behind itself.

    What the caller keeps for the forward half it keeps for the backward half, too.
    """
    held = max((report.held_bytes for report in reports), default=0)
    return held + max((report.allocated_bytes for report in reports), default=0)


def half(program: Program, module: torch.fx.GraphModule, phase: str, halves: Halves | None) -> Program:
    """``program`` as half of a training step: what it is handed, and what waits in host memory in between.

    ``module`` is the graph it was made of; ``halves`` is how the step was divided, if that was ours to do.
    """
    offloaded = {halves.saved[p] for p in halves.offloaded} if halves is not None else set()
    if phase == "backward":
        return fetched(_handed_over(program), offloaded)
    if phase == "forward" and halves is not None and offloaded:
        returned = torch.utils._pytree.arg_tree_leaves(*module.graph.output_node().args)
        saved = range(len(returned) - len(halves.saved), len(returned))
        return sent(program, [p for p in saved if getattr(returned[p], "name", None) in offloaded])
    return program


def _handed_over(program: Program) -> Program:
    """A backward program whose inputs are the caller's no more: what autograd saved for it, and the gradients it gets.

    Forward inputs that were saved (AOTAutograd names them ``primals``) are still held by whoever passed them.
    """
    storages = dict(program.storages)
    for item in program.inputs:
        if isinstance(item, Ref) and not item.name.startswith("primals"):
            storages[item.name] = replace(storages[item.name], origin=Origin.GIVEN)
    return replace(program, storages=storages)


def saved_figures(phase: str, answer: Partition | None) -> Mapping[str, Any]:
    """What a report says of how a step was divided, in the forward half's."""
    if answer is None or phase != "forward":
        return {}
    return {
        "saved_bytes": answer.recount.kept_bytes,
        "offloaded_bytes": sum(answer.problem.values[v].nbytes for v in answer.offloaded),
        "recomputed_s": answer.recount.again_ps / 1e12,
    }
