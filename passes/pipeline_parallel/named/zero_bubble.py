"""Zero Bubble's automatic schedule: warm up as memory allows, then F and I in turn, W where a rank would idle.

Qi et al., arXiv 2401.10241, section 3.1; that there are three switches, and all eight ways are tried, is from the
authors' own implementation. Here every rank may have its own times and limit, and what I allocates is counted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ....compiler.pipelining.schedule import ActionKind, PipelineSchedule
from ....compiler.pipelining.simulate import timed
from ....errors import OptionError
from ..solution import Objective, value_of
from .layout import Layout, Order, Orders

__all__ = ["played", "zero_bubble_greedy"]

_FORWARD, _INPUT, _WEIGHT = ActionKind.FORWARD, ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT


@dataclass(frozen=True)
class _Switches:
    """``early``: no forward of the warm-up ends after the first I could start, rather than none starts after it.

    ``backward_first``: a rank leaves out a forward if the gradient that follows would have to wait for it.
    ``greedy``: W fills an idle time that is shorter than itself even if the rank may idle without harm, that is no
    longer than another rank has idled already.
    """

    early: bool
    backward_first: bool
    greedy: bool


def zero_bubble_greedy(layout: Layout, objective: Objective) -> Orders:
    """The best of the eight ways within the problem's memory limit; of equals the first.

    Raises:
        OptionError: none of them keeps the limit.
    """
    best: tuple[int, Orders] | None = None
    for switches in itertools.product((True, False), repeat=3):
        play = _Play(layout, _Switches(*switches))
        orders = play.orders()
        if orders is None:
            continue
        value = played(layout, orders, objective, play.begun, play.free)
        if best is None or value < best[0]:
            best = value, orders
    if best is None:
        raise OptionError(
            f"no way of zero bubble's automatic schedule keeps the memory limit of {layout.problem.memory_limit} bytes"
        )
    return best[1]


def played(layout: Layout, orders: Orders, objective: Objective, begun: list[int], free: list[int]) -> int:
    """The objective of orders that a play has begun and ended at these times; the simulator is asked if it must be.

    All-reduces of gradients, which no play knows, are behind its end.
    """
    if any(stage.reduce_ns for stage in layout.problem.stages):
        return value_of(timed(PipelineSchedule(layout.problem, orders)), objective)
    if objective == "makespan":
        return max(free)
    return max(end - start for start, end in zip(begun, free, strict=True))


class _Full(Exception):
    """No W is left that would free memory."""


class _Play:
    """One way: what each rank has done, when it is free, what it holds, and how long it has idled since its first F."""

    def __init__(self, layout: Layout, switches: _Switches) -> None:
        self.layout, self.switches = layout, switches
        problem = layout.problem
        self.ranks = range(layout.ranks)
        self.stages = [problem.stages[stage] for (stage,) in layout.stages]
        self.limits = problem.memory_limit
        self.written = [Order(rank, layout) for rank in self.ranks]
        self.begun = [0] * layout.ranks
        self.free = [0] * layout.ranks
        self.held = list(problem.resident_bytes)
        self.idle = [0] * layout.ranks
        self.finish: dict[tuple[int, ActionKind, int], int] = {}
        self.costs = [
            {_FORWARD: stage.forward_ns, _INPUT: stage.input_gradient_ns, _WEIGHT: stage.weight_gradient_ns}
            for stage in self.stages
        ]

    def orders(self) -> Orders | None:
        """What every rank does, or ``None`` if the limit is not kept."""
        try:
            self.warm_up()
            for number in range(1, self.layout.microbatches):
                self.sweep(number)
        except _Full:
            return None
        for rank in self.ranks:
            while self.pending(rank):
                self.do(rank, _WEIGHT)
        return tuple(order.actions() for order in self.written)

    def done(self, rank: int, kind: ActionKind) -> int:
        return self.written[rank].done(kind, self.layout.stages[rank][0])

    def pending(self, rank: int) -> int:
        """W that could be done."""
        return self.done(rank, _INPUT) - self.done(rank, _WEIGHT)

    def all_forward(self, rank: int) -> bool:
        return self.done(rank, _FORWARD) == self.layout.microbatches

    def needs(self, rank: int, kind: ActionKind) -> int:
        """Bytes that an action allocates."""
        stage = self.stages[rank]
        if kind is _FORWARD:
            return stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes
        return stage.between_gradients_bytes if kind is _INPUT else 0

    def room(self, rank: int, kind: ActionKind) -> int:
        """Bytes that have to be free before an action: what it allocates, and behind F what an I would."""
        return self.needs(rank, kind) + (self.needs(rank, _INPUT) if kind is _FORWARD else 0)

    def fits(self, rank: int, held: int) -> bool:
        return self.limits is None or held <= self.limits[rank]

    def arrival(self, rank: int, kind: ActionKind) -> int:
        """When the operand of the rank's next F or I from another rank is there; 0 if there is none."""
        number = self.done(rank, kind)
        if kind is _FORWARD and rank > 0:
            return self.finish[rank - 1, kind, number] + self.lag(rank, kind)
        if kind is _INPUT and rank + 1 < self.layout.ranks:
            return self.finish[rank + 1, kind, number] + self.lag(rank, kind)
        return 0

    def lag(self, rank: int, kind: ActionKind) -> int:
        return self.layout.lags[kind, self.layout.stages[rank][0]]

    def do(self, rank: int, kind: ActionKind) -> None:
        self.held[rank] += self.needs(rank, kind)
        if not self.fits(rank, self.held[rank]):
            raise _Full
        number = self.done(rank, kind)
        start = self.free[rank] if kind is _WEIGHT else max(self.free[rank], self.arrival(rank, kind))
        if self.done(rank, _FORWARD):
            self.idle[rank] += start - self.free[rank]
        else:
            self.begun[rank] = start
        self.free[rank] = self.finish[rank, kind, number] = start + self.costs[rank][kind]
        self.written[rank].add(kind, self.layout.stages[rank][0])
        if kind is _INPUT:
            self.held[rank] -= self.stages[rank].until_input_gradient_bytes
        elif kind is _WEIGHT:
            self.held[rank] -= self.weight_frees(rank)

    def weight_frees(self, rank: int) -> int:
        return self.stages[rank].between_gradients_bytes + self.stages[rank].until_weight_gradient_bytes

    def warm_up(self) -> None:
        """The first microbatch forward; more forwards until its gradient is back; its I."""
        for rank in self.ranks:
            self.do(rank, _FORWARD)
        more = self.more_forwards()
        for rank in self.ranks:
            for _ in range(more[rank]):
                self.do(rank, _FORWARD)
        for rank in reversed(self.ranks):
            self.do(rank, _INPUT)

    def more_forwards(self) -> list[int]:
        more = [0] * self.layout.ranks
        back = self.free[-1] + self.costs[-1][_INPUT]
        for rank in reversed(self.ranks[:-1]):
            back += self.lag(rank, _INPUT)
            free, held, cost = self.free[rank], self.held[rank], self.costs[rank][_FORWARD]
            while 1 + more[rank] < self.layout.microbatches:
                late = free + cost > back if self.switches.early else free >= back
                if late or not self.fits(rank, held + self.room(rank, _FORWARD)):
                    break
                held += self.needs(rank, _FORWARD)
                free += cost
                more[rank] += 1
            back = max(free, back) + self.costs[rank][_INPUT]
        for rank in self.ranks[1:]:  # each rank fewer than the one before, lest it wait for a forward
            more[rank] = min(more[rank], more[rank - 1])
            if more[rank] == more[rank - 1] < self.layout.microbatches - 1:
                more[rank] = max(0, more[rank] - 1)
        return more

    def sweep(self, number: int) -> None:
        """A forward on each rank that is to do one, down the ranks; then I of microbatch ``number``, back up."""
        wanted = [not self.all_forward(rank) and not self.leaves_out(rank) for rank in self.ranks]
        for rank in reversed(self.ranks[:-1]):
            wanted[rank] = wanted[rank] and wanted[rank + 1]
        for rank in self.ranks:
            if wanted[rank]:
                self.fill(rank, _FORWARD)
                self.do(rank, _FORWARD)
        for rank in reversed(self.ranks):
            self.fill(rank, _INPUT)
            if rank == 0 and self.all_forward(rank):
                while self.pending(rank):
                    self.do(rank, _WEIGHT)
            self.do(rank, _INPUT)

    def leaves_out(self, rank: int) -> bool:
        """Whether a rank waits for the next gradient rather than do a forward that the next rank has no use for yet."""
        after = rank + 1
        if not self.switches.backward_first or after == self.layout.ranks:
            return False
        if self.done(rank, _FORWARD) < self.done(after, _FORWARD) + 2:
            return False
        back = self.free[after] + self.costs[after][_FORWARD] + self.costs[after][_INPUT] + self.lag(rank, _INPUT)
        if self.free[rank] >= back:
            return True
        if self.free[rank] + self.costs[rank][_FORWARD] + self.freeing(rank) <= back:
            return False
        return back - self.free[rank] <= self.harmless(rank)

    def freeing(self, rank: int) -> int:
        """What the W take that have to be done before the next forward fits."""
        held, count = self.held[rank] + self.room(rank, _FORWARD), 0
        while not self.fits(rank, held) and count < self.pending(rank):
            held -= self.weight_frees(rank)
            count += 1
        return count * self.costs[rank][_WEIGHT]

    def harmless(self, rank: int) -> int:
        """How long the rank may idle without idling longer than any other."""
        return max(self.idle) - self.idle[rank]

    def fill(self, rank: int, kind: ActionKind) -> None:
        """W before the next action: those that free memory it needs, and those that end before its operand is there.

        One more if the time that is left would be idle, and that matters.
        """
        while not self.fits(rank, self.held[rank] + self.room(rank, kind)):
            if not self.pending(rank):
                raise _Full
            self.do(rank, _WEIGHT)
        ready = self.arrival(rank, kind)
        while self.pending(rank) and self.free[rank] + self.costs[rank][_WEIGHT] <= ready:
            self.do(rank, _WEIGHT)
        gap = ready - self.free[rank]
        if self.pending(rank) and gap > 0 and (self.switches.greedy or gap > self.harmless(rank)):
            self.do(rank, _WEIGHT)
