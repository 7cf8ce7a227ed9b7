"""Where to cut a model into stages, decided with the schedule: a large embedding or head is no matter of order alone.

Balance comes first: cuts for which the worst bound of a stage is least (``partition_bounds``, ``partition_chunks``).
Then cuts are taken in the order of their bounds and around the best so far, bounded more sharply, scheduled by a few
rules, and the best of them solved. What is known of all cuts that were not scheduled makes the bound of the choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...compiler.pipeline import Budget
from ...compiler.pipelining.placement import placed
from ...compiler.pipelining.problem import PipelineProblem, Vocabulary
from ...errors import OptionError
from .partition_layers import Cuts, LayerCost, Line
from .solution import Bound, Objective, PipelineSolution

__all__ = ["Cuts", "LayerCost", "Partition", "partition"]


@dataclass(frozen=True)
class Partition:
    """``cuts``: the first layer of every stage but the first; the ``problem`` that they leave, and its ``solution``.

    ``bound`` holds for any cuts, that of ``solution`` for these alone. ``tried`` are the cuts that were scheduled,
    with the best objective found, ``None`` if the memory limit was not kept.
    """

    cuts: Cuts
    problem: PipelineProblem
    solution: PipelineSolution
    bound: Bound
    tried: tuple[tuple[Cuts, int | None], ...] = ()
    seconds: float = 0.0

    @property
    def value(self) -> int:
        """The objective, as the simulator counts it."""
        return self.solution.value

    @property
    def gap(self) -> float:
        """``(value - bound) / value`` over all cuts and schedules; 0 is optimal."""
        return max(0.0, (self.value - self.bound.value) / self.value) if self.value else 0.0


def partition(
    layers: Sequence[LayerCost],
    ranks: int,
    microbatches: int,
    budget: Budget,
    *,
    chunks: int = 1,
    placement: str | Sequence[int] = "loop",
    memory_limit: int | Sequence[int] | None = None,
    objective: Objective = "makespan",
    slowness: Sequence[float] = (),
    vocabulary: Vocabulary | None = None,
    input_gradient: bool = True,
    name: str = "pipeline",
) -> Partition:
    """Cut ``layers`` into ``ranks * chunks`` stages, and schedule them.

    Args:
        layers: in the model's order; embedding and head are layers like others.
        ranks: their number.
        microbatches: of one step.
        budget: the search ends with it, with the best so far.
        chunks: stages on each rank.
        placement: a name that ``placed`` knows, or the rank of every stage.
        memory_limit: bytes of every rank, or of each; weights and optimizer state count, and so depend on the cuts.
        objective: makespan, or span.
        slowness: by rank, what multiplies the layers' times; none for ranks that are alike.
        vocabulary: the output layer in shards over all ranks, which then is none of the layers.
        input_gradient: whether the model's inputs have a gradient; if not, all of the first stage's backward is W, as
            torch and compiled stages run it. Published schedules take its I to be like any other's.
        name: of the problem.

    Raises:
        Infeasible: no cuts keep the memory limit.
        OptionError: fewer layers than stages, no cut leaves what layers share on one rank, or arguments that
            contradict one another.
    """
    from .partition_search import searched  # numba, which takes a second to load

    begin = time.monotonic()
    where = placed(placement, ranks, chunks) if isinstance(placement, str) else tuple(placement)
    if where and max(where) + 1 != ranks:
        raise OptionError(f"the placement {where} is for {max(where) + 1} ranks, not {ranks}")
    limit = (memory_limit,) * ranks if isinstance(memory_limit, int) else memory_limit
    line = Line(
        tuple(layers),
        where,
        microbatches,
        None if limit is None else tuple(limit),
        tuple(slowness),
        vocabulary,
        input_gradient,
        name,
    )
    cuts, solution, bound, tried = searched(line, objective, budget)
    return Partition(cuts, line.problem(cuts), solution, bound, tried, time.monotonic() - begin)
