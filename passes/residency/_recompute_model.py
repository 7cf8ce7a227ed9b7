"""The gap ILP with recomputation as a PuLP model; ``docs/formulations/recomputing.md`` says why each row is valid.

Variables: ``keep_<t>_<k>``, the buffer of track ``t`` stays from its use ``k`` to the next; ``again_<e>``, the slot
``e`` is used; ``load_<t>_<k>``, the buffer is fetched for the slot at use ``k``; ``store_<t>_<v>``, version ``v`` is
stored. A run whose buffer was not kept fetches it: ``1 - keep``. Where capacity rows are chained, ``held_<d>_<e>`` is
what stays across event ``e``. ``load``, ``store`` and ``held`` would be whole anyway, but are integer variables as the
others are: HiGHS 1.14 presolves small models with both kinds to a wrong optimum (its issues 3043, 3073 and 3094).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pulp

from ._choice import Choice, Realised, normalised
from ._occurrences import Occurrences
from ._prices import Prices

__all__ = ["Question", "build", "choice_of", "kept_across", "spans", "start"]

MAX_ROW_TERMS = 300_000  # as in model.py

_Variables = Mapping[str, Any]
_Terms = list[tuple[Any, float]]


@dataclass(frozen=True)
class Question:
    """What to solve: the least price, in units of ``unit``, or the fewest flops at a price of ``at_most``.

    Of the variables in each of ``covers`` one must be 0.
    """

    occurrences: Occurrences
    prices: Prices
    unit: float
    covers: tuple[frozenset[str], ...] = ()
    at_most: int | None = None


def build(question: Question, *, max_row_terms: int = MAX_ROW_TERMS) -> pulp.LpProblem:
    """The model of ``question``."""
    occurrences = question.occurrences
    problem = pulp.LpProblem("recompute", pulp.LpMinimize)
    variables = _add_variables(problem, occurrences)
    price = _price(question, variables)
    if question.at_most is None:
        problem += price, "price"
    else:
        problem += _flops(occurrences, variables), "flops"
        problem += price <= question.at_most / question.unit + 1e-6, "price_limit"
    for t in range(len(occurrences.tracks)):
        for name, row in _track_rows(occurrences, variables, t):
            problem += row, name
    for d in range(len(occurrences.limits)):
        _add_capacity(problem, occurrences, variables, d, max_row_terms)
    for c, cover in enumerate(question.covers):
        problem += _sum([(variables[n], 1) for n in sorted(cover)]) <= len(cover) - 1, f"cover_{c}"
    return problem


def start(realised: Realised) -> dict[str, float]:
    """The values of all variables, but ``held``, in a choice."""
    occurrences = realised.occurrences
    values = {name: 0.0 for name, _, _ in _names(occurrences)}
    values.update({f"again_{e}": 1.0 for e in realised.choice.again})
    values.update({f"store_{t}_{v}": 1.0 for t, v in realised.stored})
    for s in realised.stretches:
        if s.kept:
            values.update({f"keep_{s.track}_{k}": 1.0 for k in range(s.first, s.last)})
        elif (name := f"load_{s.track}_{s.last}") in values and not s.again:
            values[name] = 1.0
    return values


def _names(occurrences: Occurrences) -> Iterator[tuple[str, int, int]]:
    """Name and bounds of every variable but ``held``; what is pinned stays, and is not fetched again."""
    for e, event in enumerate(occurrences.events):
        if event.again:
            yield f"again_{e}", 0, 1
    for t, track in enumerate(occurrences.tracks):
        last_run = max(k for k, use in enumerate(track.uses) if not occurrences.events[use.event].again)
        for k in range(len(track.uses) - 1):
            yield f"keep_{t}_{k}", int(track.pinned and k < last_run), 1
        for k, use in enumerate(track.uses):
            if occurrences.events[use.event].again and not use.creates:
                yield f"load_{t}_{k}", 0, int(not track.pinned)
        for version in sorted({use.version for use in track.uses} - track.lifetime.backed):
            yield f"store_{t}_{version}", 0, 1


def _add_variables(problem: pulp.LpProblem, occurrences: Occurrences) -> _Variables:
    return {name: problem.add_variable(name, low, high, pulp.LpInteger) for name, low, high in _names(occurrences)}


def _sum(terms: _Terms, constant: float = 0.0) -> Any:
    """PuLP keeps only the last of several terms in one variable."""
    merged: dict[Any, float] = {}
    for variable, factor in terms:
        merged[variable] = merged.get(variable, 0) + factor
    return pulp.LpAffineExpression(merged, constant)


def _price(question: Question, variables: _Variables) -> Any:
    """Fetches, stores and recomputations."""
    occurrences, prices, unit = question.occurrences, question.prices, question.unit
    terms: _Terms = []
    constant = 0.0
    for t, track in enumerate(occurrences.tracks):
        load, store = prices.load(track.lifetime.nbytes) / unit, prices.store(track.lifetime.nbytes) / unit
        terms += [(variables[f"store_{t}_{v}"], store) for v in {u.version for u in track.uses} - track.lifetime.backed]
        for k, use in enumerate(track.uses[1:], 1):
            if not occurrences.events[use.event].again:
                terms.append((variables[f"keep_{t}_{k - 1}"], -load))
                constant += load
            elif not use.creates:
                terms.append((variables[f"load_{t}_{k}"], load))
    for e, event in enumerate(occurrences.events):
        if event.again:
            terms.append((variables[f"again_{e}"], prices.run_again(event.op) / unit))
    return _sum(terms, constant)


def _flops(occurrences: Occurrences, variables: _Variables) -> Any:
    ops = occurrences.plan.graph.ops
    flops = {e: max(1, ops[event.op].flops) for e, event in enumerate(occurrences.events) if event.again}
    most = max(flops.values(), default=1)
    return _sum([(variables[f"again_{e}"], count / most) for e, count in flops.items()])


def _track_rows(occurrences: Occurrences, variables: _Variables, t: int) -> Iterator[tuple[str, Any]]:
    """Where the buffer can come from, at each of its uses after the first."""
    track = occurrences.tracks[t]
    for k, use in enumerate(track.uses[1:], 1):
        before = variables[f"keep_{t}_{k - 1}"]
        after = variables.get(f"keep_{t}_{k}")
        stored = variables.get(f"store_{t}_{track.uses[k - 1].version}")
        if not occurrences.events[use.event].again:
            if stored is not None:
                yield f"store_{t}_{k}", _sum([(stored, 1), (before, 1)]) >= 1
            continue
        again = variables[f"again_{use.event}"]
        source = again if use.creates else variables[f"load_{t}_{k}"]
        if after is not None:
            yield f"stay_{t}_{k}", _sum([(before, 1), (source, 1), (after, -1)]) >= 0
        if use.creates:
            yield f"begin_{t}_{k}", _sum([(before, 1), (again, 1)]) <= 1
            continue
        yield f"operand_{t}_{k}", _sum([(before, 1), (source, 1), (again, -1)]) >= 0
        yield f"fetch_{t}_{k}", _sum([(again, 1), (source, -1)]) >= 0
        if stored is not None:
            yield f"store_{t}_{k}", _sum([(stored, 1), (source, -1)]) >= 0


def _add_capacity(
    problem: pulp.LpProblem, occurrences: Occurrences, variables: _Variables, d: int, max_row_terms: int
) -> None:
    """What stays across an event and what the event touches fit together; in units of the sizes' common divisor."""
    unit = math.gcd(*(track.sizes[d] for track in occurrences.tracks)) or 1
    begins: list[list[tuple[str, int]]] = [[] for _ in range(len(occurrences.events) + 1)]
    ends: list[list[tuple[str, int]]] = [[] for _ in range(len(occurrences.events) + 1)]
    terms = 0
    for t, track in enumerate(occurrences.tracks):
        for k, (use, following) in enumerate(pairwise(track.uses)):
            if following.event == use.event + 1:
                continue  # across nothing
            begins[use.event + 1].append((f"keep_{t}_{k}", track.sizes[d] // unit))
            ends[following.event].append((f"keep_{t}_{k}", track.sizes[d] // unit))
            terms += following.event - use.event - 1
    touching = _touching(occurrences, variables, d, unit)
    chained = terms > max_row_terms
    across: dict[str, int] = {}
    held: Any = None
    for e, event in enumerate(occurrences.events):
        if chained:
            changes: _Terms = [(variables[name], size) for name, size in begins[e]]
            changes += [(variables[name], -size) for name, size in ends[e]]
            now = problem.add_variable(f"held_{d}_{e}", 0, None, pulp.LpInteger)
            problem += _sum([(now, -1), *changes, *([(held, 1)] if held is not None else [])]) == 0, f"held_{d}_{e}"
            held = now
            staying: _Terms = [(held, 1)]
        else:
            across.update(begins[e])
            for name, _ in ends[e]:
                del across[name]
            staying = [(variables[name], size) for name, size in across.items()]
        workset = occurrences.worksets[e][d]
        room = occurrences.ceilings[e][d] // unit - (0 if event.again else workset // unit)
        if chained or sum(size for _, size in staying) + workset // unit * event.again > room:
            problem += _sum([*staying, *touching[e]]) <= room, f"capacity_{d}_{e}"


def _touching(occurrences: Occurrences, variables: _Variables, d: int, unit: int) -> list[_Terms]:
    """What a slot's buffers take while it lasts: those kept until it, fetched for it, or computed by it."""
    terms: list[_Terms] = [[] for _ in occurrences.events]
    for t, track in enumerate(occurrences.tracks):
        for k, use in enumerate(track.uses):
            if occurrences.events[use.event].again:
                source = f"again_{use.event}" if use.creates else f"load_{t}_{k}"
                size = track.sizes[d] // unit
                terms[use.event] += [(variables[f"keep_{t}_{k - 1}"], size), (variables[source], size)]
    return terms


def spans(occurrences: Occurrences) -> dict[str, tuple[int, int]]:
    """First and last event that each binary variable is about."""
    found = {f"again_{e}": (e, e) for e, event in enumerate(occurrences.events) if event.again}
    for t, track in enumerate(occurrences.tracks):
        found.update({f"keep_{t}_{k}": (a.event, b.event) for k, (a, b) in enumerate(pairwise(track.uses))})
    return found


def kept_across(realised: Realised, event: int) -> frozenset[str]:
    """Variables that are 1 because buffers stay across ``event``: if they do not fit, one of them must be 0."""
    occurrences = realised.occurrences
    names = {f"again_{event}"} if occurrences.events[event].again else set()
    for s in realised.stretches:
        uses = occurrences.tracks[s.track].uses
        if s.kept and uses[s.first].event < event < uses[s.last].event:
            names |= {
                f"keep_{s.track}_{k}" for k in range(s.first, s.last) if uses[k].event < event < uses[k + 1].event
            }
    return frozenset(names)


def choice_of(occurrences: Occurrences, values: Mapping[str, float]) -> Choice:
    """The choice that a solution stands for."""
    again = frozenset(e for e, event in enumerate(occurrences.events) if event.again and values[f"again_{e}"] > 0.5)
    return normalised(occurrences, again, lambda t, k: values.get(f"keep_{t}_{k}", 0.0) > 0.5)
