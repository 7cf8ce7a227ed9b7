"""Best-first search of a state space: the least cost of any order and residency, or a bound on it when cut short."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from .states import State, StateSpace

__all__ = ["BestFirst", "Milestone"]

CHILD_EFFORT = 64  # of looking at one child, in comparisons with a known state
STATE_EFFORT = 16_384  # after which children count as one more state expanded: that of most states is far below


class Milestone(NamedTuple):
    """Operators ``done``, a bitmask closed under predecessors, and bytes still to move while no others have run."""

    done: int
    to_go: int


@dataclass
class BestFirst:
    """A* over ``space`` from ``start``; resumable, and at any time ``bound`` bytes move at least.

    ``milestones``, each containing the one before, say what is at least to go for states within them. States that
    cannot end below ``ceiling`` are dropped: the cost of a known plan, which may be lowered between runs. ``found`` is
    a state in which everything has run for ``bound`` bytes.
    """

    space: StateSpace
    start: State
    ceiling: int
    milestones: Sequence[Milestone] = ()
    bound: int = 0
    found: State | None = None
    expanded: int = 0
    _open: list[tuple[int, int, int, State]] = field(default_factory=list)
    _known: dict[int, list[State]] = field(default_factory=dict)
    _reached: dict[tuple[int, frozenset[int], frozenset[int]], int] = field(default_factory=dict)
    _ticket: count[int] = field(default_factory=count)
    _effort: int = 0  # since ``halted`` was last asked between children

    def __post_init__(self) -> None:
        self._push(self.start, 0)

    @property
    def is_complete(self) -> bool:
        """Whether nothing below ``bound`` is left to find: it is the least cost, or the ceiling is."""
        return self.found is not None or self.bound >= self.ceiling

    @property
    def size(self) -> int:
        """States held in memory, roughly."""
        return len(self._reached)

    def run(self, halted: Callable[[], bool]) -> None:
        """Search until complete, or ``halted``, which is asked at every state."""
        while not self.is_complete:
            if not self._open:
                self.bound = self.ceiling
                return
            entry = heapq.heappop(self._open)
            least, state = entry[0], entry[3]
            self.bound = max(self.bound, min(least, self.ceiling))
            if least >= self.ceiling or not any(known is state for known in self._known[state.done]):
                continue
            if state.done == self.space.full:
                self.found = state
            elif halted() or not self._expand(state, least, halted):
                heapq.heappush(self._open, entry)
                return

    def _expand(self, state: State, least: int, halted: Callable[[], bool]) -> bool:
        """Whether every child of ``state`` was looked at; one state can have very many, which then count for more."""
        self.expanded += 1
        for child in self.space.children(state, self.ceiling - 1 - state.cost, self._is_new):
            if child is not None:
                self._push(child, least)
                self._effort += len(self._known.get(child.done, ()))
            self._effort += CHILD_EFFORT
            if self._effort >= STATE_EFFORT:
                self._effort = 0
                self.expanded += 1
                if halted():
                    return False
        return True

    def _is_new(self, child: tuple[int, frozenset[int], frozenset[int]], cost: int) -> bool:
        """Whether nothing reached the same before at no higher cost: operators that may change places often do."""
        if self._reached.get(child, self.ceiling) <= cost:
            return False
        self._reached[child] = cost
        return True

    def _push(self, state: State, least: int) -> None:
        least = max(least, state.cost + self._to_go(state.done))
        if least >= self.ceiling:
            return
        dominates = self.space.dominates
        known = self._known.setdefault(state.done, [])
        if any(dominates(other, state) for other in known):
            return
        known[:] = [other for other in known if not dominates(state, other)]
        known.append(state)
        heapq.heappush(self._open, (least, -state.depth, next(self._ticket), state))

    def _to_go(self, done: int) -> int:
        return next((milestone.to_go for milestone in self.milestones if not done & ~milestone.done), 0)
