"""Schedules out of templates: the shortest period that keeps the limit, then all microbatches, and ends made anew.

A template says only in which order its tasks go first; a list schedule that follows it does the rest, so that the
warm-up starts what it can and the cool-down leaves no holes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ._lanes import Floats, Integers, schedule_of
from ._play import objective_of
from ._progress import Search
from .list_schedule import Rule, Workshop, filled, list_scheduled
from .modulo import Template, template

__all__ = ["repeat"]

FACTORS = (1.0, 1.03, 1.08, 1.15, 1.25, 1.4, 1.6, 2.0, 3.0)  # periods, in units of the least, until one is feasible
HALVINGS = 3  # of the distance between a period that is feasible and one that is not
PATIENCE = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the list schedules, in units of the longest W
EFFORT = 2.0  # deterministic seconds of CP-SAT for a period


def repeat(search: Search, shop: Workshop) -> None:
    """Offer ``search`` schedules that repeat a template, if all routes have as many microbatches as the others."""
    if len({route.microbatches for route in shop.problem.routes}) > 1:
        return
    for whole in (False, True) if shop.lanes.lane["useful"].any() else (False,):
        for found in _templates(search, shop, whole):
            _unroll(search, shop, found)
            if search.done():
                return


def _templates(search: Search, shop: Workshop, whole: bool) -> Iterator[Template]:
    """Templates of ever shorter periods, and one of the shortest period that memory would allow if it did."""
    least = _least_period(shop, whole)
    budget = search.budget.share(0.4)
    low, high = 0.0, 0.0
    for factor in FACTORS:
        if search.done() or budget.halted():
            return
        found, _ = template(shop.lanes, int(np.ceil(least * factor)), whole, budget, EFFORT)
        if found is not None:
            high = factor
            yield found
            break
        low = factor
    for _ in range(HALVINGS if high and low else 0):
        if search.done() or budget.halted():
            return
        middle = (low + high) / 2
        found, _ = template(shop.lanes, int(np.ceil(least * middle)), whole, budget, EFFORT)
        if found is not None:
            high = middle
            yield found
        else:
            low = middle


def _least_period(shop: Workshop, whole: bool) -> int:
    """The work of one microbatch of each route on the rank that has most."""
    work = np.zeros(len(shop.lanes.limit), np.int64)
    longest = 0
    for lane in shop.lanes.lane:
        duration = int(lane["duration"])
        if whole and lane["half"] >= 0:
            duration = max(0, int(lane["whole"]))
        longest = max(longest, duration)
        if not lane["copies"]:
            work[lane["rank"]] += duration
    return max(1, longest, int(work.max()))


def _unroll(search: Search, shop: Workshop, found: Template) -> None:
    """Offer the template as it is, all as early as can be, and the best list schedule that follows it."""
    symbols, begin = _as_it_is(shop, found)
    search.offer(schedule_of(shop.problem, shop.lanes, symbols, begin, f"template, period {found.period}"))
    lanes = shop.lanes
    rules = filled(shop, Rule("steady", ahead=1e12, modes="whole" if found.whole else "split"))
    rules.priority[:] = _starts(shop, found)
    for k, lane in enumerate(lanes.lane):
        if lane["half"] < 0 and lane["gradient"] >= 0:  # as far ahead as in the template
            rules.ahead[k] = max(1, 1 + (found.starts[lane["gradient"]] - found.starts[k]) // found.period)
    longest = int(lanes.lane["duration"].max())
    best: int | None = None
    for patience in PATIENCE:
        if search.done():
            return
        wait = np.where(lanes.lane["copies"] > 0, 0, int(patience * longest)).astype(np.int64)
        symbols, begin = list_scheduled(shop, rules._replace(patience=wait))
        value = int(objective_of(lanes, shop.room, search.objective == "span"))
        if best is None or value < best:
            best = value
            method = f"list schedule by a template, period {found.period}"
            search.offer(schedule_of(shop.problem, lanes, symbols, begin, method))


def _starts(shop: Workshop, found: Template) -> Floats:
    """By node, when the template would start it."""
    starts = np.zeros(shop.lanes.nodes)
    for k, lane in enumerate(shop.lanes.lane):
        number = int(lane["microbatches"])
        starts[lane["first"] : lane["first"] + number] = found.starts[k] + found.period * np.arange(number)
    return starts


def _as_it_is(shop: Workshop, found: Template) -> tuple[Integers, Integers]:
    """Symbols and begin of the template's order: it keeps the limit, as its ends hold fewer bytes than its middle."""
    lanes = shop.lanes
    starts = _starts(shop, found)
    orders = []
    for rank in range(len(lanes.limit)):
        own = lanes.own[lanes.own_begin[rank] : lanes.own_begin[rank + 1]]
        if found.whole:
            own = own[lanes.lane["whole"][own] >= 0]
        nodes = [(int(k), int(lanes.lane[k]["first"]) + n) for k in own for n in range(lanes.lane[k]["microbatches"])]
        nodes.sort(key=lambda pair: (starts[pair[1]], pair[1]))
        whole = found.whole * len(lanes.lane) * (lanes.lane["half"] >= 0)
        orders.append(np.array([k + int(whole[k]) for k, _ in nodes], np.int64))
    return np.concatenate(orders), np.array(np.cumsum([0, *map(len, orders)]), np.int64)
