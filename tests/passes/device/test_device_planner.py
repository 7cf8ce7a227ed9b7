"""Plans for a device: least peak, never more allocated than that, guests only while their host does not need itself."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings

from opweave.compiler.graph import Graph, Op, OpKind, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.runtime.device.layout import DevicePlan, allocated_bytes, live_bytes
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.hw_models.registry import load
from opweave.passes.device.planner import plan_for_device
from tests.passes.device.device_graphs import DeviceGraph, counted, device_graphs, least_peak_of_all, owner_of, peak_of

MACHINE = load("h100-sxm")


def budget(seconds: float = 20.0) -> Budget:
    return Budget.of_seconds(seconds, deterministic=True)


def planned(case: DeviceGraph, hosts: frozenset[str], within: Budget | None = None) -> DevicePlan:
    return plan_for_device(case.graph, case.apart, MACHINE, within or budget(), hosts=hosts)


def check(case: DeviceGraph, hosts: frozenset[str], device_plan: DevicePlan) -> None:
    """The verifier agrees, the process allocates what is claimed and no more than is live at most, guests are safe."""
    assert verify(device_plan.plan).faults == ()
    assert list(allocated_bytes(device_plan)) == counted(device_plan)
    peak = peak_of(case.graph, device_plan.plan.order)
    assert max(live_bytes(device_plan.plan)) == peak
    assert max(allocated_bytes(device_plan)) == peak
    residences = {r.buffer: r for r in device_plan.plan.residences or ()}
    for name, guest in residences.items():
        owner = owner_of(device_plan, guest)
        assert owner == name or name not in case.apart
        if owner in ("", name):
            continue
        host = residences[owner]
        before, behind = guest.end <= host.begin, guest.begin >= host.end
        if owner not in case.apart:
            assert before or behind
        else:
            assert owner in hosts
            assert behind if owner in case.given else before


@settings(max_examples=150, deadline=None)
@given(device_graphs())
def test_every_plan_is_right_and_allocates_the_live_peak(case: DeviceGraph) -> None:
    """Without hosts, with outputs as hosts, and with what was handed over as well."""
    for hosts in (frozenset[str](), case.outputs, case.outputs | case.given):
        check(case, hosts, planned(case, hosts))


@settings(max_examples=60, deadline=None)
@given(device_graphs(max_ops=5))
def test_the_peak_is_the_least_of_all_orders(case: DeviceGraph) -> None:
    device_plan = planned(case, case.outputs)
    assert max(live_bytes(device_plan.plan), default=0) == least_peak_of_all(case.graph)
    certificate = device_plan.plan.passes[0].certificate
    assert certificate is not None
    assert certificate.bound <= certificate.value == verify(device_plan.plan).peak_bytes


@settings(max_examples=40, deadline=None)
@given(device_graphs())
def test_without_time_a_plan_is_right_and_no_worse_than_program_order(case: DeviceGraph) -> None:
    stopped = budget()
    stopped.stop.set()
    for within in (stopped, Budget.of_seconds(0.0)):
        device_plan = planned(case, case.outputs, within)
        check(case, case.outputs, device_plan)
        assert max(allocated_bytes(device_plan)) <= peak_of(case.graph, tuple(range(len(case.graph.ops))))


@settings(max_examples=40, deadline=None)
@given(device_graphs())
def test_the_same_plan_twice(case: DeviceGraph) -> None:
    first, second = (planned(case, case.outputs) for _ in range(2))
    assert (first.arena_bytes, dict(first.apart)) == (second.arena_bytes, dict(second.apart))
    assert first.plan.residences == second.plan.residences
    assert first.plan.instructions == second.plan.instructions


@settings(max_examples=40, deadline=None)
@given(device_graphs())
def test_program_order_is_kept_where_asked_for_or_as_good(case: DeviceGraph) -> None:
    kept = plan_for_device(case.graph, case.apart, MACHINE, budget(), reorder=False)
    program = tuple(range(len(case.graph.ops)))
    assert kept.plan.order == program
    free = planned(case, frozenset())
    if peak_of(case.graph, program) == max(live_bytes(free.plan)):
        assert free.plan.order == program


def chain(*sizes: int) -> list[Tensor]:
    return [Tensor(f"t{i}", (size,), "uint8") for i, size in enumerate(sizes)]


def test_a_chain_lies_in_one_arena() -> None:
    """Nothing is allocated apart where one arena holds all: two neighbours at a time."""
    tensors = chain(1024, 2048, 1024, 2048)
    ops = [Op(f"o{i}", (f"t{i - 1}",) if i else (), (f"t{i}",)) for i in range(4)]
    device_plan = plan_for_device(Graph("chain", tuple(tensors), tuple(ops), ()), frozenset(), MACHINE, budget())
    assert device_plan.arena_bytes == 3072
    assert not device_plan.apart


def saved_activations() -> DeviceGraph:
    """A forward pass of four layers: each makes a temporary, and an output that backward needs."""
    tensors, ops = [Tensor("x", (4096,), "uint8")], [Op("first", (), ("x",))]
    for i in range(4):
        tensors += [Tensor(f"temporary{i}", (4096,), "uint8"), Tensor(f"saved{i}", (4096,), "uint8")]
        before = f"saved{i - 1}" if i else "x"
        ops += [Op(f"up{i}", (before,), (f"temporary{i}",)), Op(f"down{i}", (f"temporary{i}",), (f"saved{i}",))]
    saved = tuple(f"saved{i}" for i in range(4))
    ops.append(Op("return", saved, (), OpKind.BOUNDARY))
    outputs = frozenset(saved)
    return DeviceGraph(Graph("forward", tuple(tensors), tuple(ops), ()), frozenset(), outputs, frozenset())


def test_temporaries_of_a_forward_pass_lie_in_outputs_that_are_not_written_yet() -> None:
    """At the last step all outputs and one temporary are live, so the arena has room for one more buffer only."""
    case = saved_activations()
    hosted = planned(case, case.outputs)
    check(case, case.outputs, hosted)
    owners = [owner_of(hosted, r) for r in hosted.plan.residences or () if r.buffer not in case.apart]
    assert hosted.apart.keys() == case.outputs
    assert set(owners) & case.outputs
    bare = planned(case, frozenset())
    assert max(allocated_bytes(hosted)) == max(allocated_bytes(bare)) == 5 * 4096
    assert bare.apart.keys() > hosted.apart.keys()


def test_what_was_handed_over_hosts_behind_its_last_use_only_if_allowed() -> None:
    tensors = [Tensor(n, (4096,), "uint8") for n in ("saved", "a", "b", "gradient")]
    ops = (
        Op("receive", (), ("saved",), OpKind.BOUNDARY),
        Op("one", ("saved",), ("a",)),
        Op("two", ("a",), ("b",)),
        Op("three", ("b",), ("gradient",)),
        Op("return", ("gradient",), (), OpKind.BOUNDARY),
    )
    case = DeviceGraph(
        Graph("backward", tuple(tensors), ops, ()), frozenset({"saved"}), frozenset({"gradient"}), frozenset()
    )
    hosted = planned(case, frozenset({"saved"}))
    check(case, frozenset({"saved"}), hosted)
    owners = {r.buffer: owner_of(hosted, r) for r in hosted.plan.residences or ()}
    assert owners["b"] == "saved"
    check(case, frozenset(), planned(case, frozenset()))


def test_nothing_runs_before_inputs_are_received_or_after_outputs_are_returned() -> None:
    """An input handed over is there from the start, however late it is used."""
    tensors = [Tensor("given", (4096,), "uint8"), *chain(8192, 512, 512)]
    ops = (
        Op("receive", (), ("given",), OpKind.BOUNDARY),
        Op("large", (), ("t0",)),
        Op("small", ("t0",), ("t1",)),
        Op("last", ("given", "t1"), ("t2",)),
        Op("return", ("t2",), (), OpKind.BOUNDARY),
    )
    graph = Graph("framed", tuple(tensors), ops, ())
    device_plan = plan_for_device(graph, frozenset({"given", "t2"}), MACHINE, budget())
    assert device_plan.plan.order == (0, 1, 2, 3, 4)
    certificate = device_plan.plan.passes[0].certificate
    assert certificate is not None
    assert certificate.bound == certificate.value == 4096 + 8192 + 512


def test_two_hundred_operators_of_a_training_step() -> None:
    """Forward makes what backward uses in reverse; gradients come one by one."""
    count = 100
    tensors, ops = [], []
    for i in range(2 * count):
        tensors.append(Tensor(f"t{i}", ((1 + i * 7 % 5) * 512,), "uint8"))
        inputs = (f"t{i - 1}",) if i > 0 else ()
        ops.append(Op(f"o{i}", (*inputs, *((f"t{2 * count - 1 - i}",) if i > count else ())), (f"t{i}",)))
    outputs = tuple(f"t{i}" for i in range(count + 9, 2 * count, 10))
    ops.append(Op("return", outputs, (), OpKind.BOUNDARY))
    case = DeviceGraph(Graph("step", tuple(tensors), tuple(ops), ()), frozenset(), frozenset(outputs), frozenset())
    device_plan = planned(case, case.outputs)
    check(case, case.outputs, device_plan)
    alone = set(device_plan.apart) - case.apart
    assert len(alone) <= 20


def test_sources_are_refused() -> None:
    graph = Graph(
        "g", (Tensor("w", (4,), "uint8", Role.WEIGHT), Tensor("y", (4,), "uint8")), (Op("o", ("w",), ("y",)),), ()
    )
    with pytest.raises(OptionError, match="buffer 'w' of graph 'g' exists before"):
        plan_for_device(graph, frozenset(), MACHINE, budget())


def test_an_empty_program_needs_nothing() -> None:
    device_plan = plan_for_device(Graph("empty", (), (), ()), frozenset(), MACHINE, budget())
    assert (device_plan.arena_bytes, allocated_bytes(device_plan)) == (0, ())


def test_the_note_has_the_peak_of_program_order() -> None:
    case = saved_activations()
    device_plan = planned(case, case.outputs)
    assert device_plan.plan.passes[0].note == "program order has 20,480"
    assert msgspec.json.decode(device_plan.plan.to_json())["passes"][0]["name"] == "order/least_peak"
