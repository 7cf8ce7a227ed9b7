"""What does not fit is said in full: which operator, how much, of what, and what would work."""

from __future__ import annotations

import msgspec
import pytest

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget, Pass, confirm
from opweave.compiler.plan import Plan
from opweave.errors import Infeasible
from opweave.passes.registry import make
from opweave.passes.residency.workset import least_capacity, require_fit
from tests.graphs.build import all_graphs, machine

METHODS = ("residency/refetch", "residency/belady", "residency/least_cost", "residency/ilp")


def wide(count: int = 3) -> Graph:
    """One operator over ``count`` inputs of 100, 101, ... bytes and an output of 64."""
    inputs = [Tensor(f"x{i}", (100 + i,), "int8", Role.INPUT) for i in range(count)]
    op = Op("join", tuple(t.name for t in inputs), ("y",))
    return Graph("wide", (*inputs, Tensor("y", (64,), "int8")), (op,), ("y",))


@pytest.mark.parametrize("name", METHODS)
def test_operator_that_does_not_fit_is_named_with_its_terms(name: str) -> None:
    plan = Plan.of_order(wide(), machine(256, 16))
    with pytest.raises(Infeasible) as failure:
        make(name).apply(plan, Budget.of_seconds(1.0))
    # 3 * 112 + 64, less the padding of whichever buffer lies last: 12 for x0
    assert (failure.value.required_bytes, failure.value.available_bytes) == (388, 256)
    for part in ("'join'", "388", "256", "'sram'", "'x2' 102, 'x1' 101, 'x0' 100, 'y' 64"):
        assert part in failure.value.message
    assert failure.value.hint == "the least scratchpad that works for this model is 388 bytes"


def test_streaming_is_advised_only_where_there_is_a_weight_to_stream() -> None:
    tensors = (
        Tensor("x", (10,), "int8", Role.INPUT),
        Tensor("w", (90,), "int8", Role.WEIGHT),
        Tensor("y", (5,), "int8"),
    )
    graph = Graph("dense", tensors, (Op("dense", ("x", "w"), ("y",)),), ("y",))
    for streamed, advised in (((), True), (("w",), False)):
        with pytest.raises(Infeasible) as failure:
            require_fit(Plan.of_order(graph, machine(14, 1), streamed=streamed))
        assert ("streaming weights may lower it" in failure.value.hint) == advised


def test_long_working_sets_are_summed_up() -> None:
    with pytest.raises(Infeasible, match=r"'x12' 112, .* 'x5' 105, 6 more 574"):
        require_fit(Plan.of_order(wide(13), machine(256, 1)))


def test_the_worst_operator_is_named_and_the_others_counted() -> None:
    graph = all_graphs()["fan_out"]
    with pytest.raises(Infeasible, match="operators do not fit") as failure:
        require_fit(Plan.of_order(graph, machine(16)))
    assert failure.value.required_bytes == least_capacity(Plan.of_order(graph, machine(16)))


def test_streamed_buffers_take_no_room() -> None:
    graph = all_graphs()["shared_weight"]
    resident = least_capacity(Plan.of_order(graph, machine()))
    streamed = least_capacity(Plan.of_order(graph, machine(), streamed=("shared", "w0", "w1")))
    assert resident - streamed == graph.buffers["shared"].nbytes


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("alignment", [1, 16, 48])
@pytest.mark.parametrize("graph", [g for g in all_graphs().values() if g.ops], ids=lambda g: g.name)
def test_least_capacity_is_enough_and_one_byte_less_is_not(graph: Graph, alignment: int, name: str) -> None:
    """Also when it is no multiple of the alignment."""
    step: Pass = make(name)
    least = least_capacity(Plan.of_order(graph, machine(1, alignment)))
    decision = step.apply(Plan.of_order(graph, machine(least, alignment)), Budget.of_seconds(30.0))
    confirm(name, decision.plan, decision.certificate)
    with pytest.raises(Infeasible):
        step.apply(Plan.of_order(graph, machine(least - 1, alignment)), Budget.of_seconds(30.0))


def test_a_graph_without_operators_needs_nothing() -> None:
    plan = Plan.of_order(all_graphs()["no_operators"], machine(1))
    assert least_capacity(plan) == 0
    decision = make("residency/ilp").apply(plan, Budget.of_seconds(1.0))
    assert decision.plan == msgspec.structs.replace(plan, residences=())
