"""What passes between ranks: messages of neighbouring stages, and what all ranks of a vocabulary do together.

A schedule orders what each rank computes; here each rank's list also gets what it sends and receives, in an order in
which ranks cannot wait for each other for ever: messages enter the lists of both ranks in one order over all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import msgspec

from .problem import PipelineProblem
from .schedule import Action, ActionKind, TimedSchedule

__all__ = ["Message", "Step", "Transfer", "TransferKind", "messages_of", "with_transfers"]


class TransferKind(StrEnum):
    """What a rank hands over; the first four are torch.distributed.pipelining's, and named as there.

    A stage sends its output (F) or the gradient of its input (B), and receives its input (F) or the gradient of its
    output (B). All ranks of a vocabulary broadcast the last stage's output, and reduce behind their shards' S and T.
    """

    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    BROADCAST = "BROADCAST"
    REDUCE_OUTPUT = "REDUCE_S"
    REDUCE_GRADIENT = "REDUCE_T"


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True, order=True):
    """``kind`` for ``stage`` and ``microbatch``; of a vocabulary, for the route's last stage."""

    stage: int
    kind: TransferKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


Step = Action | Transfer


@dataclass(frozen=True)
class Message:
    """``nbytes`` that one action makes for actions of another rank, or all ranks' for all: ``transfers`` by rank.

    ``after`` are the actions that make it, by rank, and ``before`` those that need it; ``lag_ns`` passes between.
    """

    after: tuple[Action, ...]
    before: tuple[tuple[int, Action], ...]
    transfers: tuple[tuple[int, Transfer], ...]
    nbytes: int
    lag_ns: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that take part, the sender first."""
        return tuple(rank for rank, _ in self.transfers)


def messages_of(problem: PipelineProblem, microbatch: int, whole: frozenset[Action]) -> Iterator[Message]:
    """All messages of ``microbatch``; ``whole`` are the backwards that are not split, as actions of kind B."""
    route = problem.routes[problem.route_of[microbatch]]
    stages = route.stages

    def backward(stage: int) -> Action:
        action = Action(stage, ActionKind.BACKWARD, microbatch)
        return action if action in whole else Action(stage, ActionKind.INPUT_GRADIENT, microbatch)

    for hop, (early, late) in enumerate(pairwise(stages)):
        before, behind = problem.stages[early], problem.stages[late]
        if before.rank == behind.rank:
            continue
        yield Message(
            (Action(early, ActionKind.FORWARD, microbatch),),
            ((behind.rank, Action(late, ActionKind.FORWARD, microbatch)),),
            (
                (before.rank, Transfer(early, TransferKind.SEND_F, microbatch)),
                (behind.rank, Transfer(late, TransferKind.RECV_F, microbatch)),
            ),
            before.forward_bytes,
            route.forward_send_ns[hop] if route.forward_send_ns else before.forward_send_ns,
        )
        yield Message(
            (backward(late),),
            ((before.rank, backward(early)),),
            (
                (behind.rank, Transfer(late, TransferKind.SEND_B, microbatch)),
                (before.rank, Transfer(early, TransferKind.RECV_B, microbatch)),
            ),
            behind.backward_bytes,
            route.backward_send_ns[hop] if route.backward_send_ns else behind.backward_send_ns,
        )
    yield from _of_vocabulary(problem, stages[-1], microbatch, backward(stages[-1]))


def _of_vocabulary(problem: PipelineProblem, last: int, microbatch: int, backward: Action) -> Iterator[Message]:
    vocabulary = problem.vocabulary
    if vocabulary is None:
        return
    home = problem.stages[last].rank
    ranks = (home, *(rank for rank in range(problem.ranks) if rank != home))

    def of(kind: ActionKind) -> tuple[Action, ...]:
        return tuple(Action(rank, kind, microbatch) for rank in ranks)

    def together(kind: TransferKind) -> tuple[tuple[int, Transfer], ...]:
        return tuple((rank, Transfer(last, kind, microbatch)) for rank in ranks)

    outputs, gradients = of(ActionKind.OUTPUT), of(ActionKind.OUTPUT_GRADIENT)
    stage = problem.stages[last]
    yield Message(
        (Action(last, ActionKind.FORWARD, microbatch),),
        tuple(zip(ranks, outputs, strict=True)),
        together(TransferKind.BROADCAST),
        stage.forward_bytes,
        vocabulary.broadcast_ns,
    )
    wanted = tuple(zip(ranks, gradients, strict=True))
    if vocabulary.barriers == 1:
        wanted += ((home, backward),)
    yield Message(outputs, wanted, together(TransferKind.REDUCE_OUTPUT), stage.backward_bytes, vocabulary.reduce_ns)
    if vocabulary.barriers == 2:
        reduce = together(TransferKind.REDUCE_GRADIENT)
        yield Message(gradients, ((home, backward),), reduce, stage.backward_bytes, vocabulary.reduce_ns)


def with_transfers(timed: TimedSchedule) -> dict[int, tuple[Step, ...]]:
    """Each rank's actions with what it sends and receives between them, each as soon as the sender has it.

    Actions enter in the order of their starts over all ranks, each behind what it needs; what one of them completes is
    then handed over on all of its ranks. Any prefix of that order can be executed, so no rank waits for ever.
    """
    weaver = _Weaver(timed)
    weaver.weave()
    return {rank: tuple(steps) for rank, steps in weaver.lists.items()}


class _Weaver:
    def __init__(self, timed: TimedSchedule) -> None:
        problem = timed.schedule.problem
        self.orders, self.starts = timed.schedule.orders, timed.starts
        whole = frozenset(a for order in self.orders for a in order if a.kind is ActionKind.BACKWARD)
        self.messages = [m for number in range(problem.microbatches) for m in messages_of(problem, number, whole)]
        self.missing = [len(message.after) for message in self.messages]
        self.made_by: dict[Action, list[int]] = {}
        self.awaits: dict[Action, int] = {}  # messages that have not come yet, by the action that needs them
        for number, message in enumerate(self.messages):
            for action in message.after:
                self.made_by.setdefault(action, []).append(number)
            for _, action in message.before:
                self.awaits[action] = self.awaits.get(action, 0) + 1
        self.lists: dict[int, list[Step]] = {rank: [] for rank in range(problem.ranks)}
        self.position = [0] * problem.ranks
        self.ready: list[tuple[int, int]] = []  # start of a rank's next action, and the rank
        self.blocked: set[Action] = set()

    def weave(self) -> None:
        for rank in self.lists:
            self.offer(rank)
        while self.ready:
            _, rank = heapq.heappop(self.ready)
            action = self.orders[rank][self.position[rank]]
            self.lists[rank].append(action)
            self.position[rank] += 1
            for number in self.made_by.get(action, ()):
                self.missing[number] -= 1
                if not self.missing[number]:
                    self.hand_over(self.messages[number])
            self.offer(rank)

    def offer(self, rank: int) -> None:
        """Make the rank's next action ready, or note that it waits for a message."""
        if self.position[rank] == len(self.orders[rank]):
            return
        action = self.orders[rank][self.position[rank]]
        if self.awaits.get(action):
            self.blocked.add(action)
        else:
            heapq.heappush(self.ready, (self.starts[rank][self.position[rank]], rank))

    def hand_over(self, message: Message) -> None:
        for rank, transfer in message.transfers:
            self.lists[rank].append(transfer)
        for rank, action in message.before:
            self.awaits[action] -= 1
            if not self.awaits[action] and action in self.blocked:
                self.blocked.remove(action)
                self.offer(rank)
