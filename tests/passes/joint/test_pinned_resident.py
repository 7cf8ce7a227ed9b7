"""What is pinned as resident: orders that leave it too little room are refused, whatever it costs to say so."""

from __future__ import annotations

import msgspec
import pytest

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Pin, Plan
from opweave.errors import Infeasible
from opweave.passes.joint.best_first import BestFirstJoint
from opweave.passes.residency.ilp import IlpResidency
from tests.graphs.build import machine


def budget() -> Budget:
    return Budget.of_seconds(60.0, workers=1, deterministic=True)


def crossed(sizes: dict[str, int], pinned: str, capacity: int, alignment: int) -> Plan:
    """``p`` is made or read first and last; ``a`` and ``b`` become ``t`` in between."""
    role = {"x": Role.INPUT, "w": Role.WEIGHT, "a": Role.WEIGHT, "b": Role.WEIGHT}
    tensors = tuple(Tensor(n, (size,), "int8", role.get(n, Role.ACTIVATION)) for n, size in sizes.items())
    ops = (
        Op("first", ("x", "w"), ("p",)),
        Op("between", ("p", "a"), ("t",)),
        Op("apart", ("t", "b"), ("u",)),
        Op("last", ("u", "w", "p"), ("y",)),
    )
    plan = Plan.of_order(Graph("crossed", tensors, ops, ("y",)), machine(capacity, alignment))
    return msgspec.structs.replace(plan, pins=(Pin(pinned, resident=True),))


def test_room_beside_what_is_pinned_counts_bytes_as_well() -> None:
    """Rounded up to the alignment, capacity and buffers are 16 bytes each; but 15 bytes are too much for 14."""
    sizes = {"x": 1, "w": 1, "a": 1, "b": 4, "p": 4, "t": 4, "u": 3, "y": 1}
    plan = crossed(sizes, "p", 14, 4)
    for step in (IlpResidency(), BestFirstJoint()):
        with pytest.raises(Infeasible, match="pinned as resident"):
            step.apply(plan, budget())


@pytest.mark.parametrize("expanded", [1, 100])
def test_no_order_leaves_room_for_a_pinned_weight(expanded: int) -> None:
    """Dropping it is all that would have to be paid: no more than the search of orders can count."""
    sizes = {"x": 1, "w": 10, "a": 10, "b": 10, "p": 1, "t": 1, "u": 1, "y": 1}
    with pytest.raises(Infeasible, match="pinned as resident"):
        BestFirstJoint(max_expanded=expanded).apply(crossed(sizes, "w", 14, 1), budget())
