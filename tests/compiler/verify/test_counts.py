"""What the verifier counts, against figures worked out by hand."""

from __future__ import annotations

import pytest

from opweave.compiler.plan import Instruction, Load, Plan, Residence, Run, Store
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import BufferTraffic, verify
from tests.graphs.build import GraphBuilder, all_graphs, machine
from tests.graphs.edits import without_offsets
from tests.graphs.plans import keep_everything, keep_nothing

GRAPHS = all_graphs()


def test_traffic_of_a_spilled_value_and_a_weight_fetched_twice() -> None:
    """Sizes: x 256 B, w 64 B; a 256 B spilled and fetched; w fetched twice; y 256 B. Compulsory: x, w, y."""
    g = GraphBuilder("spill")
    x, w = g.input("x", 16, 4), g.weight("w", 4, 4)
    a = g.matmul(x, w, "a")
    b = g.unary("relu", x, "b")
    c = g.matmul(b, w, "c")
    graph = g.build(g.binary("add", c, a, "y"))
    do: list[Instruction] = [
        Load("x"),
        Load("w"),
        Run("op0"),
        Store("a"),
        Run("op1"),
        Load("w"),
        Run("op2"),
        Load("a"),
        Run("op3"),
    ]
    lives = {"x": (0, 5), "a": (2, 4), "b": (4, 7), "c": (6, 9), "y": (8, 10)}
    residences = [Residence(name, "sram", *span) for name, span in lives.items()]
    residences += [Residence("w", "sram", 1, 3), Residence("w", "sram", 5, 7), Residence("a", "sram", 7, 9)]
    verification = verify(Plan(graph, machine(), (*do, Store("y")), tuple(residences)))
    assert [str(finding) for finding in verification.faults] == []
    assert verification.level == "residency"
    assert verification.compulsory_bytes == 256 + 64 + 256
    assert verification.total_bytes == 256 + 2 * 64 + 2 * 256 + 256
    assert verification.additional_bytes == 64 + 2 * 256
    assert verification.peak_bytes == 3 * 256  # step 8: a, c and y
    assert verification.arena_bytes == 0
    assert verification.traffic == (
        BufferTraffic("a", 256, 256, 0, 0),
        BufferTraffic("x", 256, 0, 0, 256),
        BufferTraffic("y", 0, 256, 0, 256),
        BufferTraffic("w", 128, 0, 0, 64),
    )


def test_streamed_weights_move_once_for_each_operator_that_reads_them() -> None:
    graph = GRAPHS["shared_weight"]
    verification = verify(keep_everything(graph, streamed=("shared",)))
    assert verification.ok
    nbytes = 32 * 32 * 4
    shared = next(row for row in verification.traffic if row.buffer == "shared")
    assert shared == BufferTraffic("shared", 0, 0, 2 * nbytes, nbytes)
    assert verification.additional_bytes == nbytes
    assert verification.peak_bytes == verify(keep_everything(graph)).peak_bytes - nbytes


def test_peak_of_an_order_keeps_buffers_from_first_to_last_use() -> None:
    """Chain: x 512, w 2048, a 1024, b 1024, v 1024, c 256, y 256 bytes; the peak is x, w and a."""
    verification = verify(Plan.of_order(GRAPHS["chain"], machine()))
    assert (verification.level, verification.additional_bytes) == ("order", 0)
    assert verification.peak_bytes == 512 + 2048 + 1024
    assert verification.total_bytes == verification.compulsory_bytes == 512 + 2048 + 1024 + 256
    streamed = verify(Plan.of_order(GRAPHS["chain"], machine(), streamed=("w",)))
    assert streamed.peak_bytes == 1024 + 1024 + 256  # b, v and c
    assert streamed.additional_bytes == 0


def test_updated_sources_are_read_and_written_once_each() -> None:
    verification = verify(keep_everything(GRAPHS["in_place"]))
    state = next(row for row in verification.traffic if row.buffer == "state")
    assert state == BufferTraffic("state", 256, 256, 0, 512)


@pytest.mark.parametrize("name", ["unused_input", "output_aliases_input", "no_operators"])
def test_sources_nobody_reads_cost_nothing(name: str) -> None:
    graph = GRAPHS[name]
    read = {b for reads in graph.reads for b in reads}
    verification = verify(keep_everything(graph))
    assert {row.buffer for row in verification.traffic} == {b for b in read if b == "x"} | (
        {"y"} if graph.ops else set()
    )


def test_levels() -> None:
    plan = keep_nothing(GRAPHS["diamond"])
    assert verify(Plan.of_order(plan.graph, plan.machine)).level == "order"
    assert verify(without_offsets(plan)).level == "residency"
    assert verify(plan).level == "address"
    assert verify(simulate(plan)).level == "timed"
    # times do not stand in for bytes that have no place
    assert verify(simulate(without_offsets(plan))).level == "residency"
    assert verify(simulate(Plan.of_order(plan.graph, plan.machine))).level == "order"


def test_plan_of_nothing() -> None:
    verification = verify(keep_everything(GRAPHS["no_operators"]))
    assert verification.ok
    assert verification.total_bytes == verification.peak_bytes == verification.arena_bytes == 0
