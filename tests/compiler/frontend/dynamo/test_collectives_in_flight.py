"""Programs with collectives: their bytes are nobody else's until they are waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.dynamo.frozen import freeze
from opweave.compiler.frontend.dynamo.lowering import Unrecorded, lower
from opweave.compiler.frontend.ranks import fake_ranks
from opweave.compiler.runtime.device.graph import planning_graph
from opweave.compiler.runtime.device.program import Program

functional = torch.ops._c10d_functional
N = 16


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    """Rank 0 of 2."""
    with fake_ranks(2), torch.no_grad():
        yield


def gathered(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """While the gather is in flight its operand is not needed any more, and something else needs memory."""
    start = functional.all_gather_into_tensor(torch.relu(x @ w), 2, "0")
    other = torch.sin(x @ w.cos()) @ w
    return (functional.wait_tensor(start) @ w + torch.cat([other, other]),)


def scattered(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """The same for a coalesced collective of two tensors."""
    operands = [torch.relu(x @ w), torch.tanh(x @ w)]
    starts = functional.reduce_scatter_tensor_coalesced(operands, "sum", 2, "0")
    other = torch.sin(x @ w.cos()) @ w
    first, second = (functional.wait_tensor(start) for start in starts)
    return (torch.cat([first @ w + second, second]) + other,)


def reduced(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """A collective that Inductor lets write its operand."""
    return (functional.wait_tensor(functional.all_reduce(x @ w, "sum", "0")) + 1,)


def program_of(function: Callable[..., tuple[Tensor]]) -> Program:
    """What Inductor makes of a function of two tensors, its order frozen."""
    module = freeze(make_fx(function, tracing_mode="fake")(torch.ones(4, N), torch.ones(N, N)))
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    return lower(module, inputs, is_inference=True)


@pytest.mark.parametrize(("function", "operands"), [(gathered, 1), (scattered, 2)])
def test_operands_are_held_until_the_wait(function: Callable[..., tuple[Tensor]], operands: int) -> None:
    """A plan may give the bytes of what nobody reads any more to others: the wait reads what its collective reads."""
    program = program_of(function)
    start = next(call for call in program.calls if "all_gather" in call.target or "reduce_scatter" in call.target)
    waits = [call for call in program.calls if "wait_tensor" in call.target]
    assert len(waits) == operands == len(start.reads)
    assert {name for wait in waits for name in wait.reads} >= set(start.reads)
    graph = planning_graph(program)
    order = [op.name for op in graph.ops]
    between = order[order.index(start.name) + 1 : order.index(waits[0].name)]
    assert between  # so that there is something to hold them against
    reads = {op.name: read for op, read in zip(graph.ops, graph.reads, strict=True)}
    assert {buffer for wait in waits for buffer in reads[wait.name]} >= set(start.reads)
    assert not any(set(start.reads) & set(graph.writes[order.index(name)]) for name in between)


def test_collectives_in_place_are_not_planned() -> None:
    """Waits are found by storage, which in an arena is one for all: stock Inductor gives each a storage of its own."""
    with pytest.raises(Unrecorded, match=r"all_reduce_\.default, a collective that writes in place"):
        program_of(reduced)
