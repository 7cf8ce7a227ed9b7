"""How a problem's stages lie on its ranks, as the schedules that have names ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ....compiler.pipelining.placement import placed
from ....compiler.pipelining.problem import PipelineProblem
from ....compiler.pipelining.schedule import Action, ActionKind
from ....compiler.pipelining.tasks import tasks_of
from ....errors import OptionError

__all__ = ["Layout", "Order", "Orders", "lay_out", "opposed"]

Orders = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Layout:
    """One route over all stages, ``chunks`` on each rank; ``stages[rank]`` are a rank's, in the order of the route."""

    problem: PipelineProblem
    stages: tuple[tuple[int, ...], ...]
    microbatches: int
    first: int = 0  # the number of the route's first microbatch

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """How many stages of the route are before each of ``stages``."""
        place = {stage: index for route in self.problem.routes for index, stage in enumerate(route.stages)}
        return tuple(tuple(place[stage] for stage in stages) for stages in self.stages)

    @cached_property
    def lags(self) -> Mapping[tuple[ActionKind, int], int]:
        """By kind, F or I, and stage: what passes before it and behind the same action of the neighbouring stage."""
        tasks = tasks_of(self.problem, self.problem.route_of[self.first])
        return {
            (task.kind, task.stage): lag
            for task in tasks
            for index, lag in task.after
            if tasks[index].kind is task.kind
        }

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.problem.ranks

    @property
    def chunks(self) -> int:
        """Stages on each rank."""
        return len(self.stages[0])


class Order:
    """What ``rank`` does, written from its start; each kind of action of a stage takes the layout's next microbatch.

    So all microbatches of a stage come in their order, which loses nothing: they are alike.
    """

    def __init__(self, rank: int, *layouts: Layout) -> None:
        self._default = layouts[0].first  # of a vocabulary's shard, which is no stage
        self._first = {stage: layout.first for layout in layouts for stage in layout.stages[rank]}
        self._actions: list[Action] = []
        self._done: dict[tuple[int, ActionKind], int] = {}

    def add(self, kind: ActionKind, stage: int) -> None:
        """Do ``kind`` of ``stage`` for the next microbatch; B counts as I and W."""
        number = self.done(kind, stage)
        self._actions.append(Action(stage, kind, self._first.get(stage, self._default) + number))
        self._done[stage, kind] = number + 1
        if kind is ActionKind.BACKWARD:
            self._done[stage, ActionKind.INPUT_GRADIENT] = number + 1
            self._done[stage, ActionKind.WEIGHT_GRADIENT] = number + 1
        elif kind is ActionKind.INPUT_GRADIENT:
            self._done[stage, ActionKind.BACKWARD] = number + 1

    def add_all(self, times: int, *steps: tuple[ActionKind, int]) -> None:
        """Do all ``steps``, each a kind and a stage, one after the other, ``times`` over."""
        for _ in range(times):
            for kind, stage in steps:
                self.add(kind, stage)

    def done(self, kind: ActionKind, stage: int) -> int:
        """For how many microbatches ``kind`` of ``stage`` is in the order."""
        return self._done.get((stage, kind), 0)

    def actions(self) -> tuple[Action, ...]:
        """All of them."""
        return tuple(self._actions)


def lay_out(problem: PipelineProblem, placement: str, chunks: int | None = None) -> Layout:
    """The layout of a problem with one route and such a placement, ``chunks`` stages on each rank or any number.

    Raises:
        OptionError: the problem has another layout; says which.
    """
    if len(problem.routes) != 1:
        raise OptionError(f"it has {len(problem.routes)} routes; this schedule has one")
    route = problem.routes[0]
    ranks = tuple(problem.stages[stage].rank for stage in route.stages)
    number, over = divmod(len(ranks), problem.ranks)
    if over or chunks not in (None, number):
        wanted = "as many on each rank" if chunks is None else f"{chunks} on each rank"
        raise OptionError(f"it has {len(ranks)} stages on {problem.ranks} ranks; this schedule needs {wanted}")
    if ranks != placed(placement, problem.ranks, number):
        raise OptionError(
            f"its stages are on ranks {_shortened(ranks)}; this schedule needs "
            f"{_shortened(placed(placement, problem.ranks, number))} (placement {placement!r})"
        )
    stages = tuple(
        tuple(stage for stage in route.stages if problem.stages[stage].rank == rank) for rank in range(problem.ranks)
    )
    return Layout(problem, stages, route.microbatches)


def opposed(problem: PipelineProblem, placement: str, chunks: int) -> tuple[Layout, Layout]:
    """The two layouts of a bidirectional problem: as ``placement``, and the same with the ranks counted backwards.

    Raises:
        OptionError: the problem has other routes, or these in another layout; says which.
    """
    if len(problem.routes) != 2 or problem.routes[0].microbatches != problem.routes[1].microbatches:
        raise OptionError(
            f"it has routes of {[route.microbatches for route in problem.routes]} microbatches; "
            "this schedule needs two, of as many each"
        )
    down = placed(placement, problem.ranks, chunks)
    layouts = []
    for index, route in enumerate(problem.routes):
        wanted = tuple(problem.ranks - 1 - rank for rank in down) if index else down
        ranks = tuple(problem.stages[stage].rank for stage in route.stages)
        if ranks != wanted:
            raise OptionError(
                f"route {index} goes through ranks {_shortened(ranks)}; this schedule needs {_shortened(wanted)}"
            )
        stages = tuple(tuple(s for s in route.stages if problem.stages[s].rank == r) for r in range(problem.ranks))
        layouts.append(Layout(problem, stages, route.microbatches, index * route.microbatches))
    if set(problem.routes[0].stages) & set(problem.routes[1].stages):
        raise OptionError("its two routes share stages; this schedule has a copy of the model for each")
    return layouts[0], layouts[1]


def _shortened(ranks: tuple[int, ...]) -> str:
    text = " ".join(map(str, ranks[:12]))
    return text if len(ranks) <= 12 else f"{text} ... ({len(ranks)} stages)"
