"""In-place results change where values lie, never what they are; what may be written over is what nobody needs."""

from __future__ import annotations

from functools import partial
from itertools import permutations, product
from pathlib import Path

import msgspec
import pytest
import torch
from benchmarks.networks import darts_cifar
from hypothesis import HealthCheck, given, settings
from torch import nn

import opweave
from opweave.api import read_model, streamable
from opweave.compiler.compiled import CompiledModel
from opweave.compiler.graph import Graph, Role
from opweave.compiler.pipeline import Budget, run_pass
from opweave.compiler.plan import Pin, Plan
from opweave.compiler.rewritten import computes_same
from opweave.compiler.simulate import simulate
from opweave.compiler.verify import verify
from opweave.errors import OptionError
from opweave.passes.arena import least_arena
from opweave.passes.inplace._overwrite import candidates, overwritten
from opweave.passes.inplace.elementwise import ElementwiseInPlace
from opweave.passes.order.problem import OrderProblem
from opweave.passes.planner import Planner
from tests.compiler.runtime.eager import run, same
from tests.graphs.build import GraphBuilder, all_graphs, machine, random_sources
from tests.graphs.plans import keep_everything
from tests.graphs.strategies import graphs

AMPLE = partial(Budget.of_seconds, 600.0, deterministic=True)
MODES = (ElementwiseInPlace("any"), ElementwiseInPlace("least_peak"))


def rewritten(graph: Graph, mode: ElementwiseInPlace, alignment: int = 1) -> Plan:
    return run_pass(mode, Plan.of_order(graph, machine(1 << 20, alignment)), AMPLE())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", all_graphs())
def test_computes_what_the_model_computes(name: str, mode: ElementwiseInPlace) -> None:
    """Executed in a scratchpad of exactly the arena's size, at the addresses planned."""
    graph = all_graphs()[name]
    plan = rewritten(graph, mode)
    assert computes_same(plan.graph, graph)
    planned = Planner("order/given", "residency/ilp", "address/exact(minimize=True)").plan(plan, AMPLE())
    small = msgspec.structs.replace(planned, machine=machine(verify(planned).arena_bytes, 1))
    sources = random_sources(graph)
    assert same(run(small, sources), graph, sources)


@given(graphs(max_ops=9))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_graphs_compute_what_they_computed(graph: Graph) -> None:
    sources = random_sources(graph)
    for mode in MODES:
        plan = rewritten(graph, mode, 16)
        assert computes_same(plan.graph, graph)
        assert same(run(keep_everything(plan.graph), sources), graph, sources)


@given(graphs(max_ops=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_least_peak_is_least_of_all_orders_and_choices(graph: Graph) -> None:
    """By brute force: every order, and in it every choice of operands that computes the same."""
    plan = rewritten(graph, MODES[1])
    certificate = plan.certificates[-1]
    results = [[(t, b) for t in op.outputs for b in bs] for op, bs in zip(graph.ops, candidates(graph), strict=True)]
    least = certificate.value + 1
    for order in permutations(range(len(graph.ops))):
        if any(order.index(p) > order.index(op) for op in order for p in graph.predecessors[op]):
            continue
        for choice in product(*([None, *options] for options in results)):
            fresh = overwritten(graph, dict(pair for pair in choice if pair), order)
            if computes_same(fresh, graph):
                problem = OrderProblem.of(Plan.of_order(fresh, machine(1 << 20, 1)))
                least = min(least, problem.peak_bytes(range(len(order))))
    assert certificate.value == certificate.bound == least


@given(graphs(max_ops=9))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_keeps_every_order(graph: Graph) -> None:
    """Dependencies stay as they are up to what follows from them: the operators that must come before each one."""
    assert ancestors(rewritten(graph, MODES[0]).graph) == ancestors(graph)


def ancestors(graph: Graph) -> list[set[int]]:
    found: list[set[int]] = []
    for before in graph.predecessors:
        found.append(set(before).union(*(found[p] for p in before)))
    return found


def versions(graph: Graph, mode: ElementwiseInPlace = MODES[0]) -> dict[str, str]:
    """Results that are written over an operand, with the buffer they are in now."""
    return {t.name: t.buffer for t in rewritten(graph, mode).graph.tensors if t.buffer != graph.tensor[t.name].buffer}


def test_a_chain_stays_in_one_buffer() -> None:
    g = GraphBuilder("chain")
    y = g.matmul(g.input("x", 4, 4), g.weight("w", 4, 4), "a")
    for i, name in enumerate("bcd"):
        y = g.unary(("relu", "tanh", "sigmoid")[i], y, name)
    assert versions(g.build(g.matmul(y, "w", "y"))) == {"b": "a", "c": "a", "d": "a"}


def test_a_shortcut_is_written_over_where_the_branch_ends() -> None:
    """The addition comes after all that read the shortcut, in every order; the branch's own end would do as well."""
    g = GraphBuilder("shortcut")
    a = g.matmul(g.input("x", 4, 4), g.weight("w", 4, 4), "a")
    branch = g.matmul(g.matmul(a, "w", "b"), "w", "c")
    graph = g.build(g.matmul(g.binary("add", a, branch, "sum"), "w", "y"))
    assert versions(graph) == {"sum": "a"}


def test_one_of_two_readers_only_where_the_order_is_decided() -> None:
    g = GraphBuilder("fork")
    a = g.matmul(g.input("x", 4, 4), g.weight("w", 4, 4), "a")
    left, right = g.unary("relu", a, "left"), g.unary("tanh", a, "right")
    g.op("aten.cat.default([%0, %1], 0)", left, right, outputs={"y": (8, 4)})
    graph = g.build("y")
    assert versions(graph) == {}
    assert list(versions(graph, MODES[1]).values()) == ["a"]


@pytest.mark.parametrize("kept", ["source", "output", "transposed", "broadcast", "softmax", "bool", "part"])
def test_what_is_needed_stays(kept: str) -> None:
    g = GraphBuilder(kept)
    a = g.matmul(g.input("x", 4, 4), g.weight("w", 4, 4), "a")
    match kept:
        case "source":
            graph = g.build(g.matmul(g.unary("relu", "x", "b"), a, "y"))
        case "output":
            graph = g.build(g.unary("relu", a, "y"), a)
        case "transposed":
            g.view("at", a, 4, 4, strides=(1, 4))
            graph = g.build(g.binary("add", a, "at", "y"))
        case "broadcast":
            row = g.tensor("row", 1, 4, role=Role.ACTIVATION)
            g.call("aten.sum.dim_IntList(%0, [0], True)", a, outputs=(row,))
            graph = g.build(g.binary("add", "x", row, "y"))
        case "softmax":
            g.op("aten._softmax.default(%0, 1, False)", a, outputs={"y": (4, 4)})
            graph = g.build("y")
        case "bool":
            g.tensor("y", 4, 4, role=Role.ACTIVATION, dtype="bool")
            g.call("aten.gt.Scalar(%0, 0)", a, outputs=("y",))
            graph = g.build("y")
        case "part":
            graph = g.build(g.unary("relu", g.view("first", a, 2, 4), "y"))
    assert versions(graph) == {}


def test_batch_normalisation_in_inference_is_elementwise() -> None:
    g = GraphBuilder("norm")
    a = g.matmul(g.input("x", 4, 4), g.weight("w", 4, 4), "a")
    mean, variance = g.weight("mean", 4), g.weight("variance", 4)
    for name, shape in {"y": (4, 4), "m": (0,), "v": (0,)}.items():
        g.tensor(name, *shape, role=Role.ACTIVATION)
    body = "aten._native_batch_norm_legit_no_training.default(%0, None, None, %1, %2, 0.1, 1e-05)"
    g.call(body, a, mean, variance, outputs=("y", "m", "v"))
    assert versions(g.build("y")) == {"y": "a"}


class Small(nn.Module):
    """A shortcut around two activations, and statistics that every call updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1.0)
        inner = torch.relu(self.first(x))
        return torch.sigmoid(self.second(inner) + inner)


@pytest.mark.parametrize("mode", MODES)
def test_a_rewritten_plan_is_saved_and_bound_again(tmp_path: Path, mode: ElementwiseInPlace) -> None:
    """Weights and outputs go by the names of tensors, which stay; the plan is recognised as one of the same model."""
    module, x = Small().eval(), torch.randn(4, 8)
    program, _ = read_model(module, (x,))
    plan = run_pass(mode, Plan.of_order(program.graph, machine(1 << 16)), AMPLE())
    assert plan.graph != program.graph
    planned = Planner("order/given", "residency/ilp", "address/exact").plan(plan, AMPLE())
    CompiledModel(planned, program).save(tmp_path / "plan.json")
    loaded = opweave.load_plan(tmp_path / "plan.json", (module, (x,)))
    assert torch.allclose(loaded(x), Small().eval()(x), atol=1e-6)
    assert module.calls.item() == 1.0


def test_a_searched_network_runs_in_an_arena_of_its_least_peak(tmp_path: Path) -> None:
    """Order, results in place and addresses decided together: the same logits, bit for bit, in no more bytes."""
    program, source = read_model(darts_cifar(cells=3, channels=4, image=16))
    empty = Plan.of_order(program.graph, machine(1 << 24, 64), streamed=streamable(program.graph), source=source)
    out_of_place = least_arena(empty, AMPLE())
    in_place = least_arena(run_pass(MODES[1], empty, AMPLE()), AMPLE())
    certificate = in_place.certificates[-1]
    assert certificate.value == certificate.bound <= out_of_place.certificates[-1].value
    results = []
    for plan in (out_of_place, in_place):
        exact = msgspec.structs.replace(plan, machine=machine(verify(plan).arena_bytes, 64))
        model = CompiledModel(simulate(exact), program)
        results.append(model.execute(model.random_inputs(seed=1)))
    assert torch.equal(*(result.outputs[0] for result in results))
    assert in_place.graph != program.graph
    assert set(CompiledModel(in_place, program).report(tmp_path)) >= {"plan.json", "index.html"}


@pytest.mark.parametrize("mode", MODES)
def test_pins_of_buffers_that_may_go_are_refused(mode: ElementwiseInPlace) -> None:
    """They are never dropped in silence."""
    graph = all_graphs()[next(iter(all_graphs()))]
    buffer = next(name for name, base in graph.buffers.items() if base.nbytes)
    plan = Plan.of_order(graph, machine(1 << 20, 1), pins=[Pin(buffer, resident=True)])
    with pytest.raises(OptionError, match="pins"):
        mode.apply(plan, AMPLE())
