"""Addresses for a runtime that never moves a tensor, such as TensorFlow Lite Micro."""

from __future__ import annotations

from pathlib import Path

from ..compiler.export.tflite import planned_tflite, whole_life
from ..compiler.pipeline import Budget, run_pass
from ..compiler.plan import Plan
from ..errors import Infeasible, ModelError, OptionError
from .address.exact import ExactPlacement
from .address.placement import PlacementError

__all__ = ["place_whole_life", "save_planned_tflite"]


def place_whole_life(plan: Plan, budget: Budget) -> Plan:
    """``plan``'s order with one address for the whole life of each buffer, as ``tensor_offsets`` needs it.

    Raises:
        PlanError: the plan spills.
        Infeasible: these residences do not fit the scratchpad, or were not fitted within the budget.
    """
    static = whole_life(plan)
    try:
        return run_pass(ExactPlacement(), static, budget)
    except PlacementError as error:
        capacity = plan.machine.scratchpad_memory.capacity_bytes
        why = "cannot be placed" if error.proven else "were not placed in time"
        raise Infeasible(
            f"tensors that keep their place for life {why} in {capacity} bytes: {error.message}",
            required_bytes=max(capacity + 1, error.required_bytes),
            available_bytes=capacity,
            hint="compile for a larger scratchpad, or give it more time",
        ) from error


def save_planned_tflite(plan: Plan, model: str | Path, output: str | Path, budget: Budget) -> None:
    """Write the ``.tflite`` file ``model`` to ``output`` with an address for the whole life of each tensor of ``plan``.

    Raises as ``place_whole_life`` and ``planned_tflite``, ModelError for a file that cannot be read, and OptionError
    for one that cannot be written.
    """
    try:
        data = Path(model).read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read model {str(model)!r}: {error.strerror}") from error
    planned = planned_tflite(data, place_whole_life(plan, budget))
    try:
        Path(output).write_bytes(planned)
    except OSError as error:
        raise OptionError(f"cannot write {str(output)!r}: {error.strerror}", hint="name another file") from error
