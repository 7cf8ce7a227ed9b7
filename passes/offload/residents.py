"""Which weights stay on the device: an integer program over the fluid model, and a bound on what any choice reaches.

Minimise ``t[n-1]``, the finish of the last operator, with ``x[w] = 1`` for each weight that stays, subject to

* ``t[k] >= t[k-1] + compute[k]``, operators one after another;
* ``t[k] >= load[k] + compute[k]`` where ``load[k]`` are the seconds of all loads first needed at ``k`` or before;
* ``t[k] >= bytes[k] / bandwidth + window[k] + compute[k]``, and ``window[k+1] >= window[k]``,
  ``window[k+1] >= t[k] - (bytes[k] + room[k]) / bandwidth``: while ``k`` runs, what is loaded for later is no more than
  ``room[k] = capacity - held[k] - sum(x[w] * footprint[w]) - sum((1 - x[w]) * footprint[w] for w used at k)``;
* ``room[k] >= 0``.

``load`` and ``bytes`` are linear in ``x``, so all of it is. Every plan of the order satisfies the rows when ``held`` is
each operator's working set, so the relaxation's optimum is a bound on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pulp

from ...compiler.pipeline import Budget
from .._solver.highs import solve
from .stream import Stream

__all__ = ["LowerBound", "choose_residents", "lower_bound"]

MAX_NODES = 2_000  # the search tree in deterministic mode
UNITS = 1e4  # the largest time in the model, in its own unit: far from the solver's tolerances
PREFERENCE = 1e-4  # of its load's time that streaming a weight costs where it costs no time: fewer bytes move
RESERVES = (0, 8)  # n-th parts of the capacity that the fluid model leaves, because whole buffers need more room
MOVES = 3_000  # changes that the local search tries


def choose_residents(stream: Stream, budget: Budget) -> list[frozenset[int]]:
    """Choices of sources that stay, the best first: by ``Stream.latency_s``, and among equals by the bytes loaded.

    Greedy choices and those of the integer program in several capacities; the best is improved by local search.
    """
    candidates = [i for i, source in enumerate(stream.sources) if source.candidate]
    if stream.latency_s(candidates) is not None:  # no call is faster than one that loads no weight
        return [frozenset(candidates)]
    found: set[frozenset[int]] = stream.greedy() | {frozenset()}
    for part in RESERVES if candidates else ():
        less = stream.with_capacity(stream.capacity - (stream.capacity // part if part else 0))
        found |= _by_program(less, min(found, key=lambda c: _rank(less, c)), budget.share(0.25))
    ranked = sorted(found, key=lambda choice: _rank(stream, choice))
    ranked = [choice for choice in ranked if stream.latency_s(choice) is not None]
    if not ranked:
        return [frozenset()]
    return list(dict.fromkeys((_improved(stream, ranked[0], candidates, budget.share(0.5)), *ranked)))


def _by_program(stream: Stream, start: frozenset[int], budget: Budget) -> set[frozenset[int]]:
    """What the integer program chooses; nothing where time runs out first."""
    if budget.halted() or min(stream.rooms(()), default=0) < 0:
        return set()
    model = _Model(stream)
    nodes = MAX_NODES if budget.deterministic else None
    values = {variable.name: float(i in start) for i, variable in model.x.items()}
    solution = solve(model.problem, budget, start=values, absolute_gap=1e-3 * UNITS, max_nodes=nodes)
    if not solution.values:
        return set()
    return {frozenset(i for i, variable in model.x.items() if solution.values.get(variable.name, 0.0) > 0.5)}


def _rank(stream: Stream, choice: frozenset[int]) -> tuple[float, int, list[int]]:
    seconds = stream.latency_s(choice)
    nbytes = sum(stream.sources[i].nbytes for i in choice)
    return (math.inf if seconds is None else round(seconds, 12), -nbytes, sorted(choice))


def _improved(stream: Stream, best: frozenset[int], candidates: list[int], budget: Budget) -> frozenset[int]:
    """``best`` after moves of one weight, or of one for another, as long as they help."""
    rank, moves = _rank(stream, best), 0
    improved = True
    while improved:
        improved = False
        for change in _changes(best, candidates):
            moves += 1
            if moves > MOVES or budget.halted():
                return best
            other = best ^ change
            if (found := _rank(stream, other)) < rank:
                best, rank, improved = other, found, True
                break
    return best


def _changes(chosen: frozenset[int], candidates: list[int]) -> Iterator[frozenset[int]]:
    for i in candidates:
        yield frozenset((i,))
    for i in sorted(chosen):
        for j in candidates:
            if j not in chosen:
                yield frozenset((i, j))


class LowerBound(NamedTuple):
    """Seconds that nothing undercuts, and what proved them."""

    seconds: float
    proved_by: Literal["lp", "analytic"]


def lower_bound(stream: Stream, budget: Budget) -> LowerBound:
    """What a call takes whatever stays: the relaxation's optimum.

    ``stream`` holds working sets only. Where time runs out, it is what computing or the least transfers take alone.
    """
    fixed = frozenset(i for i, source in enumerate(stream.sources) if not source.candidate)
    if len(fixed) == len(stream.sources):
        return LowerBound(max(sum(stream.compute), stream.fluid_s(()) or 0.0), "analytic")
    most = max(0, stream.capacity - max(stream.held, default=0))  # bytes that stay, at most
    loaded = sum(source.nbytes for i, source in enumerate(stream.sources) if i not in fixed) - most
    transfers = sum(stream.sources[i].seconds for i in fixed) + max(0, loaded) / stream.bandwidth
    alone = max(sum(stream.compute), transfers)
    model = _Model(stream)
    solution = solve(model.problem, budget, relax=True)
    relaxed = (solution.bound - model.preference) * model.unit * (1 - 1e-6)
    return LowerBound(relaxed, "lp") if math.isfinite(relaxed) and relaxed > alone else LowerBound(alone, "analytic")


class _Model:
    """``problem`` in units of ``unit`` seconds; its objective is at most ``preference`` above the latency."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        candidates = [i for i, source in enumerate(stream.sources) if source.candidate]
        streaming = sum(source.seconds for source in stream.sources)
        self.unit = (sum(stream.compute) + streaming) / UNITS or 1.0
        self.problem = pulp.LpProblem("residents", pulp.LpMinimize)
        self.x = {i: self.problem.add_variable(f"x_{i}", cat=pulp.LpBinary) for i in candidates}
        self.preference = PREFERENCE * sum(stream.sources[i].seconds for i in candidates) / self.unit
        self._write()

    def _write(self) -> None:
        stream, problem = self.stream, self.problem
        kept = problem.add_variable("kept", 0)  # bytes of residents, as seconds of loading them
        problem += kept == pulp.lpSum(self._time(stream.sources[i].footprint) * x for i, x in self.x.items())
        load = nbytes = before = window = None
        for k, compute in enumerate(stream.compute):
            first = stream.first_used[k]
            if first:
                load = self._sum(f"load_{k}", load, [(i, stream.sources[i].seconds / self.unit) for i in first])
                nbytes = self._sum(f"bytes_{k}", nbytes, [(i, self._time(stream.sources[i].nbytes)) for i in first])
            finish = problem.add_variable(f"t_{k}", 0)
            for earliest in (before, load, None if window is None or nbytes is None else nbytes + window):
                if earliest is not None:
                    problem += finish >= earliest + compute / self.unit
            if before is None and load is None:
                problem += finish >= compute / self.unit
            room = self._room(k, kept)
            problem += room >= 0
            behind = problem.add_variable(f"window_{k}")
            problem += behind >= finish - room - (0 if nbytes is None else nbytes)
            if window is not None:
                problem += behind >= window
            before, window = finish, behind
        assert before is not None  # a graph has operators
        fewer = pulp.lpSum(PREFERENCE * self.stream.sources[i].seconds / self.unit * (1 - x) for i, x in self.x.items())
        problem.setObjective(before + fewer)

    def _sum(self, name: str, before: Any, terms: list[tuple[int, float]]) -> Any:
        """A variable for ``before`` and what of ``terms``, by source, is not resident."""
        total = self.problem.add_variable(name, 0)
        added = pulp.lpSum(value * self._streamed(i) for i, value in terms)
        self.problem += total == added + (0 if before is None else before)
        return total

    def _streamed(self, i: int) -> Any:
        return 1 - self.x[i] if i in self.x else 1

    def _room(self, k: int, kept: Any) -> Any:
        stream = self.stream
        used = [self._time(stream.sources[i].footprint) * self._streamed(i) for i in stream.users[k]]
        return self._time(stream.capacity - stream.held[k]) - kept - pulp.lpSum(used)

    def _time(self, nbytes: int) -> float:
        return nbytes / self.stream.bandwidth / self.unit
