"""Orders of calls: those that a module may have, and what it takes for Inductor to keep one."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.collectives import is_wait
from opweave.compiler.frontend.dynamo.frozen import SETTINGS, freeze, is_start, orderings, reorder
from opweave.compiler.frontend.dynamo.traced import copied
from opweave.compiler.frontend.ranks import captured, fake_ranks
from opweave.errors import PlanError

functional = torch.ops._c10d_functional
DIMENSION = 16


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    """Rank 0 of 4, all collectives of which return at once."""
    with fake_ranks(4), torch.no_grad():
        yield


def all_reduce(x: Tensor) -> Tensor:
    """A start and its wait."""
    reduced: Tensor = functional.wait_tensor(functional.all_reduce(x, "sum", "0"))
    return reduced


class Halves(nn.Module):
    """Layers of a tensor-parallel network with their tokens in two halves, each with collectives of its own."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.rand(DIMENSION))
        self.up = nn.ParameterList(torch.randn(DIMENSION, 2 * DIMENSION) / 4 for _ in range(layers))
        self.down = nn.ParameterList(torch.randn(2 * DIMENSION, DIMENSION) / 6 for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        halves = list(x.chunk(2))
        for up, down in zip(self.up, self.down, strict=True):
            for part in range(2):
                hidden = F.rms_norm(halves[part], (DIMENSION,), self.norm)
                halves[part] = halves[part] + all_reduce(F.silu(hidden @ up) @ down)
        return torch.cat(halves)


def letter(node: Node) -> str:
    """S for a start, W for a wait, m for a matrix product, nothing for others."""
    if is_start(node):
        return "S"
    return "W" if is_wait(node.target) else "m" if "mm" in str(node.target) else ""


def word(module: GraphModule) -> str:
    """The order of a module's calls."""
    return "".join(map(letter, module.graph.nodes))


def named(module: GraphModule, wanted: str) -> list[str]:
    """Names of the module's calls of each letter in turn."""
    calls = {one: iter([n.name for n in module.graph.nodes if letter(n) == one]) for one in "SWm"}
    return [next(calls[one]) for one in wanted]


def compiled(module: GraphModule, patch: dict[str, Any]) -> tuple[Callable[[Sequence[Tensor]], Any], str]:
    """What Inductor makes of ``module``, and the order of the calls in its code; k is a fused kernel."""
    placeholders = module.graph.find_nodes(op="placeholder")
    with config.patch({"fx_graph_cache": False, **patch}):
        result: Any = compile_fx_inner(copied(module), [n.meta["val"] for n in placeholders], is_inference=True)
    source = Path(result.current_callable.__code__.co_filename).read_text()
    calls = {"S": r"torch\.ops\._c10d_functional\.(all|reduce)\w+\.default\(", "W": r"\S*wait_tensor\.default\("}
    calls |= {"m": r"extern_kernels\.mm\(", "k": r"cpp_fused\w*\("}
    found = [
        one
        for line in source.splitlines()
        for one, what in calls.items()
        if re.match(rf"(buf\d+ = )?{what}", line.strip())
    ]
    return result, "".join(found)


def test_inductor_undoes_an_order_and_keeps_a_frozen_one() -> None:
    """Without dependencies both halves' waits come before one fused kernel, and nothing hides the second collective."""
    model, x = Halves(), torch.linspace(-1, 1, 8 * DIMENSION).reshape(8, DIMENSION)
    found = captured(model, (x,), decompositions=select_decomp_table())
    wanted = "mmSmmSWmmSWmmSWW"
    module = reorder(found.forward, named(found.forward, wanted))
    assert word(module) == wanted
    frozen = freeze(module)
    parameters = dict(model.named_parameters())
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    inputs = [parameters[found.parameters[name]].detach() if name in found.parameters else x for name in names]
    expected = model(x)
    for graph, patch, order in [
        (module, {}, "SWWm"),
        (module, SETTINGS, "SWWm"),
        (frozen, {}, ""),
        (frozen, SETTINGS, ""),
    ]:
        run, code = compiled(graph, dict(patch))
        assert (order in code.replace("k", "")) if order else code.replace("k", "") == wanted
        assert code.count("k") <= 9  # a frozen order costs no kernel beside those that fusion had joined
        torch.testing.assert_close(run(list(inputs))[0], expected)
    torch.testing.assert_close(frozen(*inputs)[0], expected)  # and it runs as it is
    assert freeze(frozen) is frozen


def test_work_between_waits_stays_between_them() -> None:
    """What reads the first collective comes before the wait for the second one, even if nobody but the caller reads it.

    So do gathers and scatters, whose results are memory of their own.
    """

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = functional.all_gather_into_tensor(x @ w, 4, "0")
        second = functional.reduce_scatter_tensor(w @ w, "sum", 4, "0")
        gathered = functional.wait_tensor(first)
        return torch.sin(gathered) * 2, torch.sin(functional.wait_tensor(second)) * 2

    module = make_fx(function, tracing_mode="fake")(torch.ones(4, DIMENSION), torch.ones(DIMENSION, DIMENSION))
    assert compiled(module, {})[1].endswith("SWk")  # one kernel behind both waits, and a wait before a start
    assert compiled(freeze(module), {})[1] == "mSmSWkWk"


def test_what_is_left_out_comes_where_it_is_needed() -> None:
    """An order need not name everything: waits sink to the first reader, and views and pointwise work follow."""
    found = captured(Halves(1), (torch.ones(8, DIMENSION),))
    module = found.forward
    second, first = (named(module, "mmSmmS")[index] for index in (5, 2))
    turned = reorder(module, [second, first])
    assert word(turned) == "mmSmmSWW"
    names = [node.name for node in turned.graph.nodes]
    assert names.index(second) < names.index(first)
    assert sorted(names) == sorted(node.name for node in module.graph.nodes)
    torch.testing.assert_close(turned(*inputs_of(turned)), module(*inputs_of(turned)))
    assert freeze(make_fx(torch.sin)(torch.ones(2))).graph.find_nodes(
        op="call_function", target=torch.ops.aten.sin.default
    )


def inputs_of(module: GraphModule) -> list[Tensor]:
    """Inputs of the sizes that a module was traced with."""
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    return [torch.linspace(-1, 1, value.numel()).reshape(value.shape) for value in values]


def in_flight(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A collective whose operand is written once it is waited for, random numbers, and a write in place."""
    y = x @ w
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(y, 4, "0"))
    doubled = y * 2
    y.add_(1)
    return gathered, doubled, torch.rand_like(x), torch.rand_like(w)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["wait_tensor", "all_gather_into_tensor"], "'wait_tensor' before 'all_gather_into_tensor'"),
        (["add_", "mul"], "'add_' before 'mul'"),
        (["all_gather_into_tensor", "add_", "wait_tensor"], "'add_' before 'wait_tensor'"),
        (["rand_like_1", "rand_like"], "'rand_like_1' before 'rand_like'"),
        (["mm", "mm"], "'mm' twice"),
        (["matmul"], "'matmul', which is no call"),
        (["x_1"], "'x_1', which is no call"),
    ],
)
def test_wrong_orders_are_refused(order: list[str], message: str) -> None:
    """Reads before writes, operands of what is in flight, random numbers; names that are wrong."""
    module = make_fx(in_flight, tracing_mode="fake")(torch.ones(4, DIMENSION), torch.ones(DIMENSION, DIMENSION))
    with pytest.raises(PlanError, match=re.escape(message)):
        reorder(module, order)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_order_that_keeps_dependencies_computes_the_same(seed: int) -> None:
    """Random orders, in place writes and all, agree with the module as it was to the bit; and any other is refused."""
    chosen = random.Random(seed)
    module = make_fx(written_in_place, tracing_mode="fake")(torch.ones(4, DIMENSION), torch.ones(DIMENSION, DIMENSION))
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    before = orderings(module.graph.nodes)
    order: list[str] = []
    left = list(nodes)
    while left:
        ready = [node for node in left if not any(other in left for other in before[node])]
        order.append(chosen.choice(ready).name)
        left = [node for node in left if node.name != order[-1]]
    turned = reorder(module, order)
    assert [node.name for node in turned.graph.nodes if node.op == "call_function"] == order
    inputs = inputs_of(module)
    expected, found = ((run(*(t.clone() for t in inputs))) for run in (module, turned))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    later = chosen.choice([node for node in nodes if any(other in nodes for other in before[node])])
    earlier = chosen.choice([other for other in before[later] if other in nodes])
    with pytest.raises(PlanError):
        reorder(module, [later.name, earlier.name])


def written_in_place(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Views, writes through them, and collectives."""
    y = x @ w
    rows = y[1:3]
    summed = all_reduce(y)
    rows.mul_(3)
    z = y + summed
    y.add_(z)
    columns = summed.t()
    columns.add_(1)
    return y.relu(), z, summed * 2, torch.sin(x)
