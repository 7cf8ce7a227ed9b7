"""ZB-V from times: forwards down and up the V as memory allows, then I and F in turn, W where a rank would idle.

Qi et al., arXiv 2401.10241, section 6; that two switches are tried four ways, each again with what it idled as what is
harmless, is from the authors' own implementation.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from ....compiler.pipelining.problem import Stage
from ....compiler.pipelining.schedule import ActionKind
from ....errors import OptionError
from ..solution import Objective
from .layout import Layout, Order, Orders
from .zero_bubble import played

__all__ = ["zero_bubble_v_greedy"]

_FORWARD, _INPUT, _WEIGHT = ActionKind.FORWARD, ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT
_DOWN, _UP = 0, 1  # the chunk of a rank that a microbatch meets first, and the one that it meets on its way back


def zero_bubble_v_greedy(layout: Layout, objective: Objective) -> Orders:
    """The best of all ways within the problem's memory limit; of equals the first.

    Without a limit, within what as many microbatches as there are ranks hold, as in 1F1B, unless that is too little.

    Raises:
        OptionError: none of them keeps the limit.
    """
    limit = layout.problem.memory_limit
    for limits in (_held_by_1f1b(layout), None) if limit is None else (limit,):
        best = min(_ways(layout, limits, objective), key=lambda way: way[0], default=None)
        if best is not None:
            return best[1]
    raise OptionError(f"no way of ZB-V keeps the memory limit of {limit} bytes")


def _held_by_1f1b(layout: Layout) -> tuple[int, ...]:
    limits = list(layout.problem.resident_bytes)
    for rank, stages in enumerate(layout.stages):
        for stage in stages:
            costs = layout.problem.stages[stage]
            later = costs.until_weight_gradient_bytes + costs.between_gradients_bytes
            limits[rank] += layout.ranks * max(_forward_bytes(costs), later)
    return tuple(limits)


def _ways(layout: Layout, limits: tuple[int, ...] | None, objective: Objective) -> Iterator[tuple[int, Orders]]:
    """What each way reaches; again with what it idled as long as that lessens the longest idle time."""
    for fill_input, fill_forward in itertools.product((True, False), repeat=2):
        idled: list[int] | None = None
        while True:
            play = _Play(layout, limits, fill_input, fill_forward, idled)
            orders = play.orders()
            if orders is None:
                break
            yield played(layout, orders, objective, play.begun, play.free), orders
            if idled is not None and max(play.idle) >= max(idled):
                break
            idled = play.idle


class _Stuck(Exception):
    """No W is left that would free memory."""


class _Play:
    """One way: what each rank has done, when it is free, what it holds, and how long it has idled since its first F.

    ``idled`` are idle times by rank that another play had; up to the difference from the longest, a rank may idle.
    """

    def __init__(
        self,
        layout: Layout,
        limits: tuple[int, ...] | None,
        fill_input: bool,
        fill_forward: bool,
        idled: list[int] | None,
    ) -> None:
        self.layout, self.microbatches = layout, layout.microbatches
        self.fill_partly = {_INPUT: fill_input, _FORWARD: fill_forward}
        self.ranks = range(layout.ranks)
        self.stages = [[layout.problem.stages[stage] for stage in stages] for stages in layout.stages]
        self.limits = limits
        self.written = [Order(rank, layout) for rank in self.ranks]
        self.weights: list[deque[int]] = [deque() for _ in self.ranks]  # chunks of the W that could be done
        self.begun = [0] * layout.ranks
        self.free = [0] * layout.ranks
        self.held = list(layout.problem.resident_bytes)
        self.idle = [0] * layout.ranks
        self.allowed = [0] * layout.ranks if idled is None else [max(idled) - one for one in idled]
        self.finish: dict[tuple[int, int, ActionKind, int], int] = {}

    def orders(self) -> Orders | None:
        """What every rank does, or ``None`` if the limit is not kept."""
        try:
            self.first_forwards()
            self.even_forwards()
            while any(self.done(rank, _INPUT, _DOWN) < self.microbatches for rank in self.ranks):
                moved = self.input_gradients()
                if not (self.forwards() or moved):
                    return None
        except _Stuck:
            return None
        for rank in self.ranks:
            while self.weights[rank]:
                self.weight(rank)
        return tuple(order.actions() for order in self.written)

    def done(self, rank: int, kind: ActionKind, chunk: int) -> int:
        return self.written[rank].done(kind, self.layout.stages[rank][chunk])

    def fits(self, rank: int, more: int) -> bool:
        return self.limits is None or self.held[rank] + more <= self.limits[rank]

    def needs(self, rank: int, kind: ActionKind, chunk: int) -> int:
        """Bytes that F or I allocates."""
        stage = self.stages[rank][chunk]
        return _forward_bytes(stage) if kind is _FORWARD else stage.between_gradients_bytes

    def room(self, rank: int, kind: ActionKind, chunk: int) -> int:
        """Bytes that have to be free before an action: what it allocates, and behind F what an I would."""
        needs = self.needs(rank, kind, chunk)
        return needs + max(self.needs(rank, _INPUT, one) for one in (_DOWN, _UP)) if kind is _FORWARD else needs

    def arrival(self, rank: int, kind: ActionKind, chunk: int) -> int | None:
        """When the operand of the next F or I of a chunk is there; 0 if no other rank makes it, ``None`` if not yet."""
        before = rank - 1 if (kind is _FORWARD) == (chunk == _DOWN) else rank + 1
        if before not in self.ranks:
            return 0
        finish = self.finish.get((before, chunk, kind, self.done(rank, kind, chunk)))
        return None if finish is None else finish + self.layout.lags[kind, self.layout.stages[rank][chunk]]

    def can(self, rank: int, kind: ActionKind, chunk: int) -> bool:
        """Whether a chunk has another F or I to do, and all that it needs has been done, on any rank."""
        number = self.done(rank, kind, chunk)
        if number >= self.microbatches or self.arrival(rank, kind, chunk) is None:
            return False
        if kind is _FORWARD and chunk == _DOWN:
            return True
        before = (_INPUT, _UP) if (kind, chunk) == (_INPUT, _DOWN) else (_FORWARD, _DOWN if kind is _FORWARD else _UP)
        return self.done(rank, *before) > number

    def do(self, rank: int, kind: ActionKind, chunk: int) -> None:
        """F or I of a chunk, when its operand is there."""
        if not self.fits(rank, self.needs(rank, kind, chunk)):
            raise _Stuck
        stage = self.stages[rank][chunk]
        start = max(self.free[rank], self.arrival(rank, kind, chunk) or 0)
        if self.done(rank, _FORWARD, _DOWN):
            self.idle[rank] += start - self.free[rank]
        else:
            self.begun[rank] = start
        self.free[rank] = start + (stage.forward_ns if kind is _FORWARD else stage.input_gradient_ns)
        self.finish[rank, chunk, kind, self.done(rank, kind, chunk)] = self.free[rank]
        self.held[rank] += self.needs(rank, kind, chunk)
        if kind is _INPUT:
            self.held[rank] -= stage.until_input_gradient_bytes
            self.weights[rank].append(chunk)
        self.written[rank].add(kind, self.layout.stages[rank][chunk])

    def weight(self, rank: int) -> None:
        """The W that has been possible for the longest time."""
        if not self.weights[rank]:
            raise _Stuck
        chunk = self.weights[rank].popleft()
        stage = self.stages[rank][chunk]
        self.free[rank] += stage.weight_gradient_ns
        self.held[rank] -= stage.between_gradients_bytes + stage.until_weight_gradient_bytes
        self.written[rank].add(_WEIGHT, self.layout.stages[rank][chunk])

    def first_forwards(self) -> None:
        """The first microbatch down and up the V; before each rank's second forward, more that fit into the wait.

        Such a forward is done by all ranks down to the one that waits, lest the operands run out.
        """
        for rank in self.ranks:
            self.do(rank, _FORWARD, _DOWN)
        for rank in reversed(self.ranks):
            back = self.arrival(rank, _FORWARD, _UP) or 0
            stage = self.stages[rank][_DOWN]
            later = self.room(rank, _FORWARD, _DOWN) - _forward_bytes(stage)
            while (
                self.done(rank, _FORWARD, _DOWN) < self.microbatches - rank
                and self.free[rank] + stage.forward_ns <= back
                and self.fits(rank, (2 + 2 * rank) * _forward_bytes(stage) + later)
            ):
                for other in self.ranks[: rank + 1]:
                    self.do(other, _FORWARD, _DOWN)
            self.do(rank, _FORWARD, _UP)

    def even_forwards(self) -> None:
        """More, of one chunk and the other in turn, until no rank has done fewer than the one before it."""
        chunk = _DOWN
        for rank in self.ranks[1:]:
            vain = 0
            while self.lags_behind(rank) and vain < 2:
                vain += 1
                for other in reversed(self.ranks[rank:]):
                    if self.can(other, _FORWARD, chunk):
                        self.do(other, _FORWARD, chunk)
                        vain = 0
                chunk = _UP if chunk == _DOWN else _DOWN

    def lags_behind(self, rank: int) -> bool:
        own = [self.done(rank, _FORWARD, chunk) for chunk in (_DOWN, _UP)]
        before = [self.done(rank - 1, _FORWARD, chunk) for chunk in (_DOWN, _UP)]
        return sum(own) < sum(before) or own[_UP] <= before[_UP] < self.microbatches

    def input_gradients(self) -> bool:
        """I on every rank: on the way back up the ranks where one has come that far, else on the way down."""
        backs = [rank for rank in self.ranks if self.goes_on_back(rank)]
        moved = False
        for rank in reversed(backs):
            moved |= self.fill_and_do(rank, _INPUT, _DOWN, always=True)
        for rank in self.ranks:
            if rank not in backs:
                moved |= self.fill_and_do(rank, _INPUT, _UP)
        return moved

    def goes_on_back(self, rank: int) -> bool:
        if self.done(rank, _INPUT, _DOWN) >= self.done(rank, _INPUT, _UP):
            return False
        return self.arrival(rank, _INPUT, _DOWN) is not None or self.done(rank, _INPUT, _UP) >= self.microbatches

    def forwards(self) -> bool:
        """F on every rank that has one to do, on the way back before one on the way down."""
        moved = False
        for rank in self.ranks:
            chunk = self.next_forward(rank)
            if chunk is not None:
                moved |= self.fill_and_do(rank, _FORWARD, chunk)
        return moved

    def next_forward(self, rank: int) -> int | None:
        down, up = (self.done(rank, _FORWARD, chunk) for chunk in (_DOWN, _UP))
        if up >= self.microbatches:
            return None
        if up >= down:
            return _DOWN
        if self.arrival(rank, _FORWARD, _UP) is not None:
            return _UP
        if down < self.microbatches and self.arrival(rank, _FORWARD, _DOWN) is not None:
            return _DOWN
        return None

    def fill_and_do(self, rank: int, kind: ActionKind, chunk: int, *, always: bool = False) -> bool:
        """F or I if it can be done, behind W that free memory it needs or end before its operand is there.

        One W more if the time that is left would be idle, that matters, and the way asks for it.
        """
        if not self.can(rank, kind, chunk):
            return False
        while not self.fits(rank, self.room(rank, kind, chunk)):
            self.weight(rank)
        ready = self.arrival(rank, kind, chunk) or 0
        while self.weights[rank] and self.free[rank] + self.weight_ns(rank) <= ready:
            self.weight(rank)
        harmless = max(max(self.idle), self.allowed[rank]) - self.idle[rank]
        if self.weights[rank] and ready - self.free[rank] > harmless and (always or self.fill_partly[kind]):
            self.weight(rank)
        self.do(rank, kind, chunk)
        return True

    def weight_ns(self, rank: int) -> int:
        return self.stages[rank][self.weights[rank][0]].weight_gradient_ns


def _forward_bytes(stage: Stage) -> int:
    return stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes
