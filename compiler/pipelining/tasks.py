"""What follows what: the tasks of one microbatch, and what each takes in time and memory.

Microbatches of one route are alike, so the whole step is each route's tasks, repeated. Everything that judges or makes
schedules reads the rules of precedence here.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problem import PipelineProblem
from .schedule import ActionKind

__all__ = ["Task", "tasks_of"]


@dataclass(frozen=True)
class Task:
    """One action of every microbatch of ``route``, on ``rank``.

    ``after`` are indices of tasks of the same microbatch, each with the time that passes between its end and the start
    of this one. Bytes are allocated at its start and freed at its end, on its rank.
    """

    route: int
    stage: int
    kind: ActionKind
    rank: int
    duration_ns: int
    after: tuple[tuple[int, int], ...]
    allocates_bytes: int = 0
    frees_bytes: int = 0


def tasks_of(problem: PipelineProblem, route: int) -> tuple[Task, ...]:
    """Tasks of a microbatch of ``route``, each behind all that it comes after; backward passes in two halves."""
    writer = _Writer(problem, route)
    for position in range(len(writer.stages)):
        writer.forward(position)
    if problem.vocabulary is not None:
        writer.shards()
    for position in reversed(range(len(writer.stages))):
        writer.input_gradient(position)
    for position in reversed(range(len(writer.stages))):
        writer.weight_gradient(position)
    return tuple(writer.tasks)


class _Writer:
    def __init__(self, problem: PipelineProblem, route: int) -> None:
        self.problem, self.route = problem, route
        self.stages = problem.routes[route].stages
        self.tasks: list[Task] = []
        self.index: dict[tuple[ActionKind, int], int] = {}
        self.before_last: list[tuple[int, int]] = []  # what I of the last stage follows beside its F

    def add(
        self,
        kind: ActionKind,
        stage: int,
        rank: int,
        duration: int,
        after: list[tuple[int, int]],
        *,
        allocates: int = 0,
        frees: int = 0,
    ) -> int:
        self.index[kind, stage] = len(self.tasks)
        self.tasks.append(Task(self.route, stage, kind, rank, duration, tuple(after), allocates, frees))
        return self.index[kind, stage]

    def send_ns(self, hop: int, by_hop: tuple[int, ...], otherwise: int) -> int:
        """What passes between the ``hop``-th stage and the next, as the route says, or else the sending stage."""
        here, there = (self.problem.stages[self.stages[position]].rank for position in (hop, hop + 1))
        if here == there:
            return 0
        return by_hop[hop] if by_hop else otherwise

    def forward(self, position: int) -> None:
        number = self.stages[position]
        stage = self.problem.stages[number]
        after = []
        if position:
            sender = self.stages[position - 1]
            said = self.problem.stages[sender].forward_send_ns
            lag = self.send_ns(position - 1, self.problem.routes[self.route].forward_send_ns, said)
            after = [(self.index[ActionKind.FORWARD, sender], lag)]
        held = stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes
        own = self.add(ActionKind.FORWARD, number, stage.rank, stage.forward_ns, after, allocates=held)
        if stage.offloaded_bytes:
            moved = stage.offloaded_bytes
            gone = self.add(ActionKind.OFFLOAD, number, stage.rank, stage.offload_ns, [(own, 0)], frees=moved)
            self.add(ActionKind.RELOAD, number, stage.rank, stage.reload_ns, [(gone, 0)], allocates=moved)

    def shards(self) -> None:
        vocabulary = self.problem.vocabulary
        assert vocabulary is not None
        last = self.index[ActionKind.FORWARD, self.stages[-1]]
        ranks = range(self.problem.ranks)
        for rank in ranks:
            self.add(
                ActionKind.OUTPUT,
                rank,
                rank,
                vocabulary.output_ns[rank],
                [(last, vocabulary.broadcast_ns)],
                allocates=vocabulary.shard_bytes,
            )
        outputs = [(self.index[ActionKind.OUTPUT, rank], vocabulary.reduce_ns) for rank in ranks]
        for rank in ranks:
            self.add(
                ActionKind.OUTPUT_GRADIENT,
                rank,
                rank,
                vocabulary.gradient_ns[rank],
                outputs,
                frees=vocabulary.shard_bytes,
            )
        gradients = [(self.index[ActionKind.OUTPUT_GRADIENT, rank], vocabulary.reduce_ns) for rank in ranks]
        self.before_last = outputs if vocabulary.barriers == 1 else gradients

    def input_gradient(self, position: int) -> None:
        number = self.stages[position]
        stage = self.problem.stages[number]
        after = [(self.index[ActionKind.FORWARD, number], 0)]
        if position == len(self.stages) - 1:
            after += self.before_last
        else:
            sender = self.stages[position + 1]
            said = self.problem.stages[sender].backward_send_ns
            lag = self.send_ns(position, self.problem.routes[self.route].backward_send_ns, said)
            after.append((self.index[ActionKind.INPUT_GRADIENT, sender], lag))
        if stage.offloaded_bytes:
            after.append((self.index[ActionKind.RELOAD, number], 0))
        self.add(
            ActionKind.INPUT_GRADIENT,
            number,
            stage.rank,
            stage.input_gradient_ns,
            after,
            allocates=stage.between_gradients_bytes,
            frees=stage.until_input_gradient_bytes,
        )

    def weight_gradient(self, position: int) -> None:
        number = self.stages[position]
        stage = self.problem.stages[number]
        self.add(
            ActionKind.WEIGHT_GRADIENT,
            number,
            stage.rank,
            stage.weight_gradient_ns,
            [(self.index[ActionKind.INPUT_GRADIENT, number], 0)],
            frees=stage.between_gradients_bytes + stage.until_weight_gradient_bytes,
        )
