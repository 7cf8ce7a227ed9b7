"""Beam search over down-sets: the sets of operators that may have run, each reached by its cheapest order found.

Which buffers are live after a set of operators ran does not depend on their order, so of two orders of one set only
the one with less expected spill traffic survives (dominance). A set is a bitmask of operator indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .problem import OrderProblem

__all__ = ["DownSets", "Rule"]


@dataclass(frozen=True)
class Rule:
    """How a partial order is judged: by ``cost``, the bytes above ``capacity`` that it made.

    With ``excess`` the live bytes above ``capacity`` and ``spilled`` the bytes taken to be in backing memory, an
    operator costs ``max(0, excess - spilled)``. ``returning`` spills are fetched again as soon as there is room
    (``spilled`` falls with the excess); others stay away until an operator's working set leaves them no place.
    ``weight`` is what a byte that is still spilled counts when states are compared. With ``eager``, an operator that
    does not grow the live bytes and fits runs at once, without looking at its alternatives.
    """

    capacity: int
    returning: bool = True
    weight: float = 0.5
    eager: bool = True


class _Ready(NamedTuple):
    """An operator whose predecessors have run: bytes it makes live, and bytes that are dead after it."""

    op: int
    adds: int
    frees: int


class _State(NamedTuple):
    """A down-set with the best order that reaches it; compares by judgement, then live bytes, then tie-break."""

    judgement: float
    live: int
    tie: float
    cost: int
    spilled: int
    done: int
    chosen: _Ready | None
    parent: _State | None
    ready: tuple[_Ready, ...]


class DownSets:
    """The search over one problem; holds its bitmasks, and no state between searches."""

    def __init__(self, problem: OrderProblem) -> None:
        self._problem = problem
        self._users = [sum(1 << op for op in users) for users in problem.users]
        self._predecessors = [sum(1 << op for op in before) for before in problem.predecessors]
        self._sharing = [0] * len(problem.touches)  # operators that share a buffer with each one
        for op, touched in enumerate(problem.touches):
            for buffer in touched:
                self._sharing[op] |= self._users[buffer]
        self._working_set = [sum(problem.footprint[b] for b in touched) for touched in problem.touches]

    def order(
        self,
        rule: Rule,
        width: int,
        halted: Callable[[], bool],
        *,
        prefix: Sequence[int] = (),
        operators: Sequence[int] | None = None,
        ties: Sequence[float] | None = None,
    ) -> list[int] | None:
        """Order ``operators`` (all by default) after ``prefix`` ran, keeping ``width`` sets at each size.

        ``ties`` rank equals by their last operator. ``None`` when ``halted`` says so before the end.
        """
        every = range(len(self._predecessors)) if operators is None else sorted(operators)
        inside = sum(1 << op for op in every)
        done = sum(1 << op for op in prefix)
        live = sum(self._problem.footprint[b] for b, users in enumerate(self._users) if users & done and users & ~done)
        ready = tuple(self._ready(op, done) for op in every if not self._predecessors[op] & ~done)
        states = [_State(0.0, live, 0.0, 0, max(0, live - rule.capacity), done, None, None, ready)]
        for _ in every:
            if halted():
                return None
            best = self._successors(states, rule, ties)
            states = [self._completed(state, inside) for state in sorted(best, key=_rank)[:width]]
        return _path(states[0])

    def _ready(self, op: int, done: int) -> _Ready:
        after = done | 1 << op
        adds = frees = 0
        for buffer in self._problem.touches[op]:
            users = self._users[buffer]
            if not users & done:
                adds += self._problem.footprint[buffer]
            if not users & ~after:
                frees += self._problem.footprint[buffer]
        return _Ready(op, adds, frees)

    def _successors(self, states: list[_State], rule: Rule, ties: Sequence[float] | None) -> list[_State]:
        """Cheapest state of every down-set with one more operator; their ``ready`` is still the parent's."""
        best: dict[int, _State] = {}
        for state in states:
            for chosen in _candidates(state, rule):
                op, adds, frees = chosen
                during = state.live + adds
                live = during - frees
                excess = during - rule.capacity
                cost = state.cost + max(0, excess - state.spilled)
                if rule.returning:
                    spilled = max(0, live - rule.capacity)
                else:
                    spilled = min(max(state.spilled, excess), during - self._working_set[op], live)
                done = state.done | 1 << op
                judgement = cost + rule.weight * spilled
                known = best.get(done)
                if known is None or (judgement, live) < known[:2]:
                    tie = ties[op] if ties else 0.0
                    best[done] = _State(judgement, live, tie, cost, spilled, done, chosen, state, state.ready)
        return list(best.values())

    def _completed(self, state: _State, inside: int) -> _State:
        """``state`` with the operators that are ready in it; only figures that its last operator changed are redone."""
        chosen, done = state.chosen, state.done
        if chosen is None:
            return state
        sharing = self._sharing[chosen.op]
        ready = [self._ready(r.op, done) if sharing >> r.op & 1 else r for r in state.ready if r is not chosen]
        for op in self._problem.successors[chosen.op]:
            if inside >> op & 1 and not self._predecessors[op] & ~done:
                ready.append(self._ready(op, done))
        return state._replace(ready=tuple(ready))


def _candidates(state: _State, rule: Rule) -> Sequence[_Ready]:
    if rule.eager:
        room = max(rule.capacity - state.live, 0)
        for ready in state.ready:
            if ready.adds <= ready.frees and ready.adds <= room:
                return (ready,)
    return state.ready


def _rank(state: _State) -> tuple[float, int, float]:
    return state[:3]


def _path(state: _State) -> list[int]:
    order: list[int] = []
    at: _State | None = state
    while at is not None and at.chosen is not None:
        order.append(at.chosen.op)
        at = at.parent
    return order[::-1]
