"""A plan that recomputes something, all the way: as JSON, verified, simulated, executed, drawn."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch

from opweave.compiler.graph import Op
from opweave.compiler.plan import Plan, Recompute, Run
from opweave.compiler.repeatable import is_repeatable
from opweave.compiler.report.text import summary
from opweave.compiler.report.trace import chrome_trace
from opweave.compiler.report.view import bars, live_bytes, regions
from opweave.compiler.simulate import simulate, timeline_summary
from opweave.compiler.verify import verify
from opweave.errors import ExecutionError
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, machine, random_sources
from tests.graphs.edits import with_residence
from tests.graphs.recomputed import recomputing
from tests.graphs.replay import computes_the_right_outputs

PLAN = recomputing()


def test_json_round_trip() -> None:
    timed = simulate(PLAN)
    assert Plan.from_json(timed.to_json()) == timed
    steps = json.loads(PLAN.to_json())["instructions"]
    assert {"do": "recompute", "op": "op0"} in steps


def test_the_order_is_that_of_the_first_runs() -> None:
    assert PLAN.order == (0, 1, 2, 3)
    assert not any(isinstance(i, Recompute) for i in PLAN.with_order(PLAN.order).instructions)


def test_it_moves_nothing_and_takes_time() -> None:
    """Dropping ``a`` would cost a store and a load; recomputing it costs an operator's seconds."""
    assert verify(PLAN).ok
    assert verify(PLAN).additional_bytes == 0
    timed = simulate(PLAN)
    assert verify(timed).ok
    seconds = [i.finish_s - i.start_s for i in timed.instructions if i.finish_s is not None and i.start_s is not None]
    assert seconds[4] == pytest.approx(seconds[1])
    timeline = timeline_summary(timed)
    assert timeline.compute_bound_s == pytest.approx(sum(seconds[1:6]))
    assert timeline.latency_s == pytest.approx(sum(seconds))
    assert computes_the_right_outputs(PLAN)
    assert computes_the_right_outputs(timed)


def test_streamed_weights_are_read_again() -> None:
    g = GraphBuilder("streaming")
    x = g.input("x", 8, 16)
    a = g.matmul(x, g.weight("w", 16, 16), "a")
    c = g.binary("add", g.unary("tanh", a, "b"), x, "c")
    g.binary("mul", c, a, "y")
    plan = msgspec.structs.replace(PLAN, graph=g.build("y"), streamed=("w",))
    verification = verify(plan)
    assert verification.ok
    weight = next(row for row in verification.traffic if row.buffer == "w")
    assert (weight.streamed_bytes, weight.compulsory_bytes) == (2 * 1024, 1024)
    assert verification.additional_bytes == sum(bar.additional_bytes for bar in bars(plan)) == 1024
    sources = random_sources(plan.graph)
    assert run(plan, sources).streamed_bytes == 2 * 1024
    assert same(run(plan, sources), plan.graph, sources)


def test_executed_byte_for_byte() -> None:
    sources = random_sources(PLAN.graph)
    result = run(PLAN, sources)
    assert same(result, PLAN.graph, sources)
    assert (result.runs, result.recomputes, result.loads, result.stores) == (4, 1, 1, 1)
    assert result.moved_bytes == verify(PLAN).total_bytes


def test_operands_that_are_gone_show() -> None:
    """The executor knows nothing of the verifier: operands not resident end it, poisoned ones show as NaN."""
    sources = random_sources(PLAN.graph)
    with pytest.raises(ExecutionError, match="'x', which is not resident"):
        run(with_residence(PLAN, "x", end=4), sources)
    forgotten = msgspec.structs.replace(PLAN.instructions[4], op="op2")
    wrong = msgspec.structs.replace(PLAN, instructions=(*PLAN.instructions[:4], forgotten, *PLAN.instructions[5:]))
    with pytest.raises(ExecutionError, match="'b', which is not resident"):
        run(wrong, sources)
    moved = with_residence(PLAN, "x", begin=0, end=5, offset=512)  # where ``a`` is written
    assert not verify(moved).ok
    assert not same(run(moved, sources), PLAN.graph, sources)


def test_drawn_and_told() -> None:
    timed = simulate(PLAN)
    drawn = bars(timed)
    assert [bar.category for bar in drawn].count("recompute") == 1
    assert sum(bar.nbytes for bar in drawn) == verify(timed).total_bytes
    assert max(live_bytes(timed)) == verify(timed).peak_bytes
    again = [region for region in regions(timed) if region.buffer == "a"][1]
    assert (again.start_s, again.finish_s) == (timed.instructions[4].start_s, timed.instructions[5].finish_s)
    assert "4 runs, 1 recompute, 1 load, 1 store" in summary(timed)
    slices = [event for event in json.loads(chrome_trace(timed))["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in slices if event["cat"] == "recompute"] == ["recompute op0"]
    assert slices[4]["args"]["offset_bytes"] == {"x": 0, "a": 1024}


def test_compute_engines_take_it_as_they_take_a_run() -> None:
    timed = simulate(msgspec.structs.replace(PLAN, machine=machine(1 << 20)))
    engines = {type(i): i.engine for i in timed.instructions}
    assert engines[Recompute] == engines[Run]


def test_calls_that_torch_says_are_random_are_not_repeatable() -> None:
    named = (getattr(torch.ops.aten, name) for name in dir(torch.ops.aten))
    packets = [packet for packet in named if isinstance(packet, torch._ops.OpOverloadPacket)]
    overloads = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]  # type: ignore[no-untyped-call]
    random = [str(o) for o in overloads if torch.Tag.nondeterministic_seeded in o.tags]
    assert len(random) > 50
    for target in random:
        assert not is_repeatable(Op("op", (), (), body=f"{target}(%0)")), target


@pytest.mark.parametrize(
    "body",
    [
        "",
        "aten.relu.default(%0)",
        "aten.convolution.default(%0, %1, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)",
        "aten.native_layer_norm.default(%0, [8], %1, %2, 1e-05)",
        "aten.grid_sampler.default(%0, %1, 0, 0, False)",
        "aten.linalg_vector_norm.default(%0)",
    ],
)
def test_everyday_calls_are_repeatable(body: str) -> None:
    assert is_repeatable(Op("op", (), (), body=body))


@pytest.mark.parametrize("body", ["aten.dropout.default(%0, 0.1, True)", "aten.empty.memory_format([2])"])
def test_dropout_and_memory_nobody_wrote_are_not_repeatable(body: str) -> None:
    assert not is_repeatable(Op("op", (), (), body=body))


def test_operators_that_say_so_are_not_repeatable() -> None:
    """Calls of a program have no body; those with effects are marked."""
    assert is_repeatable(Op("op", (), ()))
    assert not is_repeatable(Op("op", (), (), repeatable=False))
