"""Collectives in traced modules: kind, group, ranks and message bytes, waits as aliases, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.collectives import collective_of, group_ranks, is_communication, is_wait
from opweave.compiler.frontend.dynamo.operators import OperatorGraph, operator_graph
from opweave.compiler.frontend.fx import from_graph_module, from_module
from opweave.compiler.frontend.ranks import fake_ranks
from opweave.compiler.graph import Op, OpKind
from opweave.errors import ModelError, UnsupportedOperator

OPS = torch.ops._c10d_functional
X = torch.zeros(16, 6)  # float32: 384 bytes
ALL = tuple(range(8))


@pytest.fixture(scope="module")
def world() -> Iterator[str]:
    """Eight ranks of which this is number 3; gives the name of the group of ranks 1, 3 and 5."""
    with fake_ranks(8, 3):
        group = dist.new_group([5, 3, 1])
        assert isinstance(group, dist.ProcessGroup)
        yield group.group_name


def traced(call: Callable[..., Any], *inputs: torch.Tensor) -> OperatorGraph:
    return operator_graph(make_fx(call, tracing_mode="fake")(*inputs), int)


def collectives(found: OperatorGraph) -> list[Op]:
    return [op for op in found.graph.ops if op.kind is OpKind.COLLECTIVE]


WAIT = OPS.wait_tensor
CASES: dict[str, tuple[Callable[[torch.Tensor, str], Any], str, int]] = {
    "all_reduce": (lambda x, g: WAIT(OPS.all_reduce(x, "sum", g)), "all_reduce", 384),
    "in_place": (lambda x, g: WAIT(OPS.all_reduce_(x.clone(), "sum", g)), "all_reduce", 384),
    "coalesced": (lambda x, g: [WAIT(t) for t in OPS.all_reduce_coalesced([x, x[:8]], "sum", g)], "all_reduce", 576),
    "gather": (lambda x, g: WAIT(OPS.all_gather_into_tensor(x, 3, g)), "all_gather", 1152),
    "gather_out": (
        lambda x, g: WAIT(OPS.all_gather_into_tensor_out(x, 3, g, out=x.new_empty(48, 6))),
        "all_gather",
        1152,
    ),
    "gathers": (
        lambda x, g: [WAIT(t) for t in OPS.all_gather_into_tensor_coalesced([x, x[:8]], 3, g)],
        "all_gather",
        1728,
    ),
    "scatter": (lambda x, g: WAIT(OPS.reduce_scatter_tensor(x[:15], "sum", 3, g)), "reduce_scatter", 360),
    "scatters": (
        lambda x, g: [WAIT(t) for t in OPS.reduce_scatter_tensor_coalesced([x[:3], x[:15]], "avg", 3, g)],
        "reduce_scatter",
        432,
    ),
    "all_to_all": (lambda x, g: WAIT(OPS.all_to_all_single(x, [1, 2, 3], [4, 4, 8], g)), "all_to_all", 384),
    "broadcast": (lambda x, g: WAIT(OPS.broadcast(x, 0, g)), "broadcast", 384),
    "shard_dim": (lambda x, g: torch.ops._dtensor.shard_dim_alltoall(x[:, :3], 0, 1, g), "all_to_all", 192),
}


@pytest.mark.parametrize("case", CASES)
def test_kind_group_ranks_and_whole_message(world: str, case: str) -> None:
    """Bytes are those of one whole message: PyTorch's own count of an all-reduce is twice as many."""
    call, kind, nbytes = CASES[case]
    found = traced(lambda x: call(x, world), X)
    (op,) = collectives(found)
    assert op.collective is not None
    assert (op.collective.kind.value, op.collective.group, op.collective.nbytes) == (kind, world, nbytes)
    assert op.collective.ranks == (1, 3, 5)
    assert not op.repeatable
    assert op.flops == 0
    assert len(found.waits.get(op.name, ())) == {"coalesced": 2, "gathers": 2, "scatters": 2, "shard_dim": 0}.get(
        case, 1
    )
    assert not any("wait" in other.name for other in found.graph.ops)


def _group(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def test_a_wait_is_an_alias_and_its_views_lie_in_the_collectives_buffer(world: str) -> None:
    """Who reads the result reads the collective's tensor; a kernel that asks for its node gets the wait."""

    def call(x: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = WAIT(OPS.all_gather_into_tensor(x, 3, world))
        return gathered.view(3, 96).t() + gathered.sum()

    found = traced(call, X)
    assert [op.name for op in found.graph.ops] == ["all_gather_into_tensor", "sum_1", "add"]
    add = found.graph.ops[2]
    assert found.graph.tensor[add.inputs[0]].buffer == "all_gather_into_tensor"
    assert found.graph.tensor[add.inputs[0]].element_strides == (1, 96)
    assert found.values["all_gather_into_tensor"].target is WAIT.default
    assert found.graph.predecessors == ((), (0,), (0, 1))


def test_an_in_place_collective_writes_its_operand(world: str) -> None:
    """Readers before it, it, and readers behind it keep their order."""

    def call(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        before = y.sum()
        WAIT(OPS.all_reduce_(y, "sum", world))
        return before + y.max()

    found = traced(call, X)
    assert [op.name for op in found.graph.ops] == ["mul", "sum_1", "all_reduce_", "max_1", "add"]
    assert found.graph.predecessors[2] == (0, 1)
    assert found.graph.predecessors[3] == (2,)
    assert found.graph.tensor[found.graph.ops[2].outputs[0]].buffer == "mul"


def test_a_collective_whose_result_nobody_reads_stays(world: str) -> None:
    """The other ranks wait in it for this one."""

    def call(x: torch.Tensor) -> torch.Tensor:
        WAIT(OPS.all_reduce(x, "sum", world))
        return x + 1

    assert len(collectives(traced(call, X))) == 1


def test_placeholders_that_are_no_tensors_and_waits_of_inputs(world: str) -> None:
    """Meshes of DTensors stand among the placeholders; a backward half may wait for what the forward half started."""
    graph = torch.fx.Graph()
    mesh, x = graph.placeholder("mesh"), graph.placeholder("x")
    mesh.meta["val"] = object()
    waited = graph.call_function(WAIT.default, (x,))
    total = graph.call_function(torch.ops.aten.add.Tensor, (waited, waited))
    for node in (x, waited, total):
        node.meta["val"] = torch.empty(4, device="meta")
    graph.output((total, mesh))
    found = operator_graph(torch.fx.GraphModule({}, graph), int)
    assert [op.inputs for op in found.graph.ops] == [("x",)]
    assert found.waits == {}


def test_placeholders_may_be_slices_of_one_tensor(world: str) -> None:
    """What the forward half saves of a cut value is its parts, whose values in the trace share storage."""
    graph = torch.fx.Graph()
    whole = torch.empty(4, 6, device="meta")
    slices = [graph.placeholder(f"slice{i}") for i in range(2)]
    for node, value in zip(slices, (whole[:1], whole[1:]), strict=True):
        node.meta["val"] = value
    doubled = [graph.call_function(torch.ops.aten.mul.Tensor, (node, 2)) for node in slices]
    for node, (operand,) in zip(doubled, (node.all_input_nodes for node in doubled), strict=True):
        node.meta["val"] = torch.empty_like(operand.meta["val"])
    graph.output(tuple(doubled))
    found = operator_graph(torch.fx.GraphModule({}, graph), int).graph
    reads = [found.tensor[op.inputs[0]] for op in found.ops]
    assert [tensor.shape for tensor in reads] == [(1, 6), (3, 6)]


def test_a_wait_for_a_part_is_refused(world: str) -> None:
    """Its memory would be described wrongly."""
    with pytest.raises(ModelError, match="part of what a collective returns"):
        traced(lambda x: WAIT(OPS.all_reduce(x, "sum", world)[2:]) + 1, X)


def test_other_communication_is_named_and_never_taken_for_compute(world: str) -> None:
    found = traced(lambda x: OPS.irecv(x.clone(), 0, 0, world) + 1, X)
    assert found.other_communication == ("irecv",)
    assert not collectives(found)
    assert not next(op for op in found.graph.ops if op.name == "irecv").repeatable


def test_groups_must_be_known_and_agree(world: str) -> None:
    with pytest.raises(ModelError, match="'99', which this process does not know") as caught:
        collective_of(OPS.all_reduce.default, (X, "sum", "99"), {}, "n")
    assert "fake_ranks" in caught.value.hint
    with pytest.raises(ModelError, match=r"for 8 ranks, but process group .* has 3"):
        collective_of(OPS.all_gather_into_tensor.default, (X, 8, world), {}, "n")
    with pytest.raises(ModelError, match="takes its process group from a value of the graph"):
        collective_of(OPS.all_reduce.default, (X, "sum", object()), {}, "n")
    assert group_ranks("0", "n") == ("0", ALL)
    assert group_ranks(_group(world), "n")[0] == world  # as an object, as well


def test_only_communication_is_taken_for_it() -> None:
    for target in (torch.ops.aten.add.Tensor, torch.ops.aten.all.default, print, "all_reduce"):
        assert not is_communication(target)
        assert not is_wait(target)
        assert collective_of(target, (X, X), {}, "n") is None
    assert is_communication(torch.ops.c10d.send.default)
    assert is_wait(WAIT.default)


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = dist.group.WORLD
        assert group is not None
        whole = funcol.all_gather_tensor(self.linear(x), 0, group)
        reduced: torch.Tensor = funcol.all_reduce(whole.relu(), "sum", group)
        return reduced.view(8, -1)


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor.*deprecated:FutureWarning")
def test_a_plain_module_imports_with_its_collectives(world: str) -> None:
    """The frontend of opweave.compile writes the same operators, with bodies."""
    graph = from_module(_Layer(), (X,)).graph
    assert [op.kind.value for op in graph.ops] == ["compute", "collective", "compute", "collective"]
    gathered, reduced = (op.collective for op in graph.ops if op.collective is not None)
    assert (gathered.ranks, gathered.nbytes, reduced.nbytes) == (ALL, 8 * 384, 8 * 384)
    assert [(op.flops, op.repeatable) for op in graph.ops[1::2]] == [(0, False)] * 2
    assert graph.ops[3].body == "_c10d_functional.all_reduce.default(%0, 'sum', '0')"
    assert graph.tensor[graph.outputs[0]].buffer == "all_reduce"


def test_the_frontend_refuses_sends_and_unknown_groups(world: str) -> None:
    def module(call: Callable[[torch.Tensor], Any]) -> torch.fx.GraphModule:
        return make_fx(call, tracing_mode="fake")(X)

    with pytest.raises(UnsupportedOperator, match="no functional collective"):
        from_graph_module(module(lambda x: OPS.irecv(x, 0, 0, world)), name="m", input_names=["x"], weights={})
    with pytest.raises(ModelError, match="does not know"):
        from_graph_module(
            module(lambda x: WAIT(OPS.all_reduce(x, "sum", "99"))), name="m", input_names=["x"], weights={}
        )
