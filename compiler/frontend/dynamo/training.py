"""Training under a memory limit: attempts with ever less saved between the halves, until a step fits.

How many bytes a step needs is known once both halves are lowered and planned. The partition is chosen before, for a
limit on what is saved between them; the excess of one attempt is what the next one has to save less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from ....hw_models.model import HardwareModel
from ...partition import Partition, PartitionProblem
from .joint import Halves, partition
from .report import GraphReport

__all__ = ["ATTEMPTS", "UNLIMITED", "Partitioner", "step_bytes"]

ATTEMPTS = 7
#: More than any device holds: a limit that does not limit.
UNLIMITED = 1 << 60

#: Answers a problem within a limit in bytes, given answers to begin with.
ChooseWithin = Callable[[PartitionProblem, int, Sequence[Any]], Partition]


@dataclass
class Partitioner(CustomPartitionerFn):
    """Divides the joint graph, saving at most ``saved_limit`` bytes on the device; ``halves`` is what it made last."""

    choose: ChooseWithin
    machine: HardwareModel
    saved_limit: int
    key: str
    halves: Halves | None = field(default=None, repr=False)

    def __call__(
        self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
        """The forward and the backward graph, as Inductor asks for them."""
        self.halves = partition(
            gm,
            joint_inputs,
            num_fwd_outputs=kwargs["num_fwd_outputs"],
            static_lifetime_input_indices=kwargs.get("static_lifetime_input_indices"),
            machine=self.machine,
            choose=lambda problem, starts: self.choose(problem, self.saved_limit, starts),
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
