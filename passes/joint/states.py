"""The state space of order and residency together: what has run, what is kept, and what the choices so far moved.

A state stands for every way to run the operators ``done`` that leaves exactly ``kept`` in the scratchpad. A buffer
that is live but not kept has left it: the load that brings it back, and the store that made this possible, are part of
``cost`` already. Three facts, proven in docs/formulations/joint.md, keep the space small without losing an optimum:

* *Late decisions.* Everything is kept until some operator finds no room. Then one of the smallest sets of buffers that
  makes the room is dropped, each from its last use on, which is no dearer than having dropped it then.
* *Eager operators.* An operator whose operands are all kept, and whose outputs take no more room and cost no more to
  drop than the operands that die with it, may run at once: no plan from this state is better for running it later.
* *Dominance.* Of two states with the same ``done``, one that could drop what it keeps and the other does not, and then
  be as cheap, makes the other superfluous.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import NamedTuple

from ..order.problem import OrderProblem

__all__ = ["State", "StateSpace", "Wanted", "order_of"]

MAX_DYING = 6  # operands that die with an operator and are weighed against each other; further ones count for nothing

MAX_CHAIN = 16  # operators that are tried as one eager chain

STEPS = 32  # of looking for what to drop, about as much work as one state


class State(NamedTuple):
    """Operators run (``done``, a bitmask), buffers ``kept``, which of these are ``clean``, and bytes moved (``cost``).

    ``clean`` buffers are held by backing memory as well, so dropping them needs no store. ``used`` is the room that
    the kept ones take, ``ready`` the operators that may run next, ``depth`` how many have run, and ``ran`` those that
    ran since ``parent``.
    """

    done: int
    kept: frozenset[int]
    clean: frozenset[int]
    used: int
    ready: tuple[int, ...]
    depth: int
    cost: int
    parent: State | None
    ran: tuple[int, ...]


#: Asked about a child by its operators done, buffers kept and clean, and by its cost.
Wanted = Callable[[tuple[int, frozenset[int], frozenset[int]], int], bool]


@dataclass
class _Draft:
    """A state while operators are added to it."""

    done: int
    kept: set[int]
    clean: set[int]
    used: int
    ready: set[int]
    ran: list[int]


class _Masks(dict[int, int]):
    """Operators by index, as bitmasks, made when first asked for: all of them take the square of the operators."""

    def __init__(self, ops: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._ops = ops

    def __missing__(self, index: int) -> int:
        mask = self[index] = sum(1 << op for op in self._ops[index])
        return mask


class StateSpace:
    """Transitions of one problem in ``capacity`` bytes."""

    def __init__(self, problem: OrderProblem, capacity: int) -> None:
        self.capacity = capacity
        self.full = (1 << len(problem.predecessors)) - 1
        self.problem = problem
        writers: list[list[int]] = [[] for _ in problem.users]
        for op, written in enumerate(problem.writes):
            for buffer in written:
                writers[buffer].append(op)
        self._users, self._writers = _Masks(problem.users), _Masks(writers)
        self._predecessors = _Masks(problem.predecessors)
        self._touched = [frozenset(touched) for touched in problem.touches]
        self._sharing = [frozenset(o for b in touched for o in problem.users[b]) for touched in problem.touches]

    def root(self) -> State:
        """Nothing has run."""
        return self.entry(0)

    def entry(self, done: int) -> State:
        """The operators ``done`` have run and every live buffer waits, paid for, in backing memory.

        No state with these operators done has less left to pay, so the least cost from here bounds theirs.
        """
        ready = {
            o
            for o, before in enumerate(self.problem.predecessors)
            if not done >> o & 1 and all(done >> p & 1 for p in before)
        }
        return self._closed(_Draft(done, set(), set(), 0, ready, []), set(ready), done.bit_count(), 0, None)

    def children(self, state: State, spend: int, wanted: Wanted) -> Iterator[State | None]:
        """States after one more operator and the eager ones behind it, none dearer than ``state`` by over ``spend``.

        Each child has to be ``wanted`` before its eager operators run, which takes most of the time. ``None`` stands
        for one that is not, and for steps that lead to none: there can be very many.
        """
        footprint = self.problem.footprint
        for op in state.ready:
            need = state.used - self.capacity
            for buffer in self._touched[op]:
                if buffer not in state.kept:
                    need += footprint[buffer]
            for cover in (((), 0),) if need <= 0 else self._covers(state, op, need, spend):
                if cover is None:
                    yield None
                    continue
                dropped, cost = cover
                draft, fresh = self._after(state, op, dropped)
                if wanted((draft.done, frozenset(draft.kept), frozenset(draft.clean)), state.cost + cost):
                    suspects = draft.ready if draft.used < state.used else draft.ready & self._sharing[op] | fresh
                    yield self._closed(draft, set(suspects), state.depth + 1, state.cost + cost, state)
                else:
                    yield None

    def drop_cost(self, state: State, buffers: Iterable[int]) -> int:
        """Bytes that move when ``state`` drops ``buffers``: a load each, and a store for those that are not clean."""
        nbytes = self.problem.nbytes
        return sum(nbytes[b] if b in state.clean else 2 * nbytes[b] for b in buffers)

    def dominates(self, state: State, other: State) -> bool:
        """Whether ``state``, with the same operators done, makes ``other`` superfluous."""
        if state.cost > other.cost:
            return False
        surplus = state.kept - other.kept
        if surplus and state.cost + self.drop_cost(state, surplus) > other.cost:
            return False
        return not (other.clean & state.kept) - state.clean

    def _after(self, state: State, op: int, dropped: tuple[int, ...]) -> tuple[_Draft, set[int]]:
        """``state`` after dropping ``dropped`` and running ``op``, and the operators that this made ready."""
        draft = _Draft(state.done, set(state.kept), set(state.clean), state.used, set(state.ready), [op])
        for buffer in dropped:
            draft.kept.remove(buffer)
            draft.clean.discard(buffer)
            draft.used -= self.problem.footprint[buffer]
        return draft, self._run(draft, op)

    def _closed(self, draft: _Draft, suspects: set[int], depth: int, cost: int, parent: State | None) -> State:
        """``draft`` after every eager operator has run, the first in program order first.

        ``suspects`` are the ready operators that may have become eager; the others are known not to be.
        """
        while suspects:
            op = min(suspects)
            suspects.remove(op)
            chain = (op,) if self._is_eager(draft, op) else self._eager_chain(draft, op)
            used = draft.used
            for member in chain:
                fresh = self._run(draft, member)
                draft.ran.append(member)
                depth += 1
                suspects |= draft.ready & self._sharing[member] | fresh
            if draft.used < used:
                suspects |= draft.ready
            suspects.difference_update(chain)
        ready = tuple(sorted(draft.ready))
        return State(
            draft.done,
            frozenset(draft.kept),
            frozenset(draft.clean),
            draft.used,
            ready,
            depth,
            cost,
            parent,
            tuple(draft.ran),
        )

    def _run(self, draft: _Draft, op: int) -> set[int]:
        """Run ``op`` in ``draft``, which has room for it; returns the operators that became ready."""
        draft.done |= 1 << op
        draft.ready.remove(op)
        problem, writes = self.problem, self.problem.writes[op]
        for buffer in self._touched[op]:
            live = self._users[buffer] & ~draft.done
            if buffer not in draft.kept:
                if not live:
                    continue
                draft.kept.add(buffer)
                draft.clean.add(buffer)  # it was loaded, unless this operator writes it
                draft.used += problem.footprint[buffer]
            elif not live:
                draft.kept.remove(buffer)
                draft.clean.discard(buffer)
                draft.used -= problem.footprint[buffer]
                continue
            if buffer in writes:
                (draft.clean.add if problem.final_writer[buffer] == op else draft.clean.discard)(buffer)
        fresh = {s for s in problem.successors[op] if not self._predecessors[s] & ~draft.done}
        draft.ready |= fresh
        return fresh

    def _is_eager(self, draft: _Draft, op: int) -> bool:
        """Whether no plan from ``draft`` is better for running the ready operator ``op`` later than now."""
        problem = self.problem
        later = ~(draft.done | 1 << op)
        needs = grows = grown_cost = 0
        dying: list[int] = []
        for buffer in problem.touches[op]:
            users, is_final = self._users[buffer], problem.final_writer[buffer] == op
            if buffer in draft.kept:
                if not users & later:
                    dying.append(buffer)
                elif buffer in draft.clean and buffer in problem.writes[op] and not is_final:
                    return False  # overwritten, it would need a store that its old content does not need
                continue
            if users & draft.done:
                return False  # it has to be loaded, and would take room from now on
            needs += problem.footprint[buffer]
            if users & later:
                grows += problem.footprint[buffer]
                is_backed = is_final or (problem.is_source[buffer] and buffer not in problem.writes[op])
                grown_cost += problem.nbytes[buffer] * (1 if is_backed else 2)
        if draft.used + needs > self.capacity:
            return False
        return not grows or self._makes_up(dying[:MAX_DYING], draft.clean, grows, grown_cost)

    def _eager_chain(self, draft: _Draft, first: int) -> tuple[int, ...]:
        """The shortest chain from ``first`` that may as well run at once, as one operator; empty if there is none.

        What is live between its operators stands for the operands that die with an eager one.
        """
        trial = _Draft(draft.done, set(draft.kept), set(draft.clean), draft.used, set(draft.ready), [])
        stages = [(draft.kept, draft.clean)]
        op = first
        for _ in range(MAX_CHAIN):
            if not self._runs_freely(trial, op):
                return ()
            fresh = self._run(trial, op)
            trial.ran.append(op)
            if len(stages) > 1 and self._may_close(stages, trial):
                return tuple(trial.ran)
            if len(fresh) != 1:
                return ()
            stages.append((set(trial.kept), set(trial.clean)))
            (op,) = fresh
        return ()

    def _runs_freely(self, draft: _Draft, op: int) -> bool:
        """Whether ``op`` finds its operands kept, room for the others, and overwrites nothing that is clean."""
        needs = 0
        for buffer in self._touched[op]:
            if buffer not in draft.kept:
                if self._users[buffer] & draft.done:
                    return False
                needs += self.problem.footprint[buffer]
            elif buffer in draft.clean and buffer in self.problem.writes[op]:
                return False
        return draft.used + needs <= self.capacity

    def _may_close(self, stages: Sequence[tuple[set[int], set[int]]], trial: _Draft) -> bool:
        """Whether what has grown since the first of ``stages`` makes up for what was live at each of them."""
        problem = self.problem
        grown = trial.kept - stages[0][0]
        if any(not grown.isdisjoint(kept) for kept, _ in stages[1:]):
            return False
        grows = sum(problem.footprint[b] for b in grown)
        cost = sum(problem.nbytes[b] * (1 if b in trial.clean else 2) for b in grown)
        return not grows or all(
            self._makes_up(sorted(kept - trial.kept)[:MAX_DYING], clean, grows, cost) for kept, clean in stages
        )

    def _makes_up(self, dying: Sequence[int], clean: Collection[int], grows: int, grown_cost: int) -> bool:
        """Whether, whichever of ``dying`` a plan drops, dropping what has grown or nothing instead is no worse."""
        problem = self.problem
        freed = sum(problem.footprint[b] for b in dying)
        if grows > freed:
            return False
        cost = {b: problem.nbytes[b] * (1 if b in clean else 2) for b in dying}
        if all(grown_cost <= one for one in cost.values()):
            return True
        return all(
            grows <= freed - sum(problem.footprint[b] for b in dropped) or grown_cost <= sum(cost[b] for b in dropped)
            for count in range(1, len(dying) + 1)
            for dropped in combinations(dying, count)
        )

    def _covers(self, state: State, op: int, need: int, spend: int) -> Iterator[tuple[tuple[int, ...], int] | None]:
        """Smallest sets of kept buffers that free ``need`` bytes for ``op``, and their cost, at most ``spend``.

        Of buffers that are alike for all that is to come, the first are dropped first. ``None`` now and then where
        many steps find no set.
        """
        problem = self.problem
        buffers = sorted(state.kept - self._touched[op], key=lambda b: (-problem.footprint[b], b))
        sizes = [problem.footprint[b] for b in buffers]
        costs = [problem.nbytes[b] * (1 if b in state.clean else 2) for b in buffers]
        alike = [self._likeness(state, b) for b in buffers]
        behind = [*reversed(list(accumulate(reversed(sizes)))), 0]  # bytes from each buffer on
        unlike = list(range(1, len(buffers) + 1))  # the next buffer that may be dropped where each is not
        for i in reversed(range(len(buffers) - 1)):
            if alike[i] == alike[i + 1]:
                unlike[i] = unlike[i + 1]
        chosen: list[int] = []
        i, left, spent, steps = 0, need, 0, 0
        while True:
            steps += 1
            if steps % STEPS == 0:
                yield None
            if behind[i] >= left:  # so some buffers are left, as something is left to free
                if spent + costs[i] > spend:
                    i = unlike[i]
                    continue
                chosen.append(i)
                left, spent = left - sizes[i], spent + costs[i]
                if left > 0:
                    i += 1
                    continue
                if -left < sizes[i]:  # it is the smallest: without any of them, too little is freed
                    yield tuple(buffers[c] for c in chosen), spent
            if not chosen:
                return
            last = chosen.pop()
            i, left, spent = unlike[last], left + sizes[last], spent - costs[last]

    def _likeness(self, state: State, buffer: int) -> tuple[int, ...]:
        """Equal for two kept buffers that all plans from ``state`` may exchange."""
        if self._writers[buffer] & ~state.done:
            return (buffer,)
        nbytes, footprint = self.problem.nbytes[buffer], self.problem.footprint[buffer]
        return footprint, nbytes, buffer in state.clean, self._users[buffer] & ~state.done


def order_of(state: State) -> list[int]:
    """The operators in the order in which they ran up to ``state``, without those before the state it began from."""
    parts: list[tuple[int, ...]] = []
    at: State | None = state
    while at is not None:
        parts.append(at.ran)
        at = at.parent
    return [op for part in reversed(parts) for op in part]
