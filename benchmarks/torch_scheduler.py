"""PyTorch's own overlap scheduler on a captured graph, with the costs of an overlap problem of ours.

``torch._inductor.fx_passes.overlap_scheduling.OverlapScheduler`` moves starts and waits of collectives within a graph.
It asks for the time of each node; here each region's and collective's time of the problem is what its last node takes,
and the others take none. It wants a GPU only to ask for such times, so none is needed. All its other knobs have the
values that Inductor gives them; it makes no buckets of collectives, so that the graph stays the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch

from opweave.compiler.frontend.dynamo.operators import OperatorGraph
from opweave.compiler.frontend.dynamo.traced import copied
from opweave.errors import OpweaveError
from opweave.passes.overlap.problem import Problem, Schedule
from opweave.passes.overlap.simulate import given_modes, timed

__all__ = ["TorchSchedule", "as_written", "exposed_s", "torch_schedule"]


@dataclass(frozen=True)
class TorchSchedule:
    """PyTorch's order, timed by our simulator, and what PyTorch itself takes its exposed communication to be."""

    schedule: Schedule
    claimed_exposed_s: float


def torch_schedule(
    module: torch.fx.GraphModule,
    found: OperatorGraph,
    problem: Problem,
    *,
    memory_increase_gb: float = 1.0,
    memory_increase_ratio: float = 0.05,
) -> TorchSchedule:
    """What PyTorch makes of ``module``, whose operators ``found`` and whose tasks ``problem`` are.

    A wait holds back what PyTorch issues behind it, whether or not that reads the result. The limits on memory are what
    PyTorch may add to the peak as it counts it: the larger of the two.

    Raises:
        OpweaveError: this torch has no such scheduler.
    """
    try:
        from torch._inductor.fx_passes import overlap_scheduling
    except ImportError as error:
        raise OpweaveError(f"torch {torch.__version__} has no overlap scheduler", hint="it came with 2.10") from error
    seconds = {
        task.ops[-1]: task.modes[mode].seconds for task, mode in zip(problem.tasks, given_modes(problem), strict=True)
    }

    def estimate_ms(node: torch.fx.Node, override_size: int | None = None) -> float:
        return 0.0 if override_size == 0 else 1e3 * seconds.get(node.name, 0.0)

    own = copied(module)
    with mock.patch.object(overlap_scheduling, "estimate_roofline_runtime_ms", estimate_ms):
        scheduler = overlap_scheduling.OverlapScheduler(
            own,
            max_in_flight_gb=5,
            max_compute_pre_fetch=200,
            collective_bucketing=False,
            insert_overlap_deps=False,
            compute_overlap_multipler=1.0,
            max_coll_distance=200,
            custom_runtime_estimation=estimate_ms,
            collective_estimator="analytical",
            compute_estimator="analytical",
            max_memory_increase_gb=memory_increase_gb,
            max_memory_increase_ratio=memory_increase_ratio,
        )
        scheduler.run()
    claimed_s = sum(info.exposed_time_ms for info in scheduler.collective_info.values()) * 1e-3
    return TorchSchedule(as_written(own, found, problem), claimed_s)


def as_written(module: torch.fx.GraphModule, found: OperatorGraph, problem: Problem) -> Schedule:
    """The schedule of a program that runs ``module`` node by node: its own modes, its own order, its own waits.

    ``module`` has the nodes of the one that ``found`` and ``problem`` are made of, in any possible order. A fused
    kernel stands where the last of its operators does, or before what reads of it.
    """
    names = [node.name for node in module.graph.nodes]
    order = _order(problem, names)
    return timed(problem, order, given_modes(problem), waits=_waits(problem, found, names, order))


def _places(problem: Problem, names: Sequence[str]) -> list[int]:
    """Where in ``names`` the last operator of each task stands: a fused kernel runs when all it reads is there."""
    place = {name: index for index, name in enumerate(names)}
    return [max((place[op] for op in task.ops if op in place), default=-1) for task in problem.tasks]


def _order(problem: Problem, names: Sequence[str]) -> tuple[int, ...]:
    """Tasks in the order of ``names``; one that is read before all of its operators stand there comes earlier."""
    place = _places(problem, names)
    after: list[list[int]] = [[] for _ in problem.tasks]
    missing = [len(task.before) for task in problem.tasks]
    for index, task in enumerate(problem.tasks):
        for other in task.before:
            after[other].append(index)
    for index in range(len(place) - 1, -1, -1):
        place[index] = min([place[index], *(place[other] for other in after[index])])
    ready = [(place[index], index) for index, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, index = heapq.heappop(ready)
        order.append(index)
        for other in after[index]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (place[other], other))
    return tuple(order)


def _waits(problem: Problem, found: OperatorGraph, names: Sequence[str], order: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of a collective and the first task that computes behind the place of its wait."""
    place = {name: index for index, name in enumerate(names)}
    places = _places(problem, names)
    pairs = []
    for index, task in enumerate(problem.tasks):
        waits = [place[node.name] for node in found.waits.get(task.ops[-1], ()) if node.name in place]
        if task.collective is None or not waits:
            continue
        behind = [other for other in order if problem.tasks[other].collective is None and places[other] > min(waits)]
        issued_before = set(order[: order.index(index)])
        behind = [other for other in behind if other not in issued_before]
        if behind:
            pairs.append((index, behind[0]))
    return pairs


def exposed_s(schedule: Schedule) -> float:
    """Seconds in which only collectives run."""
    spans = [
        (schedule.start_s[index], schedule.finish_s[index], task.collective is not None)
        for index, task in enumerate(schedule.problem.tasks)
        if schedule.finish_s[index] > schedule.start_s[index]
    ]
    changes = sorted(change for start, finish, flies in spans for change in ((start, 1, flies), (finish, -1, flies)))
    running: Mapping[bool, list[int]] = {True: [0], False: [0]}
    total, since = 0.0, 0.0
    for moment, change, flies in changes:
        if running[True][0] and not running[False][0]:
            total += moment - since
        since = moment
        running[flies][0] += change
    return total
