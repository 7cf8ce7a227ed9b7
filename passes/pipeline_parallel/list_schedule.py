"""List schedules of a pipeline by many rules: which kind goes first, how far ahead F runs, how long a rank waits.

Zero Bubble's own heuristic (Qi et al., arXiv 2401.10241, section 3.1) is such a rule for stages that are alike; these
hold for any tasks that ``tasks_of`` writes: several chunks on a rank, several routes, shards of the vocabulary, copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import ActionKind, PipelineSchedule
from ...errors import InternalError
from ._dispatch import EITHER, SPLIT, WHOLE, Desk, Rules, desk_for, dispatch, need
from ._lanes import KINDS, Floats, Integers, Lanes, lanes_of, schedule_of
from ._play import Room, clear, objective_of, room_for
from ._progress import Search

__all__ = ["Rule", "Workshop", "construct", "filled", "list_scheduled", "rules_for", "workshop_for"]

FORWARD = KINDS.index(ActionKind.FORWARD)
INPUT_GRADIENT = KINDS.index(ActionKind.INPUT_GRADIENT)
WEIGHT_GRADIENT = KINDS.index(ActionKind.WEIGHT_GRADIENT)
NEVER = 1 << 40


@dataclass(frozen=True)
class Rule:
    """``first`` names the kinds in the order in which they go first, or is ``"steady"``: by the time at which an
    endless pipeline, in step, would do it. ``ahead`` is how many microbatches F may be ahead of I, in units of those
    that cover the way to the end and back; ``patience`` how long a rank waits for F or I, in units of the longest W;
    ``weight_lag`` how many microbatches a steady W is behind; ``modes`` whether backwards are in halves, whole, or
    either; ``share`` of the memory limit that is used.
    """

    first: str = "IFW"
    ahead: float = 1.0
    patience: float = 0.0
    weight_lag: float = 0.0
    modes: str = "split"
    share: float = 1.0
    deep_first: bool = True

    def __str__(self) -> str:
        parts = [self.first, f"ahead {self.ahead:g}", f"patience {self.patience:g}", self.modes]
        if self.first == "steady":
            parts.append(f"W {self.weight_lag:g} behind")
        return f"list schedule ({', '.join(parts)})"


@dataclass(frozen=True)
class Workshop:
    """A problem as arrays, with all that schedules of it are made and judged in."""

    problem: PipelineProblem
    lanes: Lanes
    room: Room
    desk: Desk
    early: Integers
    period: float
    least: Integers


def workshop_for(problem: PipelineProblem) -> Workshop:
    """A workshop; ``early`` are the starts of each lane in a microbatch alone, ``period`` the time of one in the long
    run, ``least`` the bytes that each rank needs for a microbatch alone, beside what is resident.
    """
    lanes = lanes_of(problem)
    early = np.zeros(len(lanes.lane), np.int64)
    for k, lane in enumerate(lanes.lane):
        for edge in lanes.edges[lane["before"] : lane["before_end"]]:
            sender = edge["lane"]
            early[k] = max(early[k], early[sender] + lanes.lane[sender]["duration"] + edge["lag"])
    period = max(1, *problem.work_ns) / problem.microbatches  # also where nothing takes any time
    return Workshop(problem, lanes, room_for(lanes), desk_for(lanes), early, period, _least(lanes))


def _least(lanes: Lanes) -> Integers:
    least = np.zeros(len(lanes.limit), np.int64)
    room = room_for(lanes)
    clear(room)
    for rank in range(len(lanes.limit)):
        for route in range(lanes.serial.shape[1]):
            least[rank] = max(least[rank], need(lanes, room, rank, route, 0, 0, -1))
    return least


def rules_for(shop: Workshop) -> Iterator[Rule]:
    """Rules worth trying, the most promising first."""
    modes = ("split", "whole", "either") if shop.lanes.lane["useful"].any() else ("split",)
    for patience, first, ahead, mode in product((0.0, 0.5, 1.0), ("IFW", "FIW"), (1.5, 2.0, 1.0, NEVER), modes):
        yield Rule(first, ahead, patience, modes=mode)
    for lag, ahead, patience, mode in product((0.0, 0.5, 1.0, 2.0), (1.0, NEVER), (0.0, 0.5, 1.0), modes):
        yield Rule("steady", ahead, patience, lag, mode)
    for patience, first, ahead, mode in product((0.0, 0.5, 1.0), ("IFW", "FIW"), (1.5, 2.0, 1.0, NEVER), modes):
        yield Rule(first, ahead, patience, modes=mode, deep_first=False)
    for ahead, mode in product((1.0, 1.5, 2.0, NEVER), modes):
        yield Rule("IWF", ahead, modes=mode)


def filled(shop: Workshop, rule: Rule) -> Rules:
    """A rule as numbers, by node and lane."""
    lanes = shop.lanes
    longest = int(lanes.lane["duration"][lanes.lane["kind"] == WEIGHT_GRADIENT].max())
    waits = np.isin(lanes.lane["kind"], (FORWARD, INPUT_GRADIENT))
    limit = np.maximum(shop.least, np.minimum(lanes.limit, (lanes.limit * rule.share).astype(np.int64)))
    mode = {"split": SPLIT, "whole": WHOLE, "either": EITHER}[rule.modes]
    return Rules(
        priority=_priority(shop, rule),
        patience=np.where(waits, int(rule.patience * longest), 0).astype(np.int64),
        ahead=_ahead(shop, rule.ahead),
        limit=limit,
        mode=np.full(lanes.nodes, mode, np.int64),
    )


def _priority(shop: Workshop, rule: Rule) -> Floats:
    lanes = shop.lanes
    priority = np.zeros(lanes.nodes)
    total = float(shop.early.max() + 1)
    for lane, early in zip(lanes.lane, shop.early, strict=True):
        kind = KINDS[lane["kind"]]
        place = float(early)
        number = int(lane["microbatches"])
        numbers = np.arange(number) * (shop.problem.microbatches / number)
        if rule.first == "steady":
            if kind is ActionKind.WEIGHT_GRADIENT:
                place += rule.weight_lag * shop.period
            own = place + numbers * shop.period
        elif rule.deep_first:
            own = -place / total + numbers * 1e-6
        else:
            own = numbers + place / total
        if rule.first != "steady":
            own = own + 1e6 * _place_of(kind, rule.first)
        if kind.copies:
            own = own - 1e18
        priority[lane["first"] : lane["first"] + number] = own
    return priority


def _place_of(kind: ActionKind, first: str) -> int:
    """Shards of the vocabulary go with I: another rank waits for S, and nothing for T until late."""
    letter = {"S": "I", "T": "W"}.get(kind.value, kind.value)
    return first.find(letter)


def _ahead(shop: Workshop, ahead: float) -> Integers:
    """Copies back are at most two microbatches early."""
    lanes = shop.lanes
    caps = np.where(lanes.lane["copies"] * lanes.lane["allocates"] > 0, 2, NEVER).astype(np.int64)
    for k, lane in enumerate(lanes.lane):
        if lane["kind"] == FORWARD and ahead < NEVER:
            gradient = lane["gradient"]
            way = float(shop.early[gradient] + lanes.lane[gradient]["duration"] - shop.early[k])
            caps[k] = max(1, int(np.ceil(ahead * way / shop.period)))
    return caps


def list_scheduled(shop: Workshop, rules: Rules) -> tuple[Integers, Integers]:
    """``symbols`` and ``begin`` of the orders that ``rules`` make."""
    if not dispatch(shop.lanes, shop.room, shop.desk, rules):
        raise InternalError("a list schedule of a pipeline is stuck", hint="please report this, with the problem")
    desk = shop.desk
    parts = [desk.symbols[own["begin"] : own["begin"] + own["size"]] for own in desk.rank]
    return np.concatenate(parts), np.array(np.cumsum([0, *map(len, parts)]), np.int64)


def construct(search: Search, shop: Workshop) -> None:
    """Offer ``search`` the best of the list schedules by all rules, or by those for which there is time."""
    span = search.objective == "span"
    best: tuple[int, PipelineSchedule] | None = None
    for rule in rules_for(shop):
        if best is not None and search.budget.halted():
            break
        symbols, begin = list_scheduled(shop, filled(shop, rule))
        value = int(objective_of(shop.lanes, shop.room, span))
        if best is None or value < best[0]:
            best = value, schedule_of(shop.problem, shop.lanes, symbols, begin, str(rule))
        if value <= search.bound.value:
            break
    if best is not None and (search.value is None or best[0] < search.value):
        search.offer(best[1])
    elif best is not None:
        search.note("list schedules", best[0])
