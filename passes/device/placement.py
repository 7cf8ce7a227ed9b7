"""Where each buffer lies: in the arena, in memory allocated apart for another one, or in memory of its own."""

from __future__ import annotations

from types import MappingProxyType

import msgspec
import numpy as np

from ...compiler.pipeline import Budget
from ...compiler.plan import Plan
from ...compiler.runtime.device.layout import DevicePlan
from ..address.gaps import PRIORITIES, best_of
from ..address.no_overlap import Verdict, fit_by_constraints
from ..address.packing import Packing
from .blocks import Storages
from .filling import mixtures
from .mixing import ARENA, Mixture, Places

__all__ = ["place"]

EXACT_SECONDS = 2.0  # for the question whether everything fits the arena that the limit allows


def place(
    plan: Plan, apart: frozenset[str], hosts: frozenset[str], budget: Budget, *, limit_bytes: int = 0
) -> DevicePlan:
    """``plan``'s residences, one a buffer, placed so that no step allocates more than the peak of live bytes.

    Everything that is not ``apart`` lies in one arena if an arena that small is found; else some of it lies in memory
    of ``hosts``, and what is left is allocated apart, too. A ``limit_bytes`` above the peak may be used up.
    """
    storages = Storages.of(plan, apart, hosts)
    everything = storages.profile(np.ones(len(storages.sizes), np.bool_))
    limit = max(int(everything.max(initial=0)), limit_bytes)
    places = _in_one_arena(plan, storages, limit, budget) or _best_mixture(storages, limit, budget)
    return _device_plan(plan, apart, storages, places)


def _in_one_arena(plan: Plan, storages: Storages, limit: int, budget: Budget) -> Places | None:
    """All that is not apart in one arena, if one that keeps the limit is found."""
    room = limit - int(storages.profile(storages.apart).max(initial=0))
    planned = np.flatnonzero(~storages.apart)
    if int(storages.profile(~storages.apart).max(initial=0)) > room:
        return None
    memory = plan.machine.scratchpad_memory
    memory = msgspec.structs.replace(memory, capacity_bytes=int(storages.sizes.sum()) or 1, banks_bytes=())
    residences = [(plan.residences or ())[i] for i in planned]
    packing = Packing.of_spans(plan, memory, [(r.buffer, r.begin, r.end) for r in residences])
    units = best_of(packing, packing.items, PRIORITIES)
    arena = packing.arena_bytes(packing.items, units)
    if arena > room:
        seconds = EXACT_SECONDS if budget.deterministic else min(EXACT_SECONDS, budget.remaining_s / 2)
        if seconds <= 0:
            return None
        answer = fit_by_constraints(packing, packing.items, room, budget, seconds=seconds)
        if answer.verdict is not Verdict.PLACED:
            return None
        units = list(answer.offsets)
    offsets = np.zeros(len(storages.sizes), np.int64)
    offsets[planned] = np.array(units, np.int64) * storages.alignment
    owners = np.where(storages.apart, np.arange(len(storages.sizes)), ARENA)
    return Places(int((offsets + storages.sizes)[planned].max(initial=0)), owners, offsets)


def _best_mixture(storages: Storages, limit: int, budget: Budget) -> Places:
    """Of all placements tried, the one that leaves the fewest bytes to be allocated alone."""
    best: Mixture | None = None
    for found in mixtures(storages, limit, budget):
        if best is None or _merit(storages, found) < _merit(storages, best):
            best = found
        if best.alone_bytes == 0 or budget.halted():
            break
    assert best is not None  # the last one tried gives up the arena, and so keeps the limit
    return best.places


def _merit(storages: Storages, mixture: Mixture) -> tuple[int, int]:
    """Bytes allocated alone, then bytes outside the arena."""
    outside = storages.sizes[mixture.places.owners != ARENA].sum()
    return mixture.alone_bytes, int(outside)


def _device_plan(plan: Plan, apart: frozenset[str], storages: Storages, places: Places) -> DevicePlan:
    """Offsets as a device plan has them: ranges of those with memory of their own follow the arena."""
    residences = plan.residences or ()
    starts: dict[int, int] = {ARENA: 0}
    behind = places.arena_bytes
    for owner in range(len(residences)):
        if places.owners[owner] == owner:
            starts[owner] = behind
            behind += int(storages.sizes[owner])
    placed = tuple(
        msgspec.structs.replace(residence, offset=starts[int(owner)] + int(offset))
        for residence, owner, offset in zip(residences, places.owners, places.offsets, strict=True)
    )
    ranges = {residences[owner].buffer: first for owner, first in starts.items() if owner != ARENA}
    machine = plan.machine.with_scratchpad(max(behind, storages.alignment))
    decided = msgspec.structs.replace(plan, machine=machine, residences=placed)
    return DevicePlan(decided, places.arena_bytes, MappingProxyType(ranges))
