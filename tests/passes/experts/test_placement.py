"""Both integer programs against all clusters and all placements of tiny layers; facts against plain recounts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.errors import MachineError, OptionError, PlanError
from opweave.hw_models.registry import load
from opweave.passes.experts._program import by_program
from opweave.passes.experts.balance import balanced, uneven, uneven_bound
from opweave.passes.experts.placement import ExpertPlacement, PlaceExperts, facts_of
from opweave.passes.experts.placing import placed, transfer_bound_s, transfer_s
from opweave.passes.experts.problem import Clusters, ExpertProblem, expert_problem
from opweave.passes.experts.trace import RoutingTrace, zipf_trace


def _all_clusters(experts: tuple[int, ...], room: int) -> list[Clusters]:
    """Every way to divide ``experts`` into clusters of ``room``."""
    if not experts:
        return [()]
    first, rest = experts[0], experts[1:]
    result = []
    for others in combinations(rest, room - 1):
        left = tuple(e for e in rest if e not in others)
        result += [((first, *others), *clusters) for clusters in _all_clusters(left, room)]
    return result


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 2)]), st.data())
def test_balance_is_the_best_of_all(sizes: tuple[int, int], data: st.DataObject) -> None:
    """Proven: value and bound are the least of all divisions; the arithmetic bound alone is never above it."""
    devices, room = sizes
    count = devices * room
    loads = np.array(data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)))
    least = min(uneven(loads, clusters) for clusters in _all_clusters(tuple(range(count)), room))
    found = balanced(loads, devices, Budget.of_seconds(30))
    assert uneven_bound(loads, devices) <= least + 1e-9
    assert found.value == pytest.approx(least)
    assert least - 1e-3 <= found.bound <= least + 1e-9
    assert sorted(e for cluster in found.clusters for e in cluster) == list(range(count))
    assert {len(cluster) for cluster in found.clusters} == {room}


def _problem(node: tuple[int, ...], flows: list[list[int]], far: float) -> ExpertProblem:
    """One expert a device: clusters are experts, and only the second program decides."""
    nodes = np.array(node)
    pair = np.where(nodes[:, None] == nodes[None, :], 1.0, far)
    np.fill_diagonal(pair, 0.0)
    flow = np.array(flows, np.int64).reshape(-1, len(node), len(node))
    return ExpertProblem(np.ones((len(flow) + 1, len(node)), np.int64), flow, pair, node, 2)


@st.composite
def problems(draw: st.DrawFn, node: tuple[int, ...] = (0, 0, 1, 1)) -> ExpertProblem:
    size = len(node) ** 2
    flows = draw(st.lists(st.lists(st.integers(0, 9), min_size=size, max_size=size), min_size=1, max_size=2))
    return _problem(node, flows, draw(st.sampled_from([1.0, 3.0, 9.0])))


def _least_s(problem: ExpertProblem) -> float:
    ways = [np.array(p) for p in permutations(range(problem.devices))]
    return min(
        sum(problem.slowest_s(problem.flow[i], here[i], here[i + 1]) for i in range(len(problem.flow)))
        for here in product(ways, repeat=problem.layers)
    )


@settings(max_examples=25, deadline=None)
@given(st.one_of(problems((0, 1, 1)), problems((0, 0, 0)), problems((0, 1, 2))))
def test_placement_is_the_best_of_all(problem: ExpertProblem) -> None:
    """Trying permutations layer by layer, and the program, find the least of all placements, and prove it."""
    clusters = [problem.default()] * problem.layers
    least = _least_s(problem)
    found = placed(problem, clusters, Budget.of_seconds(20))
    assert found.value == pytest.approx(least)
    assert found.bound == found.value
    assert transfer_bound_s(problem, clusters) <= least * (1 + 1e-9)
    start = [np.arange(problem.devices)] * problem.layers
    device, bound = by_program(problem, list(problem.flow), start, Budget.of_seconds(20))
    value = sum(problem.slowest_s(problem.flow[i], device[i], device[i + 1]) for i in range(len(problem.flow)))
    assert value == pytest.approx(least)
    assert least * (1 - 1e-2) - 1e-3 <= bound <= least * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_bound_of_two_nodes_holds(problem: ExpertProblem) -> None:
    """Where clusters have to fit on nodes, no permutation of one layer undercuts the bound."""
    problem = replace(problem, flow=problem.flow[:1], load=problem.load[:2])
    clusters = [problem.default()] * 2
    assert transfer_bound_s(problem, clusters) <= _least_s(problem) * (1 + 1e-9)


def test_larger_problems_are_searched_and_bounded() -> None:
    """Six devices: more permutations than are tried. On one node the arithmetic bound is met; on two there is a gap."""
    trace = zipf_trace(500, 4, 12, 2, skew=0.6, follow=0.6)
    for machine, closed in (("8xh100-nvlink", True), ("2x8xh100-infiniband", False)):
        problem = expert_problem(trace, load(machine), devices=6)
        if not closed:
            problem = _problem((0, 0, 0, 1, 1, 1), problem.flow[:, :6, :6].tolist(), 9.0)
        clusters = [problem.default()] * problem.layers
        found = placed(problem, clusters, Budget.of_seconds(1.0))
        assert found.bound <= found.value <= transfer_s(problem, clusters)
        assert not closed or found.value <= found.bound * (1 + 1e-9)
        for layer in found.device:
            assert sorted(layer) == list(range(6))


def test_facts_are_those_of_the_tokens() -> None:
    """Bytes that move, counted token by token, and the load of the fullest device."""
    trace = zipf_trace(200, 3, 8, 2, seed=3)
    machine = load("2x8xh100-infiniband")
    problem = expert_problem(trace, machine, devices=4, token_bytes=10)
    problem = replace(problem, node=(0, 0, 1, 1))
    found = PlaceExperts(token_bytes=10, devices=4).place(trace, machine, Budget.of_seconds(5))
    places = [tuple(order[2 * g : 2 * g + 2] for g in range(4)) for order in found.order]
    facts = facts_of(problem, places)
    moved = across = 0
    for token in trace.chosen:
        for layer, experts in enumerate(token[:-1]):
            for before, after in product(experts, token[layer + 1]):
                pair = found.device_of(layer, before), found.device_of(layer + 1, after)
                moved += pair[0] != pair[1]
                across += pair[0] // 2 != pair[1] // 2
    assert (facts.moved_bytes, facts.across_bytes) == (10 * moved, 10 * across)
    fullest = [max(trace.load[i][list(c)].sum() for c in places[i]) / (400 / 4) for i in range(3)]
    assert facts.imbalance == pytest.approx(np.mean(fullest))
    assert facts.worst_imbalance == pytest.approx(max(fullest))
    assert found.found.moved_bytes == facts.moved_bytes


def test_placing_helps_and_is_written(tmp_path: Path) -> None:
    """Skewed layers that hang together: more even, less moved; the file says the same; same input, same answer."""
    trace = zipf_trace(1000, 6, 16, 2, skew=0.5, follow=0.7)
    machine = load("8xh100-nvlink")
    found, again = (
        PlaceExperts(devices=4).place(trace, machine, Budget.of_seconds(20, deterministic=True)) for _ in range(2)
    )
    assert found.order == again.order
    assert found.found.imbalance < 1.02 < found.default.imbalance
    assert found.found.moved_bytes < found.default.moved_bytes
    assert found.found.transfer_s < found.default.transfer_s
    assert found.transfers[1] <= found.transfers[0] == pytest.approx(found.found.transfer_s)
    for order, places in zip(found.order, found.remap, strict=True):
        assert [order[place] for place in places] == list(range(16))
    found.save(tmp_path / "p.json")
    assert ExpertPlacement.load(tmp_path / "p.json") == found


def test_one_layer_or_one_device_has_nothing_to_move() -> None:
    trace = zipf_trace(100, 1, 4, 1)
    found = PlaceExperts(devices=2).place(trace, load("8xh100-nvlink"), Budget.of_seconds(5))
    assert (found.found.moved_bytes, found.transfers) == (0, (0.0, 0.0))
    alone = PlaceExperts(devices=1).place(zipf_trace(100, 3, 4, 1), load("8xh100-nvlink"), Budget.of_seconds(5))
    assert (alone.found.imbalance, alone.found.moved_bytes) == (1.0, 0)
    uniform = RoutingTrace(np.zeros((3, 2, 1), np.int64), 4)  # experts that nobody asks for
    assert PlaceExperts(devices=2).place(uniform, load("8xh100-nvlink"), Budget.of_seconds(5)).found.imbalance == 2.0


def test_without_time_heuristics_answer() -> None:
    trace = zipf_trace(500, 3, 16, 2)
    found = PlaceExperts(devices=8).place(trace, load("8xh100-nvlink"), Budget.of_seconds(0))
    assert found.found.imbalance < found.default.imbalance
    assert found.transfers[1] <= found.transfers[0]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    trace = zipf_trace(10, 2, 6, 1)
    with pytest.raises(MachineError, match="is one device"):
        expert_problem(trace, load("h100-sxm"))
    with pytest.raises(MachineError, match="on 9 devices"):
        expert_problem(trace, load("8xh100-nvlink"), devices=9)
    with pytest.raises(OptionError, match="6 experts do not divide among 4"):
        expert_problem(trace, load("8xh100-nvlink"), devices=4)
    with pytest.raises(OptionError, match="bytes"):
        expert_problem(trace, load("8xh100-nvlink"), devices=2, token_bytes=0)
    with pytest.raises(OptionError, match="tolerance"):
        PlaceExperts(tolerance=1.0)
    with pytest.raises(OptionError, match="do not divide"):
        balanced(np.array([1, 2, 3]), 2, Budget.of_seconds(1))
    for text in ("{}", "[", '{"machine": "m"}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(PlanError, match="no expert placement"):
            ExpertPlacement.load(tmp_path / "p.json")
    with pytest.raises(PlanError, match="cannot read"):
        ExpertPlacement.load(tmp_path / "missing.json")
