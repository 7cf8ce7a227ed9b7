"""Routes that skip stages: which nodes each microbatch passes through, so that the step ends soonest.

SkipPipe (Blagoev, Chen and Ersoy, arXiv 2502.19913) looks for paths that do not collide by conflict-based search over
the forward passes. Here paths are chosen by what they take and how busy their nodes are, judged by schedules of the
whole step within each node's memory, and bettered a few microbatches at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from ...compiler.pipeline import Budget
from ...compiler.pipelining.schedule import TimedSchedule
from ...errors import Infeasible
from ._choosing import quick
from .solution import Attempt, Bound, Objective, PipelineSolution, value_of
from .solve import solve
from .swarm import Path, Swarm, cheapest_path, least_input_gradient_ns, problem_of, stage_orders

__all__ = ["choose_routes", "paths_alone", "routes_bound"]

_WEIGHTS = (0.0, 0.5, 1.0, 2.0)  # of how busy a node is, beside what a path takes
_MOVED = 3  # microbatches that get other paths at a time
_TRIED = 200  # such tries, where clocks may not decide


def choose_routes(swarm: Swarm, budget: Budget, *, objective: Objective = "makespan") -> PipelineSolution:
    """The best schedule found for any paths that ``swarm`` allows; its problem's routes are the paths chosen.

    The bound holds for all paths. Attempts begin with cheapest paths that take no notice of each other.

    Raises:
        Infeasible: the memory limit is not kept on the paths that were found.
    """
    begin = time.monotonic()
    search = _Search(swarm, objective)
    attempts = []
    for weight in _WEIGHTS:
        started = time.monotonic()
        value = search.offer(_paths(swarm, weight))
        name = f"paths, nodes' work counted {weight:g} times" if weight else "cheapest paths"
        attempts.append(Attempt(name, None if value == float("inf") else int(value), time.monotonic() - started))
    bound = routes_bound(swarm, objective)
    started = time.monotonic()
    _better(search, bound, budget.share(0.6))
    if search.best is not None:
        value = value_of(search.best, objective)
        attempts.append(Attempt("paths bettered few by few", value, time.monotonic() - started))
    problem = problem_of(swarm, search.paths)
    hints = [search.best.schedule] if search.best else []
    solution = solve(problem, budget, objective=objective, hints=hints)
    if bound.value > solution.value:
        bound = replace(bound, value=solution.value)
    return replace(solution, bound=bound, attempts=(*attempts, *solution.attempts), seconds=time.monotonic() - begin)


def paths_alone(swarm: Swarm) -> tuple[Path, ...]:
    """For each microbatch the path that takes least if it were alone, no stage being passed too often."""
    return _paths(swarm, 0.0)


def _entries(swarm: Swarm) -> list[int]:
    """The node at which each microbatch begins, in turn as long as they have some."""
    turns = max(swarm.entries)
    return [node for turn in range(turns) for node, count in enumerate(swarm.entries) if turn < count]


def _paths(swarm: Swarm, weight: float) -> tuple[Path, ...]:
    """One path after another, nodes priced by ``weight`` times the work that they have by then."""
    paths: list[Path] = []
    for entry in _entries(swarm):
        path = _path(swarm, paths, entry, weight)
        assert path is not None  # _orders_left keeps room for all that are still to come
        paths.append(path)
    return tuple(paths)


def _path(
    swarm: Swarm, others: Sequence[Path], entry: int, weight: float, noise: Sequence[float] | None = None
) -> Path | None:
    visits = [0] * len(swarm.nodes)
    for other in others:
        for node in other:
            visits[node] += 1
    price = [weight * count * stage.work_ns for count, stage in zip(visits, swarm.nodes, strict=True)]
    if noise is not None:
        price = [(one + stage.work_ns) * factor for one, stage, factor in zip(price, swarm.nodes, noise, strict=True)]
    found = cheapest_path(swarm, entry, list(_orders_left(swarm, visits, len(others))), price)
    return found[1] if found else None


def _orders_left(swarm: Swarm, visits: Sequence[int], done: int) -> Iterator[tuple[int, ...]]:
    """Orders of stages that leave room for the microbatches to come: each passes a stage once at most."""
    room = [swarm.visits - sum(visits[node] for node in nodes) for nodes in swarm.nodes_of]
    to_come = swarm.microbatches - done - 1
    for order in stage_orders(swarm):
        left = [room[stage] - (stage in order) for stage in range(1, swarm.stages)]
        if min(left, default=0) >= 0 and sum(min(one, to_come) for one in left) >= to_come * (swarm.passes - 1):
            yield order


@dataclass
class _Search:
    """The best paths so far, and a schedule of them if one was found within the limit."""

    swarm: Swarm
    objective: Objective
    paths: tuple[Path, ...] = ()
    best: TimedSchedule | None = None
    values: dict[tuple[Path, ...], float] = field(default_factory=dict)

    def offer(self, paths: tuple[Path, ...]) -> float:
        key = tuple(sorted(paths))
        if key not in self.values:
            try:
                line = quick(problem_of(self.swarm, paths), self.objective, rules=3)
            except Infeasible:
                line = None
            self.values[key] = value_of(line, self.objective) if line else float("inf")
            if line and (self.best is None or self.values[key] <= value_of(self.best, self.objective)):
                self.paths, self.best = paths, line
        self.paths = self.paths or paths
        return self.values[key]


def _better(search: _Search, bound: Bound, budget: Budget) -> None:
    """Give a few microbatches other paths at a time, by prices that differ a little, as long as there is time."""
    swarm = search.swarm
    random = Random(budget.seed)
    for _ in range(_TRIED if budget.deterministic else 1 << 60):
        if budget.halted() or (search.best and value_of(search.best, search.objective) <= bound.value):
            return
        moved = set(random.sample(range(swarm.microbatches), min(random.randint(1, _MOVED), swarm.microbatches)))
        paths = [path for index, path in enumerate(search.paths) if index not in moved]
        weight = random.choice(_WEIGHTS)
        for index in sorted(moved):
            noise = [random.uniform(0.7, 1.3) for _ in swarm.nodes]
            path = _path(swarm, paths, search.paths[index][0], weight, noise)
            assert path is not None  # the one that was taken out would do
            paths.append(path)
        search.offer(tuple(paths))


def routes_bound(swarm: Swarm, objective: Objective = "makespan") -> Bound:
    """What no schedule undercuts, whichever paths microbatches take; for the span, what nodes must work.

    At a node where microbatches begin, the last to go forward comes back no sooner than the cheapest path lets it. Of
    the other nodes each can take so many microbatches until a time, given the cheapest way to it and back; the least
    time by which all of a stage's nodes together, and all stages, take as many as must pass is a bound.
    """
    span = objective == "span"
    least = 0
    orders = list(stage_orders(swarm))
    free = [0.0] * len(swarm.nodes)
    for entry, count in enumerate(swarm.entries):
        if not count:
            continue
        own = swarm.nodes[entry]
        found = cheapest_path(swarm, entry, orders, free)
        assert found is not None
        trip = int(found[0]) if swarm.passes > 1 else 0
        backward = own.work_ns - own.forward_ns
        least = max(least, count * own.work_ns, count * own.forward_ns + trip + backward)
    return Bound(max(least, _crowded(swarm, span=span)), "analytic")


def _crowded(swarm: Swarm, *, span: bool) -> int:
    """The least time by which nodes other than the first stage's can do all that must pass through them."""
    must = swarm.microbatches * (swarm.passes - 1)
    heads, tails = ([0] * len(swarm.nodes),) * 2 if span else _ways(swarm)
    low, high = 0, max(heads) + max(tails) + must * max(stage.work_ns for stage in swarm.nodes)
    while low < high:
        middle = (low + high) // 2
        done = 0
        for nodes in swarm.nodes_of[1:]:
            taken = sum(_fit(swarm, node, heads[node], tails[node], middle) for node in nodes)
            done += min(taken, swarm.visits, swarm.microbatches)
        low, high = (low, middle) if done >= must else (middle + 1, high)
    return low


def _fit(swarm: Swarm, node: int, head: int, tail: int, until: int) -> int:
    """How many microbatches node ``node`` can do: with their W, and without it where they must travel back."""
    own = swarm.nodes[node]
    passing = own.forward_ns + least_input_gradient_ns(own)
    left = [(until - head) // own.work_ns] if own.work_ns else []
    left += [(until - head - tail) // passing] if passing else []
    reachable = until >= head + tail + passing
    return max(0, min([*left, swarm.microbatches])) if reachable else 0


def _ways(swarm: Swarm) -> tuple[list[int], list[int]]:
    """By node, the least before a microbatch's F there, and the least behind its I."""
    far = sum(stage.work_ns for stage in swarm.nodes) + 2 * sum(map(sum, swarm.send_ns))
    heads, tails = [far] * len(swarm.nodes), [far] * len(swarm.nodes)
    begin = {node: swarm.nodes[node] for node, count in enumerate(swarm.entries) if count}
    for order in stage_orders(swarm):
        there = {node: stage.forward_ns for node, stage in begin.items()}
        back = {node: stage.work_ns - stage.forward_ns for node, stage in begin.items()}
        for stage in order[1:]:
            nodes = swarm.nodes_of[stage]
            arrive = {n: min(way + swarm.send_ns[last][n] for last, way in there.items()) for n in nodes}
            leave = {n: min(way + swarm.send_ns[n][last] for last, way in back.items()) for n in nodes}
            for node in nodes:
                heads[node] = min(heads[node], arrive[node])
                tails[node] = min(tails[node], leave[node])
            there = {n: arrive[n] + swarm.nodes[n].forward_ns for n in nodes}
            back = {n: leave[n] + least_input_gradient_ns(swarm.nodes[n]) for n in nodes}
    return heads, tails
