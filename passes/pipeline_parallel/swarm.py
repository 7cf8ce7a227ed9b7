"""Nodes that each have a copy of one stage of a model, with links that are not all alike, and paths through them.

The setting of SkipPipe (Blagoev, Chen and Ersoy, arXiv 2502.19913): every stage is on several nodes; a microbatch
begins at a node of the first stage and passes through some of the others, on one node each, and back the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

import msgspec

from ...compiler.pipelining.problem import PipelineProblem, Route, Stage
from ...errors import OptionError

__all__ = ["Path", "Swarm", "cheapest_path", "problem_of", "stage_orders"]

#: The nodes that a microbatch passes through, one after another.
Path = tuple[int, ...]


@dataclass(frozen=True)
class Swarm:
    """Nodes and their links, and what paths may be.

    ``nodes[n]`` is what a microbatch costs on node n, which is rank n; ``holds[n]`` the model's stage there, 0 the
    first. ``send_ns[a][b]`` passes between an end on node a and a start on node b, of activations and gradients alike.
    ``entries[n]`` microbatches begin at node n, 0 where it has another stage than the first. Each passes through
    ``passes`` stages, the first included, in the model's order; with ``swaps`` 1 two that follow each other may be
    exchanged, the first never. No stage but the first is passed by more than ``most_visits`` microbatches, so that all
    of them learn (as few as can be, when ``None``). ``memory_limit`` is by node, in bytes.

    Raises:
        OptionError: sizes that do not go together, a stage without a node, or paths that there cannot be.
    """

    nodes: tuple[Stage, ...]
    holds: tuple[int, ...]
    send_ns: tuple[tuple[int, ...], ...]
    entries: tuple[int, ...]
    passes: int
    swaps: int = 0
    most_visits: int | None = None
    memory_limit: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.nodes)
        if not len(self.holds) == len(self.entries) == len(self.send_ns) == count or any(
            len(row) != count for row in self.send_ns
        ):
            raise OptionError(f"{count} nodes need as many stages held, entries, and rows and columns of times between")
        if set(self.holds) != set(range(self.stages)):
            raise OptionError(f"nodes hold stages {sorted(set(self.holds))}; they are 0 to the last, none left out")
        if not 1 <= self.passes <= self.stages or self.swaps not in (0, 1):
            raise OptionError(f"paths through {self.passes} of {self.stages} stages with {self.swaps} swaps (0 or 1)")
        if any(number < 0 or (number and holds) for number, holds in zip(self.entries, self.holds, strict=True)):
            raise OptionError(f"entries {list(self.entries)}; microbatches begin at nodes that hold stage 0")
        if not self.microbatches:
            raise OptionError("no microbatch enters the swarm; the least is 1")
        if self.visits * (self.stages - 1) < self.microbatches * (self.passes - 1):
            raise OptionError(
                f"{self.stages - 1} stages that take {self.visits} microbatches each do not do for "
                f"{self.microbatches} microbatches that pass through {self.passes - 1} of them"
            )

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return max(self.holds, default=-1) + 1

    @property
    def microbatches(self) -> int:
        """Microbatches of the step."""
        return sum(self.entries)

    @property
    def visits(self) -> int:
        """Microbatches that may pass through a stage, other than the first."""
        if self.most_visits is not None:
            return self.most_visits
        return -(-self.microbatches * (self.passes - 1) // max(1, self.stages - 1))

    @cached_property
    def nodes_of(self) -> tuple[tuple[int, ...], ...]:
        """Nodes that have each stage."""
        return tuple(
            tuple(node for node, held in enumerate(self.holds) if held == stage) for stage in range(self.stages)
        )


def problem_of(swarm: Swarm, paths: Sequence[Path], name: str = "swarm") -> PipelineProblem:
    """The pipeline problem of microbatches that take ``paths``, those of equal paths in one route.

    Raises:
        OptionError: a path is none: another number of stages, or twice through one node.
    """
    if any(len(path) != swarm.passes for path in paths):
        raise OptionError(f"a path of another length than {swarm.passes}: {[list(path) for path in paths]}")
    stages = tuple(msgspec.structs.replace(stage, rank=node) for node, stage in enumerate(swarm.nodes))
    routes = []
    for path, count in Counter(paths).items():
        there = tuple(swarm.send_ns[a][b] for a, b in pairwise(path))
        back = tuple(swarm.send_ns[b][a] for a, b in pairwise(path))
        routes.append(Route(path, count, there, back))
    return PipelineProblem(len(stages), stages, tuple(routes), swarm.memory_limit, name=name)


def stage_orders(swarm: Swarm) -> Iterator[tuple[int, ...]]:
    """The model's stages that a path may pass through, in the order in which it may."""
    for others in combinations(range(1, swarm.stages), swarm.passes - 1):
        yield (0, *others)
        for place in range(1, len(others)) if swarm.swaps else ():
            swapped = list(others)
            swapped[place - 1 : place + 1] = reversed(swapped[place - 1 : place + 1])
            yield (0, *swapped)


def cheapest_path(
    swarm: Swarm, entry: int, orders: Sequence[tuple[int, ...]], price: Sequence[float]
) -> tuple[float, Path] | None:
    """The path from node ``entry`` with the least sum of times there and back, and of ``price`` of its nodes.

    ``None`` if there are no orders. Of equally cheap ones the first in the order of ``orders`` and nodes.
    """
    best: tuple[float, Path] | None = None
    for order in orders:
        # By node of the last stage so far, the cheapest way there.
        ways: dict[int, tuple[float, Path]] = {entry: (0.0, (entry,))}
        for stage in order[1:]:
            ways = {node: _cheapest_to(swarm, ways, node, price[node]) for node in swarm.nodes_of[stage]}
        found = min(ways.values(), key=lambda way: way[0])
        if best is None or found[0] < best[0]:
            best = found
    return best


def _cheapest_to(swarm: Swarm, ways: dict[int, tuple[float, Path]], node: int, price: float) -> tuple[float, Path]:
    own = swarm.nodes[node]
    cost, path = min(
        ((cost + swarm.send_ns[last][node] + swarm.send_ns[node][last], path) for last, (cost, path) in ways.items()),
        key=lambda way: way[0],
    )
    return cost + own.forward_ns + least_input_gradient_ns(own) + price, (*path, node)


def least_input_gradient_ns(stage: Stage) -> int:
    """The least between the start of a stage's backward and its input's gradient, in halves or whole."""
    return min(stage.input_gradient_ns, stage.whole_backward_ns)
