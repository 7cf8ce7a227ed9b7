"""What the order passes believe an eviction costs, counted by hand."""

from __future__ import annotations

import pytest

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.plan import Plan
from opweave.passes.order.problem import OrderProblem
from tests.graphs.build import machine


@pytest.mark.parametrize(("outputs", "moved"), [(("d",), 20), (("a", "d"), 10)])
def test_an_output_is_stored_anyway_so_evicting_it_costs_its_load_alone(outputs: tuple[str, ...], moved: int) -> None:
    """``a`` has to leave while ``b`` is made and is back for the last operator."""
    sizes = {"a": 10, "b": 40, "c": 10, "d": 10}
    tensors = (Tensor("x", (10,), "int8", Role.INPUT), *(Tensor(n, (size,), "int8") for n, size in sizes.items()))
    ops = (Op("p", ("x",), ("a",)), Op("q", ("x",), ("b",)), Op("r", ("b",), ("c",)), Op("s", ("a", "c"), ("d",)))
    plan = Plan.of_order(Graph("evicting", tensors, ops, outputs), machine(55, 1))
    assert OrderProblem.of(plan).spill_bytes(plan.order) == moved
