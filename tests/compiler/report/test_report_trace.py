"""The Chrome trace holds every instruction at its time, and only claims what the format allows."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from opweave.compiler.plan import Load, Plan, Store
from opweave.compiler.report import view
from opweave.compiler.report.trace import chrome_trace
from opweave.compiler.simulate import simulate
from opweave.errors import PlanError
from tests.compiler.report.report_plans import at_every_level, dense, faulty, hostile, spilling
from tests.compiler.verify.collective_faults import timed
from tests.graphs.build import all_graphs
from tests.graphs.edits import with_times
from tests.graphs.recomputed import recomputing


def events_of(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The trace's events by phase."""
    document = json.loads(chrome_trace(plan))
    phases: dict[str, list[dict[str, Any]]] = {}
    for event in document["traceEvents"]:
        phases.setdefault(event["ph"], []).append(event)
    return phases


@pytest.mark.parametrize("plan", [spilling(), hostile(), faulty(), simulate(recomputing())])
def test_every_instruction_is_one_slice_on_its_engines_thread(plan: Plan) -> None:
    events = events_of(plan)
    threads = {e["tid"]: e["args"]["name"] for e in events["M"] if e["name"] == "thread_name"}
    assert len(events["X"]) == len(plan.instructions)
    for event, instruction in zip(events["X"], plan.instructions, strict=True):
        assert threads[event["tid"]] == instruction.engine
        assert event["ts"] == pytest.approx((instruction.start_s or 0) * 1e6, abs=1e-3)
        assert event["ts"] + event["dur"] == pytest.approx((instruction.finish_s or 0) * 1e6, abs=1e-3)
        assert event["dur"] >= 0
        subject = instruction.buffer if isinstance(instruction, Load | Store) else instruction.op
        assert subject in event["name"]


def test_slices_of_one_thread_do_not_overlap_for_a_reader_who_truncates() -> None:
    """Perfetto takes ``int(ts * 1000)`` for the nanosecond; neighbours must not come to overlap by one."""
    for plan in (spilling(), dense()):
        free: dict[int, int] = {}
        for event in events_of(plan)["X"]:
            begin = int(event["ts"] * 1000)
            assert begin >= free.get(event["tid"], 0)
            free[event["tid"]] = begin + int(event["dur"] * 1000)


def test_slices_say_where_their_operands_lie() -> None:
    plan = spilling()
    graph = plan.graph
    touched = {op.name: buffers for op, buffers in zip(graph.ops, graph.touches, strict=True)}
    where = {(r.buffer, s): r.offset for r in plan.residences or () for s in range(r.begin, r.end)}
    for step, (event, instruction) in enumerate(zip(events_of(plan)["X"], plan.instructions, strict=True)):
        buffers = (instruction.buffer,) if isinstance(instruction, Load | Store) else touched[instruction.op]
        expected = {b: where[b, step] for b in buffers if b not in plan.streamed}
        assert event["args"]["offset_bytes"] == expected


def test_the_counter_follows_the_bytes_held() -> None:
    plan = spilling()
    counted = [(e["ts"], e["args"]["bytes"]) for e in events_of(plan)["C"]]
    assert counted == [(pytest.approx(t * 1e6, abs=1e-3), held) for t, held in view.live_over_time(plan)]


def test_every_load_has_an_arrow_to_its_first_user() -> None:
    """An arrow starts inside the load's slice and ends where the run starts; ids pair them."""
    plan = spilling()
    events = events_of(plan)
    loads = [step for step, i in enumerate(plan.instructions) if isinstance(i, Load)]
    assert loads
    assert Counter(e["id"] for e in events["s"]) == Counter(loads)
    ends = {e["id"]: e for e in events["f"]}
    runs = {(e["tid"], e["ts"]) for e in events["X"] if e["cat"] == "run"}
    for start in events["s"]:
        load = events["X"][start["id"]]
        assert load["ts"] <= start["ts"] <= load["ts"] + load["dur"]
        assert start["tid"] == load["tid"]
        end = ends[start["id"]]
        assert (end["tid"], end["ts"]) in runs
        assert end["ts"] >= start["ts"]


def test_times_beyond_any_clock_still_make_a_trace() -> None:
    """A faulty plan is drawn too; 1e308 s are more nanoseconds than a float holds."""
    plan = with_times(spilling(), 0, 1e300, 1e308)
    assert len(events_of(plan)["X"]) == len(plan.instructions)


@pytest.mark.parametrize("level", ["order", "residency", "address"])
def test_a_plan_without_times_has_no_trace(level: str) -> None:
    with pytest.raises(PlanError, match="start and a finish"):
        chrome_trace(at_every_level(all_graphs()["chain"])[level])


def test_collectives_are_slices_of_their_links_and_waits_of_the_compute_engine() -> None:
    events = events_of(timed())
    threads = {e["tid"]: e["args"]["name"] for e in events["M"] if e["name"] == "thread_name"}
    shown = [(e["name"], e["cat"], threads[e["tid"]], e["dur"]) for e in events["X"]]
    assert shown[1] == ("collective op1", "collective", "net", 1e6)
    assert shown[3] == ("wait op1", "wait", "core", 0)
