"""A rank's graph in its own order: what is queued on which stream behind what, and what comes of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from opweave.compiler.frontend.aten import bind_arguments
from opweave.compiler.frontend.dynamo.frozen import freeze, is_start, orderings, reorder
from opweave.compiler.frontend.ranks import fake_ranks
from opweave.compiler.runtime import distributed
from opweave.compiler.runtime.distributed import CapturedRank, RankExecutor
from opweave.compiler.runtime.virtual_link import virtual_link
from opweave.errors import ExecutionError
from tests.support.queues import Clock, Driver, Event, Launches, Stream, queues

functional = torch.ops._c10d_functional
CUDA = torch.device("cuda", 0)
N = 4


class Network(Launches):  # type: ignore[no-untyped-call] # of a class of torch's
    """Operators are queued on a driver's streams; collectives on one of their backend's, behind the current one.

    ``behind`` is, for each collective, how far each stream must be when it starts.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.own: dict[str, Stream] = {}
        self.ends: dict[int, Event] = {}
        self.behind: list[Clock] = []
        self.module: GraphModule  # what it runs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "_c10d_functional":
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is functional.wait_tensor.default:
            self.driver.current.wait_event(self.ends.pop(args[0].untyped_storage().data_ptr()))
            return args[0]
        group = bind_arguments(func, args, kwargs or {})["group_name"]
        new: Any = torch.cuda.Stream  # the driver's
        caller, stream = self.driver.current, self.own.setdefault(group, new())
        mark, end = Event(), Event()
        mark.record(caller)
        stream.wait_event(mark)
        self.behind.append(dict(stream.clock))
        made = torch.stack([args[0]] * N).sum(0) if "all_reduce" in str(func) else torch.cat([args[0]] * N)
        is_in_place = func._schema.is_mutable
        result = args[0] if is_in_place else self.driver.empty(tuple(made.shape), made.stride(), made.dtype)
        result.copy_(made)
        self.driver.set_stream(stream)
        self.driver.launch(str(func), [(args[0], is_in_place), (result, True)])
        self.driver.set_stream(caller)
        end.record(stream)
        self.ends[result.untyped_storage().data_ptr()] = end
        return result


def work(x: Tensor, w: Tensor, reduce: Callable[[Tensor, str], Tensor]) -> tuple[Tensor, ...]:
    """Two groups, results that feed other collectives, views, a write in place, and what outlives nothing."""
    y = x @ w
    first = reduce(y, "0")
    other = torch.tanh(y @ w)
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(other[1:3], N, "1"))
    z = first.t() @ first
    y.add_(other)
    second = reduce(y, "1")
    third = functional.wait_tensor(functional.all_gather_into_tensor(z, N, "0"))
    fourth = reduce(gathered @ w, "0")
    return second.relu(), third @ torch.cos(fourth).t()[:8].t()[:8].t(), torch.sin(x)


def reduced(x: Tensor, group: str) -> Tensor:
    """A start and its wait."""
    result: Tensor = functional.wait_tensor(functional.all_reduce(x, "sum", group))
    return result


def reduced_in_place(x: Tensor, group: str) -> Tensor:
    """The same in memory that exists."""
    result: Tensor = functional.wait_tensor(functional.all_reduce_(x.clone(), "sum", group))
    return result


def traced(reduce: Callable[[Tensor, str], Tensor] = reduced) -> tuple[GraphModule, list[Tensor]]:
    """The work as a graph, and its inputs."""
    inputs = [torch.linspace(-1, 1, 64).reshape(8, 8), torch.linspace(1, -1, 64).reshape(8, 8).cos() / 3]
    with fake_ranks(N):
        torch.distributed.new_group(list(range(N)))
        module = make_fx(lambda x, w: work(x, w, reduce), tracing_mode="fake")(*inputs)
    return module, inputs


def shuffled(module: GraphModule, seed: int) -> GraphModule:
    """In any order that keeps dependencies."""
    chosen = random.Random(seed)
    before, left = orderings(module.graph.nodes), [n for n in module.graph.nodes if n.op == "call_function"]
    order = []
    while left:
        node = chosen.choice([node for node in left if not any(other in left for other in before[node])])
        order.append(node.name)
        left.remove(node)
    return reorder(module, order)


@contextmanager
def on_streams(module: GraphModule, **options: Any) -> Iterator[tuple[RankExecutor, Network]]:
    """An executor of a GPU, and what it queues."""
    with queues() as (driver, _):
        network = Network(driver)
        executor = RankExecutor(module, device=CUDA, **options)
        run = network.module = executor.module

        class Queued(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Any:
                with network:
                    return run(*inputs)

        executor.module = Queued()  # type: ignore[assignment]
        executor.device = torch.device("cpu")  # there is no device to make current
        yield executor, network


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_streams_keep_every_order_from_racing(seed: int, in_place: bool) -> None:
    """Twice in a row, in whatever order: nobody reads too early, and no bytes are given to others too early."""
    module, inputs = traced(reduced_in_place if in_place else reduced)
    with virtual_link(N, 0.0, 1e12):
        torch.distributed.new_group(list(range(N)))
        expected = module(*(t.clone() for t in inputs))
        shuffled_module = shuffled(module, seed)
        host = RankExecutor(shuffled_module)(*(t.clone() for t in inputs))
    with on_streams(shuffled_module) as (executor, network):
        for _ in range(2):
            found = executor(*(t.clone() for t in inputs))
        assert network.driver.races == []
        assert len(network.behind) == 10
    for one, other, third in zip(expected, found, host, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)


@pytest.mark.parametrize("mistake", ["no event", "not recorded", "not held"])
def test_what_the_streams_are_for(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """Without an event, without marking results as used, without holding operands, something races in some order."""
    queued = distributed._Queued
    if mistake == "no event":
        monkeypatch.setattr(queued, "ready", lambda self: self.is_ready.record(self.stream))
    elif mistake == "not recorded":
        wait = distributed._InFlight.wait
        monkeypatch.setattr(queued, "wait", lambda self, *args: wait(self, *args))
    module, inputs = traced()
    races = 0
    for seed in range(12):
        with on_streams(shuffled(module, seed)) as (executor, network):
            if mistake == "not held":
                let_go(network.module)
            for _ in range(2):
                executor(*(t.clone() for t in inputs))
            races += bool(network.driver.races)
    assert races


def let_go(module: GraphModule) -> None:
    """Take the operands from an executor's waits."""
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") == "wait":
            node.args = node.args[:1]
    module.recompile()


def test_a_collective_starts_behind_its_operands_alone() -> None:
    """What is issued between an operand and a start does not keep the collective from starting."""
    module, inputs = traced()
    names = [node.name for node in module.graph.nodes if is_start(node)]
    late = reorder(module, ["mm", "mm_1", "tanh", "sin", names[0], names[1]])
    with on_streams(late) as (executor, network):
        caller = network.driver.current.number
        executor(*inputs)
        first, second = network.behind[0][caller], network.behind[1][caller]
        assert (first, second) == (1, 3)  # of the four launches before either
        assert all(stream.priority == distributed.PRIORITY for stream in executor.streams.values())
        assert set(executor.streams) == {"0", "1"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_collectives_of_ours_are_started_in_the_place_of_others(device: str) -> None:
    """A function of the caller's is given the start's arguments, on the stream of the group; waits follow an event."""
    module, inputs = traced()
    calls: list[tuple[Any, ...]] = []
    name = next(node.name for node in module.graph.nodes if is_start(node))

    def ours(x: Tensor, operation: str, group: str) -> Tensor:
        calls.append((operation, group))
        return x * N

    with virtual_link(N, 0.0, 1e12):
        torch.distributed.new_group(list(range(N)))
        expected = module(*(t.clone() for t in inputs))
        if device == "cpu":
            found = RankExecutor(module, starts={name: ours})(*(t.clone() for t in inputs))
    if device == "cuda":
        for seed in range(8):
            with on_streams(shuffled(module, seed), starts={name: ours}) as (executor, network):
                found = executor(*(t.clone() for t in inputs))
                assert network.driver.races == []
                assert len(network.behind) == 4
    assert set(calls) == {("sum", "0")}
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_mistakes_are_errors() -> None:
    """Frozen modules, starts that are none, collectives that nobody waits for, graphs of a host."""
    module, inputs = traced()
    with pytest.raises(ExecutionError, match="held in an order for Inductor"):
        RankExecutor(freeze(module))
    with pytest.raises(ExecutionError, match="'mm' starts nothing"):
        RankExecutor(module, starts={"mm": torch.mm})
    with pytest.raises(ExecutionError, match="cannot hold work of cpu"):
        CapturedRank(RankExecutor(module))
    with fake_ranks(N):
        open_ended = make_fx(lambda x: functional.all_reduce(x, "sum", "0"), tracing_mode="fake")(inputs[0])
    with pytest.raises(ExecutionError, match="nothing waits for it"):
        RankExecutor(open_ended, starts={"all_reduce": torch.neg})
    with queues(), pytest.raises(ExecutionError, match="must wait for 'all_reduce'"):
        CapturedRank(RankExecutor(open_ended, device=CUDA))
