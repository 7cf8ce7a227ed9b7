"""Exposed time, counted on plans whose times are written by hand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.overlap import exposed_seconds, lines_of
from opweave.compiler.plan import CollectiveStart, Plan, Run
from tests.compiler.verify.collective_faults import communicating, twice


def at(plan: Plan, *spans: tuple[float, float]) -> Plan:
    """``plan`` with these times, instruction by instruction."""
    steps = [
        msgspec.structs.replace(i, start_s=start, finish_s=finish)
        for i, (start, finish) in zip(plan.instructions, spans, strict=True)
    ]
    return msgspec.structs.replace(plan, instructions=tuple(steps))


def test_what_compute_covers_is_hidden() -> None:
    """The collective flies from 1 to 4, compute runs from 1 to 2.5 meanwhile: half of it is exposed."""
    plan = at(communicating(), (0, 1), (1, 4), (1, 2.5), (4, 4), (4, 5))
    assert exposed_seconds(plan) == {"op1": 1.5}
    before = at(communicating(Run("op0"), Run("op1"), Run("op2"), Run("op3")), (0, 1), (1, 4), (4, 5.5), (5.5, 6.5))
    (line,) = lines_of(before, plan, {}, {"op1": "because"})
    assert (line.exposed_before_s, line.exposed_after_s, line.hidden_by) == (3, 1.5, ("op2",))
    assert (line.kind, line.nbytes, line.reason) == ("all_reduce", 512, "because")


def test_two_in_flight_share_what_they_expose() -> None:
    """From 0 to 2 one alone, from 2 to 4 both, then the other one."""
    plan = at(twice(), (0, 4), (2, 5), (4, 4), (5, 5))
    assert exposed_seconds(plan) == {"op0": 3, "op1": 2}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10), st.booleans()), min_size=1, max_size=6))
def test_the_sum_is_the_time_of_nothing_but_communication(spans: list[tuple[int, int, bool]]) -> None:
    """Counted again second by second; the graph's dependencies do not matter to the count."""
    plan = communicating()
    collective, compute = plan.graph.ops[1], plan.graph.ops[2]
    ops, steps = [], []
    for number, (start, seconds, flies) in enumerate(spans):
        op = msgspec.structs.replace(collective if flies else compute, name=f"n{number}", outputs=(f"t{number}",))
        ops.append(msgspec.structs.replace(op, inputs=("x",), body=""))
        kind = CollectiveStart if flies else Run
        steps.append(kind(f"n{number}", "", float(start), float(start + seconds)))
    tensors = [msgspec.structs.replace(plan.graph.tensor["x"])]
    tensors += [msgspec.structs.replace(plan.graph.tensor["a"], name=f"t{n}", buffer="") for n in range(len(spans))]
    graph = msgspec.structs.replace(plan.graph, ops=tuple(ops), tensors=tuple(tensors), outputs=())
    exposed = exposed_seconds(msgspec.structs.replace(plan, graph=graph, instructions=tuple(steps)))
    seconds_alone = sum(
        any(f and s <= t < s + d for s, d, f in spans) and not any(not f and s <= t < s + d for s, d, f in spans)
        for t in range(40)
    )
    assert sum(exposed.values()) == pytest.approx(seconds_alone)
