"""Plans within memory limits, from what everything takes down to the least: verified, within it, never slower."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, OpKind, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Load
from opweave.compiler.runtime.device.layout import allocated_bytes
from opweave.compiler.verify import verify
from opweave.errors import Infeasible
from opweave.passes.offload.planner import LimitedPlan, least_limit, plan_within, plans_within
from opweave.passes.offload.reduction import with_residents, without_bytes
from tests.support.small_programs import device_machine

ALIGNMENT = 64
MACHINE = device_machine(1e9, latency_s=1e-7)


def budget(seconds: float = 10.0) -> Budget:
    return Budget.of_seconds(seconds, deterministic=True, workers=1)


def chain(layers: int, nbytes: int = 4096, activation: int = 512, flops: int = 10**7) -> Graph:
    """Weights used one after another, an activation passed on, and a result for the caller."""
    tensors = [Tensor("x", (activation,), "uint8", Role.INPUT)]
    ops = []
    before = "x"
    for i in range(layers):
        tensors += [Tensor(f"w{i}", (nbytes,), "uint8", Role.INPUT), Tensor(f"h{i}", (activation,), "uint8")]
        ops.append(Op(f"op{i}", (before, f"w{i}"), (f"h{i}",), flops=flops))
        before = f"h{i}"
    return Graph("chain", tuple(tensors), tuple(ops), (before,))


def weights(graph: Graph) -> frozenset[str]:
    return frozenset(name for name in graph.buffers if name.startswith("w"))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, frozenset[str]]:
    """Random operators over weights and each other's results, some of which are allocated apart."""
    n = draw(st.integers(1, 7))
    tensors = [
        Tensor(f"w{i}", (draw(st.integers(1, 900)),), "uint8", Role.INPUT) for i in range(draw(st.integers(1, 5)))
    ]
    tensors.append(Tensor("x", (draw(st.integers(0, 300)),), "uint8", Role.INPUT))
    ops: list[Op] = []
    made: list[str] = []
    for i in range(n):
        names = [tensor.name for tensor in tensors]
        reads = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
        tensors.append(Tensor(f"t{i}", (draw(st.integers(0, 700)),), "uint8"))
        ops.append(Op(f"op{i}", tuple(reads), (f"t{i}",), flops=draw(st.integers(0, 10**7))))
        made.append(f"t{i}")
    apart = draw(st.sets(st.sampled_from(made), max_size=2))
    held = tuple(name for name in apart if draw(st.booleans()))
    if held:
        ops.append(Op("return", held, (), OpKind.BOUNDARY))
    outputs = tuple(name for name in made if name not in apart and draw(st.booleans()))
    return Graph("random", tuple(tensors), tuple(ops), outputs), frozenset(apart)


def check(limited: LimitedPlan, graph: Graph, apart: frozenset[str]) -> None:
    plan = limited.device_plan.plan
    assert not verify(plan).faults
    assert plan.graph == with_residents(graph, limited.resident)
    resident = sum(-(-graph.buffers[name].nbytes // ALIGNMENT) * ALIGNMENT for name in limited.resident)
    assert limited.resident_bytes == resident
    peak = max(allocated_bytes(limited.device_plan), default=0)
    assert limited.kept_bytes + resident + peak == limited.occupied_bytes <= limited.limit_bytes
    assert set(limited.device_plan.apart) >= {name for name in apart if graph.buffers[name].nbytes}
    assert limited.bound_s <= limited.latency_s
    assert limited.least_bytes <= limited.limit_bytes


@settings(max_examples=25, deadline=None)
@given(graphs(), st.integers(0, 300))
def test_every_limit_down_to_the_least(case: tuple[Graph, frozenset[str]], kept: int) -> None:
    """Each plan verifies and keeps its limit, more memory is never slower, and less than the least is refused."""
    graph, apart = case
    candidates = weights(graph)
    roomy = plan_within(graph, apart, MACHINE, 1 << 20, budget(), candidates=candidates, kept_bytes=kept)
    used = {buffer for buffers in graph.reads for buffer in buffers}
    assert roomy.resident == candidates & used
    least = roomy.least_bytes
    with pytest.raises(Infeasible) as refusal:
        plan_within(graph, apart, MACHINE, least - ALIGNMENT, budget(), candidates=candidates, kept_bytes=kept)
    assert refusal.value.required_bytes == least
    assert least <= least_limit(graph, apart, MACHINE, kept_bytes=kept)
    try:
        plan_within(graph, apart, MACHINE, least, budget(), candidates=candidates, kept_bytes=kept)
    except Infeasible as unplaced:  # what fits by count finds no places: the limit that works then is named
        least = unplaced.required_bytes
    most = max(least, roomy.occupied_bytes)
    limits = sorted({least, (2 * least + most) // 3, (least + 2 * most) // 3, most})
    curve = plans_within(graph, apart, MACHINE, limits, budget(), candidates=candidates, kept_bytes=kept)
    for limited in (*curve, roomy):
        check(limited, graph, apart)
    assert all(a.latency_s >= b.latency_s for a, b in itertools.pairwise(curve))


def test_loads_hide_behind_compute() -> None:
    """Compute takes longer than the loads of what does not fit: a call takes as long as with everything resident."""
    graph = chain(12, flops=5 * 10**7)
    whole = plan_within(graph, frozenset(), MACHINE, 1 << 20, budget(), candidates=weights(graph))
    half = plan_within(graph, frozenset(), MACHINE, 6 * 4096, budget(), candidates=weights(graph))
    assert sum(isinstance(i, Load) for i in half.device_plan.plan.instructions) > 6
    assert half.latency_s == pytest.approx(whole.latency_s, rel=0.02)


def test_a_slow_link_bounds_a_call() -> None:
    """Loads take longer than compute: the link is busy almost throughout, and the bound says so."""
    graph = chain(12, flops=10**4)
    limited = plan_within(graph, frozenset(), MACHINE, 4 * 4096, budget(), candidates=weights(graph))
    assert limited.transfer_s > 3 * limited.compute_s
    assert limited.latency_s < 1.1 * limited.transfer_s
    assert limited.gap < 0.2


def test_the_refusal_names_what_is_large() -> None:
    """The operator, its buffers by size, what stays beside them, and the least limit."""
    graph = chain(3)
    apart = frozenset({"h1"})
    with pytest.raises(Infeasible) as refusal:
        plan_within(graph, apart, MACHINE, 2048, budget(), candidates=weights(graph), kept_bytes=640)
    text = str(refusal.value)
    assert "'op0' touches 5120 bytes ('w0' 4096, 'h0' 512, 'x' 512)" in text
    assert "the caller keeps 640" in text
    assert f"the least limit that works is {refusal.value.required_bytes} bytes" in text
    assert refusal.value.required_bytes == 640 + 4096 + 512 + 512


def test_what_stays_beside_is_named() -> None:
    """A result of the first operator is apart until the end: the last one, which does not touch it, finds it there."""
    graph = msgspec.structs.replace(chain(3), outputs=())
    graph = msgspec.structs.replace(graph, ops=(*graph.ops, Op("return", ("h0", "h2"), (), OpKind.BOUNDARY)))
    with pytest.raises(Infeasible, match=r"'op2' touches 5120 bytes .*; beside it stay 512 bytes \('h0' 512\)"):
        plan_within(graph, frozenset({"h0", "h2"}), MACHINE, 2048, budget(), candidates=weights(graph))


def test_what_is_apart_takes_bytes_only_while_it_is_there() -> None:
    """Something large that is handed over is gone when something as large is made: one of them is there at a time."""
    tensors = [Tensor("given", (4096,), "uint8"), Tensor("made", (4096,), "uint8")]
    tensors += [Tensor(f"h{i}", (512,), "uint8") for i in range(4)]
    ops = (
        Op("receive", (), ("given",), OpKind.BOUNDARY),
        Op("a", ("given",), ("h0",)),
        Op("b", ("h0",), ("h1",)),
        Op("c", ("h1",), ("h2",)),
        Op("d", ("h2",), ("h3", "made")),
        Op("return", ("made",), (), OpKind.BOUNDARY),
    )
    graph = Graph("apart", tuple(tensors), ops, ())
    limited = plan_within(graph, frozenset({"given", "made"}), MACHINE, 4096 + 1024, budget())
    check(limited, graph, frozenset({"given", "made"}))
    assert limited.loaded_bytes == 0


def test_no_time_still_gives_a_plan() -> None:
    graph = chain(6)
    limited = plan_within(graph, frozenset(), MACHINE, 4 * 4096, budget(0.0), candidates=weights(graph))
    check(limited, graph, frozenset())


def test_times_stay_what_they_were() -> None:
    """Weights that stay and buffers apart are read and written all the same."""
    graph = chain(4)
    whole = plan_within(graph, frozenset(), MACHINE, 1 << 20, budget())
    assert not whole.resident
    for other in (with_residents(graph, weights(graph)), without_bytes(graph, frozenset({"h1"}))):
        limited = plan_within(other, frozenset(), MACHINE, 1 << 20, budget())
        assert limited.compute_s == pytest.approx(whole.compute_s)
