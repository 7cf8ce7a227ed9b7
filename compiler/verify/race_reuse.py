"""Memory that the host frees and takes again while steps are still queued.

PyTorch's caching allocator has a pool for each stream. Freeing a block returns it to the pool it came from at once, and
the next storage taken from that pool may get it: safe for work on the pool's own stream, whose order protects it, and
on others only where events do.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...hw_models.model import EngineKind
from ..plan import Residence
from .race_bytes import Touch
from .race_faults import RaceFault, RaceFinding

if TYPE_CHECKING:
    from ..runtime.device.layout import DevicePlan
    from ..runtime.device.program import Program

__all__ = ["check_reuse"]


@dataclass(frozen=True)
class _Block:
    """Bytes ``[first, last)`` of ``storage``, taken from ``pool`` at step ``begin`` and freed before step ``end``.

    A storage that the caller hands over comes from a pool that is not known, ``None``, and goes back to it.
    """

    storage: str
    begin: int
    end: int
    pool: str | None
    first: int
    last: int


def check_reuse(
    program: Program, device_plan: DevicePlan, touched: Sequence[Sequence[Touch]], done: Sequence[int]
) -> Iterator[RaceFinding]:
    """Whoever uses a block comes after all who used what its pool had got back before it was taken.

    ``touched`` are the bytes that each step uses, ``done`` the steps that are done before it, as a bit mask.
    """
    memory = device_plan.plan.machine.scratchpad
    uses = sorted(
        (t.begin, step)
        for step, touches in enumerate(touched)
        for t in touches
        if t.space == memory and t.begin < t.end
    )
    blocks = sorted(_blocks(program, device_plan), key=lambda block: block.begin)
    users = {block: _users(uses, block) for block in blocks}
    freed: dict[str | None, int] = {}
    waiting = sorted(blocks, key=lambda block: block.end, reverse=True)
    for block in blocks:
        while waiting and waiting[-1].end <= block.begin:
            back = waiting.pop()
            freed[back.pool] = freed.get(back.pool, 0) | sum(1 << step for step in users[back])
        if block.pool is None:
            continue
        before = freed.get(None, 0) | freed.get(block.pool, 0)
        for step in sorted(users[block]):
            if late := before & ~done[step]:
                message = f"uses {block.storage!r}, whose memory step {late.bit_length() - 1} may still use"
                yield RaceFinding(RaceFault.UNORDERED_REUSE, message, step)
                break


def _users(uses: Sequence[tuple[int, int]], block: _Block) -> set[int]:
    low, high = (bisect.bisect_left(uses, (at, -1)) for at in (block.first, block.last))
    return {step for _, step in uses[low:high] if block.begin <= step < block.end}


def _blocks(program: Program, device_plan: DevicePlan) -> Iterator[_Block]:
    from ..runtime.device.program import Origin, Ref  # which imports torch, as whoever made the program has

    plan = device_plan.plan
    steps, main = len(plan.instructions), plan.machine.engines_of(EngineKind.COMPUTE)[0].name
    returned = {program.views[item.name].storage for item in program.outputs if isinstance(item, Ref)}
    for name, first in device_plan.apart.items():
        storage = program.storages[name]
        last = first + int(storage.nbytes)
        inside: list[Residence] = [
            r for r in plan.residences or () if first <= (-1 if r.offset is None else r.offset) < last
        ]
        if storage.origin is Origin.CALL:
            for stay in (r for r in inside if r.buffer == name):
                end = steps if name in returned else stay.end
                yield _Block(name, stay.begin, end, plan.instructions[stay.begin].engine, first, last)
        elif inside:
            end = steps if name in returned else max(r.end for r in inside)
            is_given = storage.origin is Origin.GIVEN
            begin = 0 if is_given else min(r.begin for r in inside)
            yield _Block(name, begin, end, None if is_given else main, first, last)
