"""Other addresses for the arena, so that what runs at the same time does not share bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from ...compiler.plan import PassRecord, Plan, Residence
from ...compiler.runtime.device.layout import DevicePlan
from ...hw_models.model import aligned_bytes
from .reissue import uses_of

__all__ = ["spread"]

_Spans = Sequence[tuple[float, float]]


def spread(
    device_plan: DevicePlan, movable: Callable[[Residence], bool], times: _Spans, limit_bytes: int
) -> DevicePlan | None:
    """The plan with what is ``movable`` placed afresh in an arena of at most ``limit_bytes``, if it fits this way.

    ``times`` are start and finish of each step as they would be if no two buffers shared bytes. Buffers that exist at
    the same steps never share bytes; those that would exist at the same time do only where there is no other room,
    and then one waits for the other. Largest first, each at the lowest address; what is not movable stays where it is
    behind the arena.
    """
    plan = device_plan.plan
    if plan.pins or plan.machine.scratchpad_memory.banks_bytes or plan.residences is None:
        return None  # addresses that are not ours to choose
    nbytes = {name: base.nbytes for name, base in plan.graph.buffers.items()}
    moved = [_Placed(i, nbytes[r.buffer], r.begin, r.end) for i, r in enumerate(plan.residences) if movable(r)]
    placed: list[_Placed] = []
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    for item in sorted(_timed(plan, moved, times), key=lambda p: (-p.nbytes, p.begin, p.index)):
        at_steps = [other for other in placed if item.begin < other.end and other.begin < item.end]
        at_times = [other for other in placed if item.start < other.finish and other.start < item.finish]
        found = _lowest(item.nbytes, (*at_steps, *at_times), alignment, limit_bytes)
        if found is None:
            found = _lowest(item.nbytes, at_steps, alignment, limit_bytes)
        if found is None:
            return None
        placed.append(msgspec.structs.replace(item, offset=found))
    return _moved(device_plan, {item.index: item.offset for item in placed})


class _Placed(msgspec.Struct, frozen=True):
    """Residence number ``index``, at steps ``begin`` to ``end - 1`` and from ``start`` to ``finish`` in seconds."""

    index: int
    nbytes: int
    begin: int
    end: int
    start: float = 0.0
    finish: float = 0.0
    offset: int = 0


def _timed(plan: Plan, items: Iterable[_Placed], times: _Spans) -> list[_Placed]:
    """With the time from the first start to the last finish of the steps that use each residence."""
    uses = uses_of(plan)
    result: list[_Placed] = []
    residences = plan.residences or ()
    for item in items:
        steps = [s for s in uses.get(residences[item.index].buffer, ()) if item.begin <= s < item.end]
        start = min((times[step][0] for step in steps), default=0.0)
        finish = max((times[step][1] for step in steps), default=0.0)
        result.append(msgspec.structs.replace(item, start=start, finish=finish))
    return result


def _lowest(nbytes: int, others: Iterable[_Placed], alignment: int, limit_bytes: int) -> int | None:
    """The lowest aligned address at which ``nbytes`` overlap none of ``others``."""
    offset = 0
    for other in sorted(others, key=lambda o: o.offset):
        if offset + nbytes <= other.offset:
            break
        offset = max(offset, aligned_bytes(other.offset + other.nbytes, alignment))
    return offset if offset + nbytes <= limit_bytes else None


def _moved(device_plan: DevicePlan, offsets: Mapping[int, int]) -> DevicePlan:
    """The plan with these offsets by residence; what lies behind the arena is shifted by what the arena grows."""
    plan = device_plan.plan
    residences = list(plan.residences or ())
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    ends = [offset + plan.graph.buffers[residences[i].buffer].nbytes for i, offset in offsets.items()]
    shift = max(0, aligned_bytes(max(ends, default=0), alignment) - device_plan.arena_bytes)
    for i, residence in enumerate(residences):
        offset = offsets.get(i, (residence.offset or 0) + shift)
        residences[i] = msgspec.structs.replace(residence, offset=offset)
    machine = plan.machine
    if shift:
        machine = machine.with_scratchpad(machine.scratchpad_memory.capacity_bytes + shift)
    stays = {residences[i].buffer for i in range(len(residences)) if i not in offsets}
    apart = {name: first + shift for name, first in device_plan.apart.items() if name in stays}
    passes = tuple(map(_without_arena, plan.passes))
    plan = msgspec.structs.replace(plan, residences=tuple(residences), machine=machine, passes=passes)
    return DevicePlan(plan, device_plan.arena_bytes + shift, apart)


def _without_arena(record: PassRecord) -> PassRecord:
    """The record without what it says about places, which are others now."""
    if record.certificate is None or record.certificate.objective != "arena_bytes":
        return record
    return msgspec.structs.replace(record, certificate=None)
