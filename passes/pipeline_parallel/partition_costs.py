"""What the layers of a model cost on a machine, and the model cut by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...compiler.frontend.dynamo.operators import operator_graph
from ...compiler.frontend.dynamo.traced import sized_example
from ...compiler.frontend.stages.capture import Program, captured_program
from ...compiler.frontend.stages.cuts import Cut, legal_cuts
from ...compiler.frontend.stages.layers import Layer, layers
from ...compiler.frontend.stages.split import StageModules, split
from ...compiler.pipeline import Budget
from ...errors import MachineError, OptionError
from ...hw_models.model import HardwareModel, Link
from ..overlap.tasks import problem_of
from .partition import Partition, partition
from .partition_layers import LayerCost

if TYPE_CHECKING:
    import torch

__all__ = ["ModelPartition", "layer_costs", "partition_model"]

ADAM_BYTES = 8  # two float32 for each element


@dataclass(frozen=True)
class ModelPartition:
    """``program`` in the ``layers`` between ``cuts``, and the ``partition`` of them."""

    program: Program
    cuts: tuple[Cut, ...]
    layers: tuple[LayerCost, ...]
    partition: Partition

    def stages(self) -> StageModules:
        """The stages as modules."""
        ranks = [stage.rank for stage in self.partition.problem.stages]
        return split(self.program, [self.cuts[first - 1] for first in self.partition.cuts], ranks=ranks)


def partition_model(
    model: torch.nn.Module,
    example_inputs: Sequence[Any],
    ranks: int,
    microbatches: int,
    machine: HardwareModel,
    budget: Budget,
    *,
    named_inputs: Mapping[str, Any] | None = None,
    max_tensors: int | None = None,
    link: str | None = None,
    optimizer_bytes: int = ADAM_BYTES,
    **options: Any,
) -> ModelPartition:
    """Cut ``model`` into stages for ``ranks`` ranks, each a ``machine``; ``options`` are those of ``partition``.

    Args:
        model: in the mode in which it is trained.
        example_inputs: one microbatch, real or fake.
        ranks: their number.
        microbatches: of one step.
        machine: what each rank is.
        budget: the search ends with it.
        named_inputs: inputs given by name.
        max_tensors: how many tensors may pass a cut; ``None`` is the fewest with which there are enough layers.
        link: as for ``layer_costs``.
        optimizer_bytes: as for ``layer_costs``.
        options: ``chunks``, ``placement``, ``memory_limit`` and so on.

    Raises:
        Infeasible: no cuts keep the memory limit.
        ModelError: the model cannot be captured, or a layer not be differentiated.
        OptionError: it has fewer legal cuts than are needed, or as ``partition``.
        MachineError: as ``layer_costs``.
    """
    program = captured_program(model, example_inputs, named_inputs)
    placement = options.get("placement", "loop")
    stages = ranks * options.get("chunks", 1) if isinstance(placement, str) else len(placement)
    cuts = _enough_cuts(program, stages, max_tensors)
    costs = layer_costs(program, cuts, machine, link=link, optimizer_bytes=optimizer_bytes)
    options.setdefault("input_gradient", False)
    return ModelPartition(program, cuts, costs, partition(costs, ranks, microbatches, budget, **options))


def layer_costs(
    program: Program,
    cuts: Sequence[Cut],
    machine: HardwareModel,
    *,
    link: str | None = None,
    optimizer_bytes: int = ADAM_BYTES,
) -> tuple[LayerCost, ...]:
    """What the layers between ``cuts`` take on ``machine``, in ns and bytes, by its cost model of fused kernels.

    F, I and W are graphs of their own, as a compiled stage runs them (``frontend.dynamo.halves``): what I and W
    compute again is counted there. ``link`` names the link between ranks, the machine's first where ``None``. Every
    element of a parameter that is trained takes its own bytes twice, weight and gradient, and ``optimizer_bytes``.

    Raises:
        MachineError: the machine has no such link, or no rate for an operator.
        ModelError: a layer cannot be differentiated.
    """
    wire = _link(machine, link)
    found, times = [], dict[int, tuple[int, int, int]]()
    for place, layer in enumerate(layers(program, cuts)):
        if id(layer.graphs) not in times:
            times[id(layer.graphs)] = _times(layer, machine)
        passed = cuts[place] if place < len(cuts) else None
        forward, backward = (passed.nbytes, passed.gradient_bytes) if passed else (0, 0)
        found.append(
            LayerCost(
                layer.name,
                *times[id(layer.graphs)],
                until_input_gradient_bytes=layer.until_input_gradient_bytes,
                until_weight_gradient_bytes=layer.until_weight_gradient_bytes,
                between_gradients_bytes=layer.between_gradients_bytes,
                parameter_bytes=_resident(layer, optimizer_bytes),
                forward_bytes=forward,
                backward_bytes=backward,
                forward_send_ns=_send_ns(forward, wire),
                backward_send_ns=_send_ns(backward, wire),
                shared=layer.shared,
            )
        )
    return tuple(found)


def _times(layer: Layer, machine: HardwareModel) -> tuple[int, int, int]:
    """Nanoseconds of F, I and W, kernel after kernel."""
    seconds = []
    for half in layer.halves:
        if half is None:
            seconds.append(0.0)
            continue
        tasks = problem_of(operator_graph(half, sized_example).graph, machine).tasks
        seconds.append(sum(task.modes[task.given_mode].seconds for task in tasks))
    forward, first, second = (round(1e9 * one) for one in seconds)
    return forward, first, second


def _resident(layer: Layer, optimizer_bytes: int) -> int:
    total = sum(buffer.nbytes for buffer in layer.buffers.values())
    for parameter in layer.parameters.values():
        trained = parameter.numel() * (parameter.element_size() + optimizer_bytes) if parameter.requires_grad else 0
        total += parameter.nbytes + trained
    return total


def _link(machine: HardwareModel, name: str | None) -> Link:
    links = [link for link in machine.links if name in (None, link.name)]
    if not links:
        what = f"no link {name!r}" if machine.links else "no links"
        known = ", ".join(link.name for link in machine.links)
        raise MachineError(
            f"machine {machine.name!r} has {what}, over which stages could send",
            hint=f"it has {known}" if known else "add a [[links]] table to the machine's file",
        )
    return links[0]


def _send_ns(nbytes: int, link: Link) -> int:
    return round(1e9 * (link.latency_s + nbytes / link.bandwidth_bytes_per_s)) if nbytes else 0


def _enough_cuts(program: Program, stages: int, max_tensors: int | None) -> tuple[Cut, ...]:
    """Cuts for as many stages, at which the fewest tensors pass. Raises OptionError."""
    most = 0
    for tensors in (max_tensors,) if max_tensors is not None else range(1, 17):
        cuts = legal_cuts(program, tensors)
        most = max(most, len(cuts))
        if len(cuts) >= stages - 1:
            return cuts
    raise OptionError(
        f"{program.name} has {most} legal cuts; {stages} stages need {stages - 1}",
        hint="use fewer ranks or chunks, or let more tensors pass a cut (max_tensors)",
    )
