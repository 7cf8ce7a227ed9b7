"""Paths through a swarm of nodes: bounds and answers against all paths in all orders, and paths without regard."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.tasks import tasks_of
from opweave.errors import Infeasible, OptionError
from opweave.passes.pipeline_parallel.skipping import choose_routes, paths_alone, routes_bound
from opweave.passes.pipeline_parallel.solution import Objective, within_limit
from opweave.passes.pipeline_parallel.swarm import Path, Swarm, cheapest_path, problem_of, stage_orders
from tests.passes.pipeline_parallel.every_order import best_of_all

OBJECTIVES: tuple[Objective, ...] = ("makespan", "span")


def regions(passes: int, swaps: int = 0) -> Swarm:
    """Six stages on 5 + 5 * 3 nodes in four regions, 20 to 260 apart; 3 microbatches from each node of the first."""
    holds = tuple(stage for stage, count in enumerate((5, 3, 3, 3, 3, 3)) for _ in range(count))
    where = [(5 * node) % 4 for node in range(len(holds))]
    send = tuple(tuple(20 + 80 * abs(a - b) for b in where) for a in where)
    node = Stage(0, 60, 60, 60, until_weight_gradient_bytes=1)
    entries = tuple(3 if held == 0 else 0 for held in holds)
    return Swarm((node,) * len(holds), holds, send, entries, passes, swaps, None, (3,) * len(holds))


@st.composite
def tiny(draw: st.DrawFn) -> Swarm:
    """Two microbatches from one node, or one, through two of three stages that have a node or two."""
    holds = (0, 1, 1, 2)[: draw(st.integers(2, 4))] if draw(st.booleans()) else (0, 1, 2, 2)
    few = st.integers(0, 3)
    nodes = tuple(
        Stage(0, draw(few), draw(few), draw(few), until_weight_gradient_bytes=draw(st.integers(0, 1))) for _ in holds
    )
    send = tuple(tuple(draw(few) for _ in holds) for _ in holds)
    entries = (draw(st.integers(1, 2)),) + (0,) * (len(holds) - 1)
    most = draw(st.none() | st.integers(2, 3))
    limit = draw(st.none() | st.just((1,) * len(holds)))
    return Swarm(nodes, holds, send, entries, 2, 0, most, limit)


def all_paths(swarm: Swarm) -> list[tuple[Path, ...]]:
    """Every choice of paths that the swarm allows, of tiny swarms with one node of the first stage."""
    ways = [
        (0, *nodes)
        for order in stage_orders(swarm)
        for nodes in product(*(swarm.nodes_of[stage] for stage in order[1:]))
    ]
    chosen = []
    for paths in product(ways, repeat=swarm.microbatches):
        visits = Counter(swarm.holds[node] for path in paths for node in path[1:])
        if all(count <= swarm.visits for count in visits.values()):
            chosen.append(paths)
    return chosen


@settings(max_examples=8, deadline=None)
@given(tiny(), st.sampled_from(OBJECTIVES))
def test_bounds_and_answers_enclose_the_best_of_all_paths(swarm: Swarm, objective: Objective) -> None:
    """In all orders of the actions on every node."""
    found = [best_of_all(problem_of(swarm, paths), objective, most=600) for paths in all_paths(swarm)]
    assume(None not in found)
    best = min((value for value in found if value is not None and value >= 0), default=-1)
    assume(best >= 0)
    assert routes_bound(swarm, objective).value <= best
    solution = choose_routes(swarm, Budget.of_seconds(0.2), objective=objective)
    assert within_limit(solution.timed)
    assert solution.bound.value <= best <= solution.value


def test_hops_take_what_the_matrix_says_there_and_back() -> None:
    """From node to node, of the path and not of the stage; nothing else separates the passes of a microbatch alone."""
    swarm = regions(4)
    (path, *_) = paths_alone(swarm)
    tasks = tasks_of(problem_of(swarm, [path]), 0)
    lags = {(task.kind.value, task.stage): [lag for _, lag in task.after if lag] for task in tasks}
    for here, there in pairwise(path):
        assert lags["F", there] == [swarm.send_ns[here][there]]
        assert lags["I", here] == [swarm.send_ns[there][here]]


@pytest.mark.parametrize("swaps", [0, 1])
def test_paths_are_as_the_swarm_allows(swaps: int) -> None:
    """From the first stage, through so many, in order but for one exchange, no stage too often, within memory."""
    swarm = regions(4, swaps)
    solution = choose_routes(swarm, Budget.of_seconds(0.7))
    problem = solution.timed.schedule.problem
    visits = Counter[int]()
    for route in problem.routes:
        stages = tuple(swarm.holds[node] for node in route.stages)
        assert stages in set(stage_orders(swarm))
        visits.update(dict.fromkeys(stages[1:], route.microbatches))
    assert Counter(route.stages[0] for route in problem.routes for _ in range(route.microbatches)) == dict.fromkeys(
        range(5), 3
    )
    assert max(visits.values()) <= swarm.visits == 9
    assert within_limit(solution.timed)
    assert routes_bound(swarm).value <= solution.bound.value <= solution.value


def test_regard_for_others_is_better_than_none_and_skipping_than_neither() -> None:
    """Against cheapest paths, which collide; and half of the stages against all of them."""
    values = {}
    for passes in (6, 3):
        solution = choose_routes(regions(passes), Budget.of_seconds(1.0))
        alone = next(attempt for attempt in solution.attempts if attempt.method == "cheapest paths")
        assert alone.value is not None
        assert solution.value < alone.value
        values[passes] = solution.value
    assert values[3] < 0.5 * values[6]


def test_weight_gradients_do_not_wait_for_what_travels_back() -> None:
    """Out in 1 + 10, forward and I in 2, back in 10 + 1: W of the far node, as long as that, is done meanwhile."""
    near, far = Stage(0, 1, 1, 0), Stage(0, 1, 1, 11)
    swarm = Swarm((near, far), (0, 1), ((0, 10), (10, 0)), (1, 0), 2)
    assert routes_bound(swarm).value == 24
    assert choose_routes(swarm, Budget.of_seconds(1)).value == 24


def test_the_cheapest_path_is_the_cheapest() -> None:
    """Compared with every path from the node."""
    swarm = regions(3)
    orders = list(stage_orders(swarm))
    price = [7.0 * node for node in range(len(swarm.nodes))]
    found = cheapest_path(swarm, 1, orders, price)
    assert found is not None

    def cost(path: Path) -> float:
        hops = sum(swarm.send_ns[a][b] + swarm.send_ns[b][a] for a, b in pairwise(path))
        return hops + sum(120 + price[node] for node in path[1:])

    ways = [(1, *rest) for order in orders for rest in product(*(swarm.nodes_of[stage] for stage in order[1:]))]
    assert found[0] == cost(found[1]) == min(map(cost, ways))
    assert cheapest_path(swarm, 1, [], price) is None


def test_a_node_too_small_for_a_microbatch_is_infeasible() -> None:
    """Where there is no way around it."""
    node = Stage(0, 1, 1, 1, until_weight_gradient_bytes=2)
    with pytest.raises(Infeasible):
        choose_routes(Swarm((node, node), (0, 1), ((0, 1), (1, 0)), (1, 0), 2, 0, None, (2, 1)), Budget.of_seconds(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holds": (0,)}, "2 nodes need as many"),
        ({"send_ns": ((0,), (0,))}, "2 nodes need as many"),
        ({"holds": (0, 2)}, "hold stages \\[0, 2\\]"),
        ({"passes": 3}, "3 of 2 stages"),
        ({"passes": 0}, "0 of 2 stages"),
        ({"swaps": 2}, "2 swaps"),
        ({"entries": (1, 1)}, "begin at nodes that hold stage 0"),
        ({"entries": (-1, 0)}, "begin at nodes that hold stage 0"),
        ({"entries": (0, 0)}, "no microbatch"),
        ({"most_visits": 1}, "1 stages that take 1 microbatches"),
    ],
)
def test_swarms_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    """By what does not go together."""
    node = Stage(0, 1, 1, 1)
    fields: dict[str, object] = {
        "nodes": (node, node),
        "holds": (0, 1),
        "send_ns": ((0, 1), (1, 0)),
        "entries": (2, 0),
        "passes": 2,
    }
    with pytest.raises(OptionError, match=message):
        Swarm(**(fields | changes))  # type: ignore[arg-type]


def test_paths_of_another_length_are_refused() -> None:
    """A path that skips more than was asked for, or less."""
    with pytest.raises(OptionError, match="another length than 4"):
        problem_of(regions(4), [(0, 5)])
