"""The published baselines: addresses in the order of first use, replacement where no gap is large enough."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget, Decision, confirm
from opweave.compiler.plan import Load, Pin, Plan
from opweave.errors import Infeasible, OptionError
from opweave.passes.joint.linear import LinearAllocation
from opweave.passes.residency.gaps import GapProblem
from opweave.passes.residency.refetch import RefetchResidency
from opweave.passes.residency.workset import least_capacity
from tests.graphs.build import all_graphs, machine
from tests.passes.residency.crowded import crowded_graphs
from tests.passes.residency.exhaustive import least_additional_bytes
from tests.passes.residency.training import tight, training_graph

BOTH = (LinearAllocation("belady"), LinearAllocation("greedy"))


def budget() -> Budget:
    return Budget.of_seconds(60.0, workers=1, deterministic=True)


def traffic(decision: Decision) -> int:
    """Additional bytes, once the verifier has recounted them."""
    confirm("joint/linear", decision.plan, decision.certificate)
    assert decision.certificate is not None
    return decision.certificate.value


def offsets(decision: Decision) -> dict[str, list[int | None]]:
    """Offsets of each buffer's residences, in the order of their steps."""
    found: dict[str, list[int | None]] = {}
    for residence in decision.plan.residences or ():
        found.setdefault(residence.buffer, []).append(residence.offset)
    return found


def program(sizes: dict[str, int], *lines: str, outputs: tuple[str, ...], capacity: int, alignment: int = 1) -> Plan:
    """Operators written as ``"y = a b"``; a name that no operator makes is an input; int8 rows of the given sizes."""
    ops = []
    for line in lines:
        made, _, read = line.partition(" = ")
        ops.append(Op(f"op_{made}", tuple(read.split()), (made,)))
    produced = {op.outputs[0] for op in ops}
    roles = {name: Role.ACTIVATION if name in produced else Role.INPUT for name in sizes}
    tensors = tuple(Tensor(name, (size,), "int8", roles[name]) for name, size in sizes.items())
    return Plan.of_order(Graph("program", tensors, tuple(ops), outputs), machine(capacity, alignment))


@settings(max_examples=100, deadline=None)
@given(crowded_graphs(), st.sampled_from((0.0, 0.2, 0.5, 0.9)), st.sampled_from((1, 8)))
def test_plans_are_valid_and_between_the_optimum_and_no_residency(graph: Graph, share: float, alignment: int) -> None:
    plan = tight(graph, share, alignment=alignment)
    least, most = least_additional_bytes(plan), traffic(RefetchResidency().apply(plan, budget()))
    for method in BOTH:
        decision = method.apply(plan, budget())
        assert least <= traffic(decision) <= most
        assert all(residence.offset is not None for residence in decision.plan.residences or ())


@settings(max_examples=50, deadline=None)
@given(crowded_graphs(), st.integers(0, 60))
def test_capacity_may_be_no_multiple_of_the_alignment(graph: Graph, more_bytes: int) -> None:
    least = least_capacity(Plan.of_order(graph, machine(1, 8)))
    for method in BOTH:
        traffic(method.apply(Plan.of_order(graph, machine(least + more_bytes, 8)), budget()))


@pytest.mark.parametrize("name", sorted(all_graphs()))
def test_with_ample_room_nothing_is_replaced(name: str) -> None:
    plan = Plan.of_order(all_graphs()[name], machine(1 << 20))
    for method in BOTH:
        decision = method.apply(plan, budget())
        assert traffic(decision) == GapProblem.of(plan).base_bytes
        assert all(len(placed) == 1 for placed in offsets(decision).values())


def test_the_smallest_gap_that_holds_a_buffer_is_taken() -> None:
    """Of gaps of 4 and 2 bytes the higher, smaller one is taken when 2 are needed, as by TensorFlow Lite."""
    sizes = {"a": 4, "k": 1, "b": 2, "m": 1, "n": 1, "p": 1, "q": 1, "y": 2, "z": 1}
    plan = program(sizes, "n = a k b m", "p = n a b", "q = k p", "y = q", "z = y k m", outputs=("z",), capacity=100)
    placed = offsets(LinearAllocation().apply(plan, budget()))
    assert (placed["a"], placed["k"], placed["b"], placed["m"], placed["n"]) == ([0], [4], [5], [7], [8])
    assert placed["q"] == [8]  # where n was, the smallest of three gaps
    assert placed["y"] == [5]  # where b was, although a's place is lower


def test_belady_takes_the_furthest_and_greedy_the_fewest_bytes() -> None:
    """One byte is missing. The large buffer is needed last, the small one sooner."""
    sizes = {"x": 1, "big": 6, "small": 2, "c": 2, "d": 1, "e": 1, "y": 1}
    lines = ("big = x", "small = x", "c = x", "d = c", "e = small d", "y = big e")
    plan = program(sizes, *lines, outputs=("y",), capacity=10)
    fetched = {
        method.evict: [i.buffer for i in decision.plan.instructions if isinstance(i, Load)]
        for method in BOTH
        for decision in (method.apply(plan, budget()),)
    }
    assert fetched == {"belady": ["x", "big"], "greedy": ["x", "small"]}


def test_greedy_finds_the_cheapest_run_of_neighbours() -> None:
    """Two small neighbours make room where a larger buffer would as well; buffers apart from each other do not."""
    sizes = {"x": 1, "a": 2, "b": 5, "c": 2, "d": 2, "e": 4, "f": 1, "y": 1}
    lines = ("a = x", "b = x", "c = x", "d = x", "e = x", "f = e", "y = a b c d f")
    plan = program(sizes, *lines, outputs=("y",), capacity=13)
    decision = LinearAllocation("greedy").apply(plan, budget())
    assert [i.buffer for i in decision.plan.instructions if isinstance(i, Load)] == ["x", "c", "d"]
    assert traffic(decision) == 8


def test_operands_in_the_way_are_a_failure_or_laid_out_afresh() -> None:
    """Room enough in bytes, but the operands split it: the baselines give up, unless told to start afresh."""
    sizes = {"x": 3, "a": 3, "b": 3, "y": 6, "z": 1}
    plan = program(sizes, "a = x", "b = a x", "y = a b", "z = y", outputs=("z",), capacity=12)
    for method in BOTH:
        decision = method.apply(plan, budget())
        assert traffic(decision) == 12  # a and b are stored and loaded
        assert "in the way: 1" in decision.note
        with pytest.raises(Infeasible, match="no gap of 6 bytes for 'y'") as failure:
            LinearAllocation(method.evict, give_up=True).apply(plan, budget())
        assert failure.value.required_bytes == 15
        assert failure.value.available_bytes == 12


def test_a_working_set_that_does_not_fit_is_named() -> None:
    with pytest.raises(Infeasible, match="needs"):
        LinearAllocation().apply(Plan.of_order(all_graphs()["diamond"], machine(16)), budget())


def test_pins_and_banks_are_refused() -> None:
    graph = all_graphs()["diamond"]
    with pytest.raises(OptionError, match="pins"):
        LinearAllocation().apply(Plan.of_order(graph, machine(), pins=[Pin("a", offset=0)]), budget())
    with pytest.raises(OptionError, match="banks"):
        LinearAllocation().apply(Plan.of_order(graph, machine(4096).with_banks(2048, 2048)), budget())


def test_same_input_same_plan() -> None:
    plan = tight(training_graph(20, 4), 0.3)
    for method in BOTH:
        assert method.apply(plan, budget()) == method.apply(plan, budget())
