"""TensorFlow Lite Micro's offline memory plan: bytes, files, and what cannot be expressed."""

from __future__ import annotations

import struct
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.export import offline_memory_allocation, planned_tflite, tensor_offsets, whole_life
from opweave.compiler.export.flatbuffer import read_tflite
from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.pipeline import Budget
from opweave.compiler.plan import Plan
from opweave.compiler.verify import verify
from opweave.errors import Infeasible, ModelError, OptionError, PlanError, VerificationError
from opweave.passes.planner import Planner
from opweave.passes.whole_life import place_whole_life, save_planned_tflite
from tests.compiler.export.tflite_files import (
    ADD,
    FLOAT32,
    INT8,
    INT32,
    NODES,
    RELU,
    SLOTS,
    Node,
    Slot,
    metadata_of,
    random_model,
    sample,
    tflite_file,
)
from tests.graphs.build import all_graphs, machine
from tests.graphs.strategies import graphs
from tests.passes.residency.training import tight

NAME = "OfflineMemoryAllocation"


def graph_of(
    slots: tuple[Slot, ...], nodes: tuple[Node, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Graph:
    """The operator graph that a frontend would read from the file."""
    roles = dict.fromkeys(inputs, Role.INPUT) | {n: Role.CONSTANT for n, slot in enumerate(slots) if slot.data}
    dtype = {FLOAT32: "float32", INT32: "int32", INT8: "int8"}
    tensors = tuple(Tensor(s.name, s.shape, dtype[s.type], roles.get(n, Role.ACTIVATION)) for n, s in enumerate(slots))
    ops = tuple(
        Op(f"op{i}", tuple(slots[n].name for n in node.inputs), tuple(slots[n].name for n in node.outputs))
        for i, node in enumerate(nodes)
    )
    return Graph("tflite", tensors, ops, tuple(slots[n].name for n in outputs))


def sample_plan(order: str = "order/given", capacity: int = 1 << 16) -> Plan:
    graph = graph_of(SLOTS, NODES, (2, 5), (4, 1))
    plan = Plan.of_order(graph, machine(capacity), streamed=("c",))
    placed = Planner(order, "residency/least_cost", "address/best_fit").plan(plan, Budget.of_seconds(10))
    return place_whole_life(placed, Budget.of_seconds(10))


def test_offsets_are_written_in_the_model_s_own_order() -> None:
    plan = sample_plan()
    at = {r.buffer: r.offset for r in plan.residences or ()}
    payload = metadata_of(planned_tflite(sample(), plan))[NAME]
    assert struct.unpack("<11i", payload) == (1, 0, 8, -1, *(at[slot.name] for slot in SLOTS[1:]))
    assert payload == offline_memory_allocation(plan, [slot.name for slot in SLOTS])


def test_tensors_that_live_at_once_share_no_byte() -> None:
    """By brute force over the file's own lifetimes: inputs from before the first operator, outputs past the last."""
    offsets = tensor_offsets(sample_plan(), [slot.name for slot in SLOTS])
    begin, end = lifetimes(NODES, (2, 5), (4, 1))
    for a, b in combinations(begin, 2):
        if begin[a] <= end[b] and begin[b] <= end[a]:
            assert offsets[a] + 128 <= offsets[b] or offsets[b] + 128 <= offsets[a]


def test_the_rest_of_the_file_stays_as_it_is() -> None:
    before = sample(metadata=(("other", b"kept as it was"),))
    after = planned_tflite(before, sample_plan())
    assert after.endswith(before)
    assert (len(after) - len(before)) % 64 == 0
    assert metadata_of(after) == {"other": b"kept as it was", NAME: metadata_of(after)[NAME]}
    assert read_tflite(after) == read_tflite(before)


def test_an_earlier_plan_is_replaced() -> None:
    once = planned_tflite(sample(metadata=((NAME, bytes(16)),)), sample_plan())
    assert list(metadata_of(once)) == [NAME]
    assert metadata_of(planned_tflite(once, sample_plan())) == metadata_of(once)


def test_the_schema_s_own_reader_agrees() -> None:
    tflite = pytest.importorskip("tflite", reason="the package 'tflite', TensorFlow Lite's schema, is not installed")
    model = tflite.Model.GetRootAs(planned_tflite(sample(metadata=(("other", b"1"),)), sample_plan()), 0)
    assert (model.Version(), model.SubgraphsLength(), model.OperatorCodesLength()) == (3, 1, 2)
    assert [model.Metadata(i).Name() for i in range(model.MetadataLength())] == [b"other", NAME.encode()]
    data = model.Buffers(model.Metadata(1).Buffer()).DataAsNumpy().tobytes()
    assert data == offline_memory_allocation(sample_plan(), [slot.name for slot in SLOTS])
    assert model.Subgraphs(0).Tensors(7).Name() == b"shifted"
    assert model.Buffers(model.Subgraphs(0).Tensors(0).Buffer()).DataLength() == 128


def test_the_runtime_itself_computes_the_same_with_the_plan(tmp_path: Path) -> None:
    """TensorFlow Lite Micro's own interpreter, where it is installed, takes the offsets and gets the same numbers."""
    runtime = pytest.importorskip(
        "tflite_micro.python.tflite_micro.runtime", reason="the package 'tflite-micro' is not installed"
    )
    x, z = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    total = np.maximum(x, 0) + np.maximum(z, 0)
    expected = (total, np.maximum(total + np.arange(32, dtype=np.float32).reshape(4, 8), 0))
    for model in (sample(), planned_tflite(sample(), sample_plan())):
        (tmp_path / "model.tflite").write_bytes(model)
        interpreter = runtime.Interpreter.from_file(str(tmp_path / "model.tflite"))
        interpreter.set_input(x, 0)
        interpreter.set_input(z, 1)
        interpreter.invoke()
        for i, value in enumerate(expected):
            np.testing.assert_array_equal(interpreter.get_output(i), value)


def lifetimes(
    nodes: tuple[Node, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> tuple[dict[int, int], dict[int, int]]:
    """First and last operator by tensor, as the runtime counts them: 0 is before all of them."""
    begin = dict.fromkeys(inputs, 0) | {n: i for i, node in enumerate(nodes, 1) for n in node.outputs}
    end = {n: i for i, node in enumerate(nodes, 1) for n in (*node.inputs, *node.outputs)}
    return begin, end | dict.fromkeys(outputs, len(nodes))


@pytest.mark.parametrize("seed", range(6))
def test_random_models_share_bytes_only_in_turn(seed: int) -> None:
    slots, nodes, outputs = random_model(seed)
    plan = place_whole_life(Plan.of_order(graph_of(slots, nodes, (1,), outputs), machine()), Budget.of_seconds(10))
    planned = planned_tflite(tflite_file(slots, nodes, (1,), outputs), plan)
    offsets = struct.unpack(f"<{3 + len(slots)}i", metadata_of(planned)[NAME])[3:]
    begin, end = lifetimes(nodes, (1,), outputs)
    for a, b in combinations(begin, 2):
        if begin[a] <= end[b] and begin[b] <= end[a]:
            assert offsets[a] + 4 * slots[a].shape[0] <= offsets[b] or offsets[b] + 4 * slots[b].shape[0] <= offsets[a]


@pytest.mark.parametrize("seed", range(3))
def test_the_runtime_itself_computes_random_models_the_same(seed: int, tmp_path: Path) -> None:
    runtime = pytest.importorskip(
        "tflite_micro.python.tflite_micro.runtime", reason="the package 'tflite-micro' is not installed"
    )
    slots, nodes, outputs = random_model(seed)
    plan = place_whole_life(Plan.of_order(graph_of(slots, nodes, (1,), outputs), machine()), Budget.of_seconds(10))
    model = tflite_file(slots, nodes, (1,), outputs)
    results = []
    for data in (model, planned_tflite(model, plan)):
        (tmp_path / "model.tflite").write_bytes(data)
        interpreter = runtime.Interpreter.from_file(str(tmp_path / "model.tflite"), arena_size=1 << 21)
        interpreter.set_input(np.random.default_rng(seed).standard_normal(slots[1].shape, dtype=np.float32), 0)
        interpreter.invoke()
        results.append(interpreter.get_output(0))
    np.testing.assert_array_equal(*results)


@given(st.data())
def test_whole_lives_of_random_graphs_verify(data: st.DataObject) -> None:
    """No byte is moved twice, every placed tensor has an offset, and nothing that overlaps in time shares bytes."""
    graph = data.draw(graphs())
    plan = place_whole_life(Plan.of_order(graph, machine()), Budget.of_seconds(10))
    verification = verify(plan)
    assert verification.ok
    runs = range(len(plan.instructions))
    assert all(r.end == len(runs) for r in plan.residences or () if r.buffer in graph.output_buffers)
    contiguous = [t.name for t in graph.tensors if t.strides is None and t.offset_bytes % 16 == 0]
    offsets = dict(zip(contiguous, tensor_offsets(plan, contiguous), strict=True))
    at = {r.buffer: r.offset for r in plan.residences or ()}
    for name, offset in offsets.items():
        tensor = graph.tensor[name]
        if tensor.buffer in at and tensor.role not in (Role.WEIGHT, Role.CONSTANT):
            base = at[tensor.buffer]
            if graph.buffers[tensor.buffer].role not in (Role.WEIGHT, Role.CONSTANT):
                assert base is not None
                assert offset == base + tensor.offset_bytes


def test_views_lie_inside_their_buffer() -> None:
    plan = place_whole_life(Plan.of_order(all_graphs()["views"], machine()), Budget.of_seconds(10))
    names = [t.name for t in plan.graph.tensors if t.name not in ("columns", "evens", "y_transposed")]
    offsets = dict(zip(names, tensor_offsets(plan, names), strict=True))
    assert offsets["rows"] == offsets["a"] + 3 * 16 * 4
    with pytest.raises(PlanError, match="'columns' is a view of 'a' that skips elements"):
        tensor_offsets(plan, [*names, "columns"])


def test_a_spilled_tensor_is_named() -> None:
    graph = all_graphs()["fan_out"]
    spilling = Planner("order/given", "residency/least_cost", "address/best_fit").plan(
        tight(graph, streamed=tuple(b for b, t in graph.buffers.items() if t.role is Role.WEIGHT)),
        Budget.of_seconds(10),
    )
    assert verify(spilling).additional_bytes > 0
    with pytest.raises(PlanError, match="leaves the scratchpad and comes back 1 times"):
        whole_life(spilling)
    with pytest.raises(PlanError, match="leaves the scratchpad"):
        tensor_offsets(spilling, [t.name for t in graph.tensors])


def test_lives_that_do_not_fit_are_infeasible() -> None:
    """A plan may load its inputs one by one; the runtime has them all from the beginning."""
    needed = sample_plan()
    capacity = verify(needed).peak_bytes
    assert verify(sample_plan(capacity=capacity)).ok
    graph = needed.graph
    small = Plan.of_order(graph, machine(capacity - 16), streamed=("c",))
    with pytest.raises(Infeasible, match=f"need {capacity} bytes at once") as caught:
        place_whole_life(small, Budget.of_seconds(10))
    assert caught.value.required_bytes == capacity


def test_an_output_that_leaves_early_is_refused() -> None:
    graph = all_graphs()["output_consumed"]
    plan = Planner("order/given", "residency/least_cost", "address/best_fit").plan(
        Plan.of_order(all_graphs()["multi_output"], machine()), Budget.of_seconds(10)
    )
    with pytest.raises(PlanError, match="'p' does not have its place"):
        tensor_offsets(plan, [t.name for t in plan.graph.tensors])
    assert tensor_offsets(place_whole_life(Plan.of_order(graph, machine()), Budget.of_seconds(10)), list("xawbvcy"))


def test_another_order_than_the_file_s_is_found_out() -> None:
    """The runtime keeps the file's order: tensors that a plan's order keeps apart in time may meet in it."""
    slots = tuple(Slot(name, (64,)) for name in ("x", "a", "b", "c", "d", "y"))
    branches = ((0, 1), (0, 2), (1, 3), (2, 4))
    nodes = (*(Node(RELU, (source,), (result,)) for source, result in branches), Node(ADD, (3, 4), (5,)))
    graph = graph_of(slots, nodes, (0,), (5,))
    plan = Plan.of_order(graph, machine(4 * 256), order=(0, 2, 1, 3, 4))
    placed = place_whole_life(plan, Budget.of_seconds(10))
    at = {r.buffer: r.offset for r in placed.residences or ()}
    assert at["a"] == at["b"]
    with pytest.raises(PlanError, match=r"tensors 'a' and 'b' share bytes, but operator 1 .* needs both"):
        planned_tflite(tflite_file(slots, nodes, (0,), (5,)), placed)


def test_models_that_are_not_the_plan_s_are_refused() -> None:
    plan = sample_plan()
    names = [slot.name for slot in SLOTS]
    with pytest.raises(PlanError, match="places 'shifted' and 0 more, which the model's list of tensors lacks"):
        offline_memory_allocation(plan, names[:-1])
    with pytest.raises(PlanError, match="2 tensors of the name 'a'"):
        offline_memory_allocation(plan, [*names, "a"])
    with pytest.raises(PlanError, match=r"'shifted' has 256 bytes in the .tflite file and 128 in the plan"):
        planned_tflite(sample(slots=(*SLOTS[:-1], Slot("shifted", (8, 8)))), plan)
    with pytest.raises(PlanError, match="has decided its order, but no addresses"):
        offline_memory_allocation(Plan.of_order(plan.graph, plan.machine), names)


def test_offsets_that_the_format_or_the_runtime_cannot_have_are_refused() -> None:
    graph = all_graphs()["chain"]
    loose = place_whole_life(Plan.of_order(graph, machine(1 << 20, 4)), Budget.of_seconds(10))
    moved = tuple(msgspec.structs.replace(r, offset=(r.offset or 0) + 4) for r in loose.residences or ())
    names = [t.name for t in graph.tensors]
    with pytest.raises(PlanError, match="begin at multiples of 16"):
        tensor_offsets(msgspec.structs.replace(loose, residences=moved, passes=()), names)
    far = msgspec.structs.replace(loose, machine=machine(1 << 40))
    moved = tuple(msgspec.structs.replace(r, offset=(r.offset or 0) + (1 << 31)) for r in loose.residences or ())
    with pytest.raises(PlanError, match="beyond the 31 bits"):
        tensor_offsets(msgspec.structs.replace(far, residences=moved, passes=()), names)


def test_variables_and_unknown_tensors_are_left_to_the_runtime() -> None:
    plan = sample_plan()
    extra = (*SLOTS, Slot("runtime", (4,)), Slot("kept", (4,), variable=True))
    numbers = struct.unpack("<13i", metadata_of(planned_tflite(sample(slots=extra), plan))[NAME])
    assert numbers[2] == 10
    assert numbers[3] == numbers[-1] == numbers[-2] == -1


def test_files_are_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(sample())
    plan, seconds = sample_plan(), Budget.of_seconds(10)
    save_planned_tflite(plan, tmp_path / "model.tflite", tmp_path / "planned.tflite", seconds)
    assert (tmp_path / "planned.tflite").read_bytes() == planned_tflite(sample(), plan)
    with pytest.raises(ModelError, match="cannot read model"):
        save_planned_tflite(plan, tmp_path / "missing.tflite", tmp_path / "planned.tflite", seconds)
    with pytest.raises(OptionError, match="cannot write"):
        save_planned_tflite(plan, tmp_path / "model.tflite", tmp_path / "missing" / "planned.tflite", seconds)


def test_a_faulty_plan_is_not_exported() -> None:
    plan = sample_plan()
    with pytest.raises(VerificationError, match="faults and is not exported"):
        whole_life(msgspec.structs.replace(plan, instructions=plan.instructions[:-3]))
