"""The pass on captured modules of one rank: what it returns computes the same calls, in an order that hides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.parallel_models import LLAMA_3_70B, TINY, DenseTensorParallel, tokens_of
from torch._subclasses.fake_tensor import FakeTensorMode

from opweave.compiler.frontend.collectives import is_wait
from opweave.compiler.frontend.ranks import Captured, captured, fake_ranks
from opweave.compiler.overlap import OverlapOptions
from opweave.compiler.plan import CollectiveStart, Run
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.hw_models.registry import load
from opweave.passes.overlap.modules import LOSS, overlapped

MACHINE = load("8xh100-nvlink")


@pytest.fixture(scope="module")
def layer() -> Iterator[Captured]:
    """One layer of a 70B model on one of 8 ranks, 4,096 tokens; no weights."""
    with fake_ranks(8), FakeTensorMode():
        sizes = LLAMA_3_70B.with_layers(1)
        yield captured(DenseTensorParallel(sizes), (tokens_of(sizes, 1, 4096),))


def names(module: torch.fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes]


def test_cut_module_is_in_the_plans_order_and_hides_most(layer: Captured) -> None:
    """The dense tensor-parallel all-reduce at 4,096 tokens, by NCCL alone: exposed communication falls by 60 %."""
    options = OverlapOptions(parts=(2,), algorithms=("nccl",))
    done = overlapped(layer.forward, layer.inputs, MACHINE, options)
    assert done.reason == ""
    assert sum(done.sizes) == 4096
    assert verify(done.plan).ok
    assert verify(done.before).ok
    assert done.seconds[1] < done.seconds[0]
    exposed = [sum(getattr(line, f"exposed_{when}_s") for line in done.lines) for when in ("before", "after")]
    assert exposed[1] < 0.4 * exposed[0]
    starts = [i.op for i in done.plan.instructions if isinstance(i, CollectiveStart)]
    order = names(done.module)
    assert [name for name in order if name in starts] == starts
    waits = {n.all_input_nodes[0].name: n.name for n in done.module.graph.nodes if is_wait(n.target)}
    first, other = starts[:2]
    between = order[order.index(first) : order.index(waits[first])]
    assert other in between or any(name.startswith("mm") for name in between)


def test_what_is_left_alone_is_the_module_itself(layer: Captured) -> None:
    done = overlapped(layer.forward, layer.inputs, MACHINE, OverlapOptions(margin=0.9, parts=(2,)))
    assert done.module is layer.forward
    assert "below the margin of 90 %" in done.reason
    assert {line.reason for line in done.lines} == {done.reason}
    assert done.seconds[0] == done.seconds[1]
    assert all(line.exposed_before_s == line.exposed_after_s for line in done.lines)


def test_sizes_are_taken_as_asked_for_and_refused_where_they_do_not_fit(layer: Captured) -> None:
    done = overlapped(layer.forward, layer.inputs, MACHINE, OverlapOptions(sizes=(1000, 3096)))
    assert done.sizes == (1000, 3096)
    with pytest.raises(OptionError, match="the sum of which is 2000"):
        overlapped(layer.forward, layer.inputs, MACHINE, OverlapOptions(sizes=(1000, 1000)))
    with pytest.raises(OptionError, match="no input can be cut"):
        overlapped(layer.forward, (), MACHINE, OverlapOptions(sizes=(2048, 2048)))


def test_without_inputs_it_is_only_put_in_order(layer: Captured) -> None:
    done = overlapped(layer.forward, (), MACHINE, OverlapOptions())
    assert done.sizes == ()
    assert sorted(names(done.module)) == sorted(names(layer.forward))


def test_what_talks_to_others_otherwise_is_left_alone(layer: Captured) -> None:
    """A receive has an order with collectives that nobody here knows; nothing moves, whatever is wanted."""
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    x = module.graph.placeholder("x")
    total = module.graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
    done = module.graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (total,))
    other = module.graph.call_function(torch.ops._c10d_functional.irecv.default, (x, 0, 0, "0"))
    for node in (x, total, done, other):
        node.meta["val"] = torch.empty(8, 4, device="meta")
    module.graph.output((done,))
    module.recompile()
    answer = overlapped(module, ["x"], MACHINE, OverlapOptions(sizes=(4, 4)))
    assert answer.module is module
    assert "talks to other ranks" in answer.reason


def test_the_backward_half_is_behind_the_loss(layer: Captured) -> None:
    """Of a training step: what a tangent reaches starts when all that the results are made by is done."""
    module = DenseTensorParallel(TINY, dtype=torch.float32)
    step = captured(module, (tokens_of(TINY, 1, 16, torch.float32),), training=True)
    assert step.joint is not None
    sizes = OverlapOptions(sizes=(8, 8))
    done = overlapped(step.joint, step.inputs, MACHINE, sizes, forward_outputs=step.outputs)
    assert done.sizes == (8, 8)
    for plan in (done.before, done.plan):
        assert verify(plan).ok
        loss = next(op for op in plan.graph.ops if op.name == LOSS)
        assert loss.inputs
        assert loss.outputs
        when = {i.op: i for i in plan.instructions if isinstance(i, Run)}[LOSS].start_s
        assert when is not None
        spans = {
            i.op: (i.start_s or 0.0, i.finish_s or 0.0)
            for i in plan.instructions
            if isinstance(i, Run | CollectiveStart)
        }
        makers = {name: op.name for op in plan.graph.ops for name in op.outputs}
        assert all(spans[makers[name]][1] <= when for name in loss.inputs)
        made = set(loss.outputs)
        readers = [
            op.name for op in plan.graph.ops if any(plan.graph.tensor[name].buffer in made for name in op.inputs)
        ]
        assert readers
        assert all(spans[name][0] >= when for name in readers)
