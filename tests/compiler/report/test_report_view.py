"""What is drawn must be what the plan says and what the verifier counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings

from opweave.compiler.graph import Graph
from opweave.compiler.plan import Plan
from opweave.compiler.report import view
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from tests.compiler.report.report_plans import at_every_level, decided, faulty, spilling
from tests.graphs.build import all_graphs
from tests.graphs.plans import keep_everything, keep_nothing
from tests.graphs.strategies import graphs


def check_counts(plan: Plan) -> None:
    counted = verify(plan)
    drawn = view.bars(plan)
    assert sum(bar.nbytes for bar in drawn) == counted.total_bytes
    assert sum(bar.additional_bytes for bar in drawn) == counted.additional_bytes
    assert max(view.live_bytes(plan), default=0) == counted.peak_bytes


@pytest.mark.parametrize("name", all_graphs())
@pytest.mark.parametrize("keep", [keep_everything, keep_nothing])
def test_bars_and_live_bytes_add_up_to_the_verifiers_count(name: str, keep: Callable[[Graph], Plan]) -> None:
    check_counts(keep(all_graphs()[name]))


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_bars_and_live_bytes_add_up_on_random_graphs(graph: Graph) -> None:
    check_counts(keep_nothing(graph))
    written = {buffer for buffers in graph.writes for buffer in buffers}
    weights = [name for name, base in graph.buffers.items() if base.role == "weight" and name not in written]
    check_counts(keep_nothing(graph, streamed=weights))


def test_regions_that_share_bytes_never_share_time() -> None:
    """Rectangles of the memory map may touch, not overlap, in time as in steps."""
    shown = view.regions(spilling())
    assert len(shown) > 20
    for i, a in enumerate(shown):
        for b in shown[:i]:
            assert a.offset is not None
            assert b.offset is not None
            if a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes:
                assert a.begin >= b.end or b.begin >= a.end
                assert (a.start_s or 0) >= (b.finish_s or 0) or (b.start_s or 0) >= (a.finish_s or 0)


def test_live_bytes_over_time_end_at_zero_and_stay_within_what_addresses_allow() -> None:
    plan = spilling()
    points = view.live_over_time(plan)
    assert points[-1][1] == 0
    assert 0 < max(held for _, held in points) <= plan.machine.scratchpad_memory.capacity_bytes


def test_nothing_of_a_wrong_plan_is_left_out() -> None:
    plan = faulty()
    assert len(view.bars(plan)) == len(plan.instructions)
    assert len(view.regions(plan)) == len(plan.residences or ())
    assert view.regions(plan)[-1].role == view.UNKNOWN_ROLE


def test_only_a_timed_plan_has_times() -> None:
    plans = at_every_level(all_graphs()["chain"])
    assert {name: view.is_timed(plan) for name, plan in plans.items()} == {
        "order": False,
        "residency": False,
        "address": False,
        "timed": True,
    }
    assert view.regions(plans["order"]) == ()
    assert all(region.start_s is None for region in view.regions(plans["address"]))


def test_residences_last_from_their_creation_to_their_last_use() -> None:
    """In a plan that drops nothing, an operand is shown until its last reader finishes, not to the end."""
    plan = decided(all_graphs()["chain"])
    shown = {region.buffer: region for region in view.regions(plan)}
    runs = {i.op: i for i in simulate(plan).instructions if hasattr(i, "op")}
    assert shown["a"].start_s == runs["op0"].start_s
    assert shown["a"].finish_s == runs["op1"].finish_s
