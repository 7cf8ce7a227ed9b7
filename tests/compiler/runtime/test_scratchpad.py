"""The scratchpad machine computes what eager computes where the plan is right, and refuses what it cannot execute."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.graph import Graph, Op, Role, Tensor
from opweave.compiler.plan import Load, Plan, Residence, Run, Store
from opweave.compiler.runtime.scratchpad import execute
from opweave.compiler.verify import verify
from opweave.errors import ExecutionError
from opweave.hw_models import load
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, all_graphs, machine, random_sources
from tests.graphs.plans import keep_everything, keep_nothing
from tests.graphs.strategies import graphs


@pytest.mark.parametrize("name", all_graphs())
@pytest.mark.parametrize("alignment", [1, 16])
def test_right_plans_compute_what_eager_computes(name: str, alignment: int) -> None:
    """Alignment 1 with gaps of 3 bytes puts float32 tensors at addresses that are no multiple of 4."""
    graph = all_graphs()[name]
    sources = random_sources(graph)
    given = {key: value.clone() for key, value in sources.items()}
    target = machine(alignment_bytes=alignment)
    for plan in (keep_everything(graph, target, gap_bytes=3), keep_nothing(graph, target)):
        result = run(plan, sources)
        assert same(result, graph, sources)
        assert result.moved_bytes == verify(plan).total_bytes
        assert (result.runs, result.loads, result.stores) == tuple(
            sum(isinstance(i, kind) for i in plan.instructions) for kind in (Run, Load, Store)
        )
    assert all(torch.equal(sources[key], given[key]) for key in given), "the caller's tensors changed"


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([0, 1, 2, 3]))
def test_random_graphs_compute_what_eager_computes(graph: Graph, gap_bytes: int) -> None:
    sources = random_sources(graph)
    target = machine(alignment_bytes=1)
    assert same(run(keep_everything(graph, target, gap_bytes=gap_bytes), sources), graph, sources)
    assert same(run(keep_nothing(graph, target), sources), graph, sources)


def test_the_scratchpad_has_exactly_the_machines_size() -> None:
    """A plan for the exact peak runs in it; one byte less does not hold the last residence."""
    graph = all_graphs()["chain"]
    sources = random_sources(graph)
    peak = verify(keep_nothing(graph)).peak_bytes
    assert same(run(keep_nothing(graph, machine(peak)), sources), graph, sources)
    with pytest.raises(ExecutionError, match=f"the scratchpad has {peak - 1}"):
        run(keep_nothing(graph, machine(peak - 1)), sources)


def test_a_scratchpad_of_a_gpu_is_allocated_as_far_as_it_is_planned() -> None:
    graph = all_graphs()["residual"]
    sources = random_sources(graph)
    assert same(run(keep_everything(graph, load("h200")), sources), graph, sources)


def test_streamed_weights_are_read_from_backing_memory() -> None:
    graph = all_graphs()["shared_weight"]
    sources = random_sources(graph)
    plan = keep_everything(graph, streamed=["shared", "w1"])
    result = run(plan, sources)
    assert same(result, graph, sources)
    assert result.streamed_bytes == 3 * 32 * 32 * 4
    assert result.moved_bytes == verify(plan).total_bytes


def test_updated_sources_are_returned_and_those_given_stay() -> None:
    graph = all_graphs()["in_place"]
    sources = random_sources(graph)
    before = sources["state"].clone()
    result = run(keep_nothing(graph), sources)
    assert list(result.updated) == ["state"]
    assert torch.equal(sources["state"], before)
    assert not torch.equal(result.updated["state"], before)


def test_dense_strides_and_other_dtypes() -> None:
    """A channels-last input, int64 indices, a bool mask, and a bfloat16 result, at odd addresses."""
    tensors = (
        Tensor("x", (2, 3, 4, 4), "float32", Role.INPUT, strides=(48, 1, 12, 3)),
        Tensor("index", (2,), "int64", Role.CONSTANT),
        Tensor("picked", (2, 3, 4, 2), "float32", strides=(24, 1, 6, 3)),
        Tensor("mask", (2, 3, 4, 2), "bool"),
        Tensor("half", (2, 3, 4, 2), "bfloat16"),
        Tensor("y", (2, 3, 4, 2), "bfloat16", Role.OUTPUT),
    )
    ops = (
        Op("pick", ("x", "index"), ("picked",), body="aten.index_select.default(%0, 3, %1)"),
        Op("compare", ("picked",), ("mask",), body="aten.gt.Scalar(%0, 0)"),
        Op("narrow", ("picked",), ("half",), body="aten._to_copy.default(%0, dtype=torch.bfloat16)"),
        Op("choose", ("mask", "half"), ("y",), body="aten.where.ScalarOther(%0, %1, -inf)"),
    )
    graph = Graph("dtypes", tensors, ops, ("y", "mask"))
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    index = torch.tensor([3, 1])
    picked = x[..., [3, 1]]
    for gap_bytes in (0, 1):
        plan = keep_everything(graph, machine(alignment_bytes=1), gap_bytes=gap_bytes)
        y, mask = execute(plan, {"x": x}, {"index": index}).outputs
        assert torch.equal(mask, picked > 0)
        assert torch.equal(y, torch.where(picked > 0, picked.bfloat16(), -torch.inf))


def test_results_that_are_views_of_operands_are_written_whole() -> None:
    """Both halves of ``split`` are views of the operand; written back in place and swapped, each is still whole."""
    g = GraphBuilder("swap")
    x = g.input("x", 2, 8)
    a = g.unary("relu", x, "a")
    lower, upper = g.view("lower", a, 1, 8), g.view("upper", a, 1, 8, offset_bytes=32)
    g.view("lower_1", a, 1, 8)
    g.view("upper_1", a, 1, 8, offset_bytes=32)
    g.call("aten.split.Tensor(%0, 1)", a, outputs=("upper_1", "lower_1"))
    graph = g.build(g.binary("add", lower, upper, "y"), "lower_1", "upper_1")
    sources = random_sources(graph)
    first, second = sources["x"].relu()
    _, lower_1, upper_1 = run(keep_everything(graph), sources).outputs
    assert torch.equal(lower_1[0], second)
    assert torch.equal(upper_1[0], first)


def test_outputs_can_be_used_in_training() -> None:
    """Weights may require gradients; outputs are ordinary tensors, not inference tensors."""
    graph = all_graphs()["chain"]
    sources = {name: value.requires_grad_() for name, value in random_sources(graph).items()}
    (y,) = run(keep_nothing(graph), sources).outputs
    assert not y.requires_grad
    assert not y.is_inference()


# Bad input ends in one clear error.


def single(body: str, *, outputs: tuple[Tensor, ...] = (Tensor("y", (2, 2), "float32"),)) -> Plan:
    """A plan for one operator on ``x`` float32[2, 2]."""
    op = Op("only", ("x",), tuple(t.name for t in outputs), body=body)
    tensors = (Tensor("x", (2, 2), "float32", Role.INPUT), *outputs)
    return keep_everything(Graph("single", tensors, (op,), tuple(t.name for t in outputs)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "step 1: operator 'only': an operator has no body"),
        ("aten.nothing.default(%0)", "operator 'only': operator aten.nothing.default does not exist"),
        ("aten.mm.default(%0)", "operator 'only': operator aten.mm.default on operands .* failed"),
        ("aten.topk.default(%0, 2)", "'only' returned 2 tensors, expected 1"),
        (
            "aten.sum.default(%0)",
            r"'y' of operator 'only' \(aten.sum.default\) is float32\[\], expected float32\[2, 2\]",
        ),
        ("aten.gt.Scalar(%0, 0)", r"is bool\[2, 2\], expected float32\[2, 2\]"),
        ("aten.to_sparse.default(%0)", "is a torch.sparse_coo tensor on cpu, expected plain elements"),
        ("aten.empty.memory_format([2, 2], device='meta')", "tensor on meta, expected plain elements"),
    ],
)
def test_operators_that_do_not_do_what_the_graph_says(body: str, message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        run(single(body), {"x": torch.ones(2, 2)})


def test_a_result_with_overlapping_elements_cannot_be_written() -> None:
    twice = Tensor("twice", (2, 2), "float32", buffer="x", strides=(0, 1))
    plan = single("aten.relu.default(%0)", outputs=(twice,))
    with pytest.raises(ExecutionError, match="cannot write 'twice'"):
        run(plan, {"x": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"input 'x' has no value; it takes float32\[2, 2\]"),
        (torch.ones(2, 3), r"input 'x' is float32\[2, 3\], expected float32\[2, 2\]"),
        (torch.ones(2, 2, dtype=torch.int8), r"input 'x' is int8\[2, 2\], expected float32\[2, 2\]"),
        (torch.ones(2, 2).to_sparse(), "input 'x' is a torch.sparse_coo tensor"),
        (torch.ones(2, 2, device="meta"), "input 'x' is a torch.strided tensor on meta"),
    ],
)
def test_inputs_are_checked(value: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ExecutionError, match=message):
        run(single("aten.relu.default(%0)"), {} if value is None else {"x": value})


def test_roles_say_where_values_come_from() -> None:
    graph = all_graphs()["chain"]
    sources = random_sources(graph)
    with pytest.raises(ExecutionError, match="weight 'w' has no value"):
        execute(keep_everything(graph), sources, {})
    with pytest.raises(ExecutionError, match="input 'x' has no value"):
        execute(keep_everything(graph), {}, sources)


def test_sources_that_nobody_needs_may_be_missing() -> None:
    graph = all_graphs()["unused_input"]
    (y,) = run(keep_everything(graph), {"x": torch.ones(4, 16)}).outputs
    assert torch.equal(y, torch.ones(4, 16))


def test_plans_that_are_not_ready_are_refused() -> None:
    plan = keep_everything(all_graphs()["chain"])
    sources = random_sources(plan.graph)
    first, *others = plan.residences or ()
    nowhere = msgspec.structs.replace(first, offset=None)
    elsewhere = msgspec.structs.replace(first, memory="dram")
    stranger = msgspec.structs.replace(first, buffer="nobody")
    for residences, message in (
        (None, "no addresses yet"),
        ((nowhere, *others), "no addresses yet"),
        ((elsewhere, *others), "is in memory 'dram', not 'sram'"),
        ((stranger, *others), "names buffer 'nobody', which the graph does not have"),
    ):
        with pytest.raises(ExecutionError, match=message):
            run(msgspec.structs.replace(plan, residences=residences), sources)
    unknown = msgspec.structs.replace(plan, instructions=(*plan.instructions, Run("nothing")))
    with pytest.raises(ExecutionError, match="runs operator 'nothing'"):
        run(unknown, sources)
    never = msgspec.structs.replace(plan, instructions=(*plan.instructions, Load("nobody")))
    with pytest.raises(ExecutionError, match="needs buffer 'nobody'"):
        run(never, sources)


def test_streaming_what_was_never_stored_is_refused() -> None:
    graph = all_graphs()["chain"]
    plan = msgspec.structs.replace(keep_everything(graph), streamed=("a",))
    with pytest.raises(ExecutionError, match="streams buffer 'a', which was never stored"):
        run(plan, random_sources(graph))


def test_operators_that_copy_whole_storages_see_their_operand_only() -> None:
    """slice_scatter clones its operand's storage; in an arena of an odd size that storage must not be the arena."""
    x = Tensor("x", (2, 2), "float32", Role.INPUT)
    graph = Graph(
        "scatter",
        (x, Tensor("row", (1, 2), "float32", Role.INPUT), Tensor("y", (2, 2), "float32", Role.OUTPUT)),
        (Op("scatter", ("x", "row"), ("y",), body="aten.slice_scatter.default(%0, %1, 0, 1, 2)"),),
        ("y",),
    )
    plan = Plan(
        graph,
        machine().with_scratchpad(65),
        (Load("x"), Load("row"), Run("scatter"), Store("y")),
        (Residence("x", "sram", 0, 3, 0), Residence("row", "sram", 1, 3, 16), Residence("y", "sram", 2, 4, 32)),
    )
    values = {"x": torch.arange(4.0).view(2, 2), "row": torch.tensor([[7.0, 8.0]])}
    assert execute(plan, values, {}).outputs[0].tolist() == [[0.0, 1.0], [7.0, 8.0]]
