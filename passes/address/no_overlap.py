"""Whether rectangles fit below a height: CP-SAT's two-dimensional no-overlap, lifetimes fixed and offsets free."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from ortools.sat.python import cp_model

from ...compiler.pipeline import Budget
from .packing import Packing, Range

__all__ = ["Answer", "Verdict", "fit_by_constraints"]

POLL_S = 0.05  # how often a running solver is asked to stop, if it should


class Verdict(Enum):
    """What is known about a capacity."""

    PLACED = "placed"
    IMPOSSIBLE = "impossible"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Answer:
    """A verdict, and the offsets in units, by position of the items asked about, if placed."""

    verdict: Verdict
    offsets: tuple[int, ...] = ()


def fit_by_constraints(
    packing: Packing,
    items: Sequence[int],
    capacity: int,
    budget: Budget,
    *,
    seconds: float,
    fixed: Mapping[int, int] = MappingProxyType({}),
) -> Answer:
    """Place ``items`` so that all end within ``capacity`` bytes and clear of those ``fixed``: units by other item.

    ``seconds`` are wall seconds, or CP-SAT's deterministic ones if the budget asks for determinism. Formulation:
    variables ``offset[i]`` in the ranges of ``Packing.offsets``; rectangles ``[begin, end) x [offset, offset + units)``
    do not overlap. Moving everything down as far as it goes makes every offset a sum of sizes, on top of what is fixed
    or of where a window begins, so units are divided by the greatest common divisor of them all. Of placements that
    differ by exchanging equal items one is kept.
    """
    scale = math.gcd(packing.divisor(items), *(packing.units[i] for i in fixed), *fixed.values())
    ranges = [[(low // scale, high // scale) for low, high in packing.offsets(i, capacity)] for i in items]
    if not all(ranges):
        return Answer(Verdict.IMPOSSIBLE)
    model = cp_model.CpModel()
    domains = [cp_model.Domain.from_intervals(allowed) for allowed in ranges]
    offsets = [model.new_int_var_from_domain(d, f"offset_{i}") for i, d in zip(items, domains, strict=True)]
    obstacles = {i: offset // scale for i, offset in fixed.items()}
    places: list[tuple[int, cp_model.IntVar | int]] = [*zip(items, offsets, strict=True), *obstacles.items()]
    steps, regions = [], []
    for item, offset in places:
        begin, end = packing.begins[item], packing.ends[item]
        steps.append(model.new_fixed_size_interval_var(begin, end - begin, f"steps_{item}"))
        regions.append(model.new_fixed_size_interval_var(offset, packing.units[item] // scale, f"region_{item}"))
    model.add_no_overlap_2d(steps, regions)
    _break_symmetry(model, packing, items, offsets)
    solver = _solver(budget, seconds)
    status = _solve(solver, model, budget)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(Verdict.PLACED, tuple(solver.value(offset) * scale for offset in offsets))
    return Answer(Verdict.IMPOSSIBLE if status == cp_model.INFEASIBLE else Verdict.UNKNOWN)


def _break_symmetry(
    model: cp_model.CpModel, packing: Packing, items: Sequence[int], offsets: Sequence[cp_model.IntVar]
) -> None:
    """Order equal items. Upside down stays a symmetry: halving the largest item's range made placing 5 times slower."""
    alike: dict[tuple[int, int, int, tuple[Range, ...]], int] = {}
    for position, item in enumerate(items):
        kind = (packing.begins[item], packing.ends[item], packing.nbytes[item], packing.windows[item])
        if kind in alike:
            model.add(offsets[alike[kind]] <= offsets[position])
        alike[kind] = position


def _solver(budget: Budget, seconds: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.random_seed = budget.seed
    solver.parameters.catch_sigint_signal = False
    if budget.deterministic:
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = seconds
    else:
        solver.parameters.num_workers = budget.workers
        solver.parameters.max_time_in_seconds = seconds
    return solver


def _solve(solver: cp_model.CpSolver, model: cp_model.CpModel, budget: Budget) -> cp_model.CpSolverStatus:
    """Solve on another thread, so that this one hears Ctrl-C and can tell the solver to stop."""
    statuses: list[cp_model.CpSolverStatus] = []
    worker = threading.Thread(target=lambda: statuses.append(solver.solve(model)), daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(POLL_S)
        if budget.stop.is_set():
            solver.stop_search()
    return statuses[0]
