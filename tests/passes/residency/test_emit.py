"""How a residency is written down: what is loaded and stored, when, and what is left alone."""

from __future__ import annotations

import pytest

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Load, Plan, Run, Store
from opweave.compiler.verify import verify
from opweave.passes.registry import make
from opweave.passes.residency.emit import emit
from opweave.passes.residency.gaps import Gap, GapProblem
from tests.graphs.build import all_graphs, machine


def written(plan: Plan, *dropped: Gap) -> list[str]:
    """The instructions of ``plan``'s order with exactly ``dropped`` dropped, one short word each."""
    problem = GapProblem.of(plan)
    resident = emit(plan, problem, {problem.index[gap] for gap in dropped})
    assert not verify(resident).faults
    assert verify(resident).additional_bytes == problem.additional_bytes(problem.index[gap] for gap in dropped)
    words = {Load: "load", Store: "store"}
    return [f"{words[type(i)]} {i.buffer}" if isinstance(i, Load | Store) else i.op for i in resident.instructions]


def three_uses(*, output: bool = False, role: Role = Role.ACTIVATION) -> Plan:
    """``a`` is made, or is a source, and used at positions 1 and 3, with something else between."""
    tensors = [Tensor("x", (8,), "int8", Role.INPUT), Tensor("a", (4,), "int8", role)]
    tensors += [Tensor(name, (2,), "int8") for name in ("b", "c", "d")]
    first = [] if role.is_source else [Op("make_a", ("x",), ("a",))]
    ops = [*first, Op("b", ("a",), ("b",)), Op("c", ("b",), ("c",)), Op("d", ("a", "c"), ("d",))]
    return Plan.of_order(Graph("g", tuple(tensors), tuple(ops), ("d", "a") if output else ("d",)), machine(64, 1))


def test_kept_value_is_neither_stored_nor_loaded() -> None:
    assert written(three_uses()) == ["load x", "make_a", "b", "c", "d", "store d"]


def test_dropped_value_is_stored_at_its_last_use_and_loaded_before_the_next() -> None:
    expected = ["load x", "make_a", "b", "store a", "c", "load a", "d", "store d"]
    assert written(three_uses(), Gap("a", 1)) == expected


def test_value_dropped_twice_is_stored_once() -> None:
    expected = ["load x", "make_a", "store a", "load a", "b", "c", "load a", "d", "store d"]
    assert written(three_uses(), Gap("a", 0), Gap("a", 1)) == expected


def test_output_is_stored_when_final_so_dropping_it_costs_one_load() -> None:
    expected = ["load x", "make_a", "store a", "b", "c", "load a", "d", "store d"]
    assert written(three_uses(output=True), Gap("a", 1)) == expected


def test_source_is_dropped_without_a_store() -> None:
    assert written(three_uses(role=Role.WEIGHT), Gap("a", 0)) == ["load a", "b", "c", "load a", "d", "store d"]


def test_update_in_place_makes_the_backing_copy_stale() -> None:
    """The state is stored, updated, and must be stored again."""
    plan = Plan.of_order(all_graphs()["in_place"], machine())
    words = written(plan, *(Gap("state", after) for after in range(3)))
    assert [word for word in words if "state" in word or word in ("op1", "op3")] == [
        "load state",  # for op0, which reads it: the copy behind it stays current
        "load state",
        "op1",
        "store state",
        "load state",
        "op3",
        "store state",  # final; op5 reads it once more
        "load state",
    ]


def test_source_that_is_only_overwritten_is_loaded_and_counted() -> None:
    """Its old bytes may survive a partial write, so they have to be there; no compulsory read covers them."""
    tensors = (
        Tensor("x", (4,), "int8", Role.INPUT),
        Tensor("state", (16,), "int8", Role.OPTIMIZER_STATE),
        Tensor("part", (4,), "int8", Role.ACTIVATION, "state"),
    )
    plan = Plan.of_order(Graph("g", tensors, (Op("write", ("x",), ("part",)),), ("part",)), machine(64, 1))
    assert written(plan) == ["load state", "load x", "write", "store state"]
    assert GapProblem.of(plan).base_bytes == 16


def test_streamed_and_empty_buffers_are_left_alone() -> None:
    plan = Plan.of_order(all_graphs()["shared_weight"], machine(), streamed=("shared", "w0", "w1"))
    assert not any("shared" in word or "w0" in word for word in written(plan))
    assert GapProblem.of(plan).base_bytes == plan.graph.buffers["shared"].nbytes  # read twice
    assert not any("none" in word for word in written(Plan.of_order(all_graphs()["zero_bytes"], machine())))


def test_unused_result_is_resident_during_its_operator_only() -> None:
    plan = Plan.of_order(all_graphs()["multi_output"], machine())
    resident = emit(plan, GapProblem.of(plan), ())
    step = next(s for s, i in enumerate(resident.instructions) if isinstance(i, Run) and i.op == "op0")
    unused = next(r for r in resident.residences or () if r.buffer == "unused")
    assert (unused.begin, unused.end, unused.offset) == (step, step + 1, None)


@pytest.mark.parametrize("name", ["residency/belady", "residency/refetch"])
def test_taking_the_decision_again_drops_the_earlier_one(name: str) -> None:
    plan = Plan.of_order(all_graphs()["fan_out"], machine(5120))
    budget = Budget.of_seconds(10.0)
    once = make(name).apply(plan, budget).plan
    assert make(name).apply(make("residency/ilp").apply(plan, budget).plan, budget).plan == once
