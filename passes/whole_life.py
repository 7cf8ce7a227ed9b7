"""Addresses for a runtime that never moves a tensor, such as TensorFlow Lite Micro."""

from __future__ import annotations

from ..compiler.export.tflite import whole_life
from ..compiler.pipeline import Budget, run_pass
from ..compiler.plan import Plan
from ..errors import Infeasible
from .address.exact import ExactPlacement
from .address.placement import PlacementError

__all__ = ["place_whole_life"]


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
