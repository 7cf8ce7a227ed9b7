"""What users pin: from a mapping of tensor names, as ``compile`` takes it, to the pins a plan carries."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from ..errors import OptionError
from .plan import Pin, Plan

__all__ = ["pins_of"]

FIELDS = ("offset", "bank", "resident")
TAKEN = "a pin takes 'offset' (bytes), 'bank' (its number, from 0) and 'resident' (True or False), one at least"


def pins_of(wanted: Mapping[str, Mapping[str, object]], plan: Plan) -> tuple[Pin, ...]:
    """Pins for ``plan``, by buffer, from what is ``wanted`` of tensors: ``{"input": {"offset": 0}}``.

    A tensor's name stands for the buffer that holds it, and so for all its views and in-place updates.

    Raises:
        OptionError: no such tensor, one that has no region (streamed, or of 0 bytes), two tensors of one buffer that
            are pinned differently, an unknown field, or a region that the scratchpad and its banks do not have.
    """
    if not isinstance(wanted, Mapping):
        raise OptionError(f"pins is {wanted!r}; it is a mapping of tensor names", hint=TAKEN)
    buffer_of = {tensor.name: tensor.buffer for tensor in plan.graph.tensors}
    pins: dict[str, Pin] = {}
    named: dict[str, str] = {}
    for name, fields in wanted.items():
        if name not in buffer_of:
            close = get_close_matches(str(name), buffer_of, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise OptionError(f"a pin names tensor {name!r}, which the graph does not have", hint=f"{meant}{TAKEN}")
        pin = _pin(name, buffer_of[name], fields)
        _check_region(plan, name, pin)
        if pins.setdefault(pin.buffer, pin) != pin:
            raise OptionError(
                f"tensors {named[pin.buffer]!r} and {name!r} share buffer {pin.buffer!r} and are pinned differently",
                hint="pin one of them",
            )
        named.setdefault(pin.buffer, name)
    return tuple(pins[buffer] for buffer in sorted(pins))


def _pin(name: str, buffer: str, fields: Mapping[str, object]) -> Pin:
    if not isinstance(fields, Mapping) or not fields:
        raise OptionError(f"the pin of {name!r} is {fields!r}", hint=TAKEN)
    unknown = [field for field in fields if field not in FIELDS]
    if unknown:
        raise OptionError(f"the pin of {name!r} has the field {unknown[0]!r}", hint=TAKEN)
    numbers: dict[str, int | None] = {}
    for field in ("offset", "bank"):
        value = fields.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise OptionError(f"the pin of {name!r} has {field} {value!r}; it takes an integer from 0", hint=TAKEN)
        numbers[field] = value
    resident = fields.get("resident", False)
    if not isinstance(resident, bool):
        raise OptionError(f"the pin of {name!r} has resident {resident!r}; it takes True or False", hint=TAKEN)
    return Pin(buffer, numbers["offset"], numbers["bank"], resident)


def _check_region(plan: Plan, name: str, pin: Pin) -> None:
    """There is a place in the scratchpad that the pin admits. Raises OptionError."""
    memory = plan.machine.scratchpad_memory
    nbytes = plan.graph.buffers[pin.buffer].nbytes
    if pin.buffer in plan.streamed:
        hint = "plan with weights='resident', or leave the pin out"
        raise OptionError(
            f"tensor {name!r} is pinned, but it is streamed and has no place in the scratchpad", hint=hint
        )
    if nbytes == 0:
        raise OptionError(f"tensor {name!r} is pinned, but it has no bytes", hint="leave the pin out")
    banks = list(enumerate(memory.banks))
    listed = ", ".join(f"{number}: bytes {begin} to {end - 1}" for number, (begin, end) in banks)
    if pin.bank is not None and pin.bank >= len(banks):
        raise OptionError(f"tensor {name!r} is pinned to bank {pin.bank}; memory {memory.name!r} has {listed}")
    if pin.offset is not None and pin.offset % memory.alignment_bytes:
        raise OptionError(
            f"tensor {name!r} is pinned to byte {pin.offset}; regions of memory {memory.name!r} begin at multiples of "
            f"{memory.alignment_bytes}"
        )
    for number, (begin, end) in banks:
        offset = begin if pin.offset is None else pin.offset
        if pin.bank in (None, number) and begin <= offset and offset + nbytes <= end:
            return
    where = " and ".join(
        text
        for text in (
            "" if pin.bank is None else f"bank {pin.bank}",
            "" if pin.offset is None else f"bytes {pin.offset} to {pin.offset + nbytes - 1}",
        )
        if text
    )
    raise OptionError(
        f"tensor {name!r} of {nbytes} bytes is pinned to {where or 'the scratchpad'}, and no bank of memory "
        f"{memory.name!r} holds that; it has {listed}"
    )
