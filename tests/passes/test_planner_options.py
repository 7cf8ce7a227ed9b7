"""A planner refuses, before any model is read, a pass that does not exist or decides something else."""

from __future__ import annotations

import pytest

from opweave.errors import OptionError
from opweave.passes.planner import Planner


@pytest.mark.parametrize(
    ("decision", "spec"),
    [("order", "address/exact"), ("residency", "order/beam(width=4)"), ("address", "order/beam")],
)
def test_a_pass_of_another_decision_is_refused(decision: str, spec: str) -> None:
    """`--address order/beam` would otherwise end in a plan without addresses that looks complete."""
    with pytest.raises(OptionError, match=f"does not decide {decision}") as refusal:
        Planner(**{decision: spec})
    assert f"{decision}/" in refusal.value.hint


@pytest.mark.parametrize("spec", ["order/bem", "order/beam(widht=4)", "order/beam(width=0)"])
def test_a_misspelt_pass_is_refused_before_planning(spec: str) -> None:
    with pytest.raises(OptionError):
        Planner(order=spec)
