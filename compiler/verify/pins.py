"""Whether the plan keeps to what the user has pinned."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

from ..plan import Pin, Plan, Residence
from .facts import Facts
from .faults import Fault, Finding

__all__ = ["check_pins"]


def check_pins(plan: Plan, facts: Facts, residences: tuple[Residence, ...]) -> Iterator[Finding]:
    """Each pinned buffer lies where its pin says, and stays if it says so."""
    of_buffer: dict[str, list[Residence]] = {}
    for residence in sorted(residences, key=lambda r: (r.begin, r.end)):
        of_buffer.setdefault(residence.buffer, []).append(residence)
    for pin in plan.pins:
        if pin.buffer not in facts.nbytes:
            yield Finding(Fault.BUFFER_UNKNOWN, f"a pin names buffer {pin.buffer!r}, which the graph does not have")
            continue
        own = of_buffer.get(pin.buffer, [])
        for residence in own:
            if residence.offset is not None:
                yield from _check_place(plan, pin, residence.offset, residence.begin)
        if pin.resident:
            for before, after in pairwise(own):
                message = f"buffer {pin.buffer!r} is pinned as resident, but gone from step {before.end} on"
                yield Finding(Fault.PIN_RELEASED, message, after.begin)


def _check_place(plan: Plan, pin: Pin, offset: int, step: int) -> Iterator[Finding]:
    if pin.offset not in (None, offset):
        message = f"buffer {pin.buffer!r} is pinned to byte {pin.offset} and lies at {offset}"
        yield Finding(Fault.PIN_MOVED, message, step)
    if pin.bank is not None:
        memory = plan.machine.scratchpad_memory
        ends = list(accumulate(memory.banks_bytes)) or [memory.capacity_bytes]
        bank = sum(end <= offset for end in ends)
        if bank != pin.bank:
            message = f"buffer {pin.buffer!r} is pinned to bank {pin.bank} and lies in bank {bank}, at {offset}"
            yield Finding(Fault.PIN_MOVED, message, step)
